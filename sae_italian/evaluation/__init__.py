"""What an SAE is worth: the evaluation card, and the doctor who says what is wrong with it."""

from sae_italian.evaluation.card import EvaluationCard, read_card
from sae_italian.evaluation.evaluate import evaluate

__all__ = ["EvaluationCard", "evaluate", "read_card"]
