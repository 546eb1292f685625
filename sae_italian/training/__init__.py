"""From a YAML to a trained SAE: SAELens' configs and trainer, our activation stream, the evaluation card."""

from sae_italian.evaluation.card import EvaluationCard, read_card
from sae_italian.evaluation.evaluate import evaluate
from sae_italian.training.config import RunSpec, load_config, load_spec, spec_from_dict
from sae_italian.training.run import read_run, train
from sae_italian.training.stream import ActivationStream

__all__ = [
    "ActivationStream",
    "EvaluationCard",
    "RunSpec",
    "evaluate",
    "load_config",
    "load_spec",
    "read_card",
    "read_run",
    "spec_from_dict",
    "train",
]
