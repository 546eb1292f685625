"""ExplainITA (EVALITA 2026): explaining latents of a Minerva SAE (task 1) and scoring explanations (task 2).

What the organisers' pages leave open, and what is done here: BERTScore's model (an option; multilingual BERT by default),
task 2's metric (all detection metrics are given), and the fields of a submission (the test split's rows with the missing
fields filled in, and nothing else changed).
"""

from sae_italian.autointerp.explainita.data import read_split, write_submission
from sae_italian.autointerp.explainita.evaluate import evaluate_explanations, evaluate_sequences
from sae_italian.autointerp.explainita.predict import predict
from sae_italian.autointerp.explainita.replay import replay

__all__ = ["evaluate_explanations", "evaluate_sequences", "predict", "read_split", "replay", "write_submission"]
