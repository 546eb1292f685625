"""ExplainITA (EVALITA 2026): explaining latents of a Minerva SAE (task 1) and scoring explanations (task 2)."""

from sae_italian.autointerp.explainita.data import read_split, write_submission
from sae_italian.autointerp.explainita.tasks import evaluate_explanations, evaluate_sequences, predict, replay

__all__ = ["evaluate_explanations", "evaluate_sequences", "predict", "read_split", "replay", "write_submission"]
