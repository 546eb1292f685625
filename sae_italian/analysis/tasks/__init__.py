"""Tasks with a known right answer: the indirect object, and agreement."""

from sae_italian.analysis.tasks.agreement import MinimalPair, agreement_pairs, agreement_score, read_minimal_pairs
from sae_italian.analysis.tasks.ioi import (
    IoiPair,
    IoiWords,
    default_words,
    ioi_pairs,
    ioi_score,
    micro_italiano_words,
    words_for,
)
from sae_italian.analysis.tasks.scoring import TaskScore, check_able

__all__ = [
    "IoiPair",
    "IoiWords",
    "MinimalPair",
    "TaskScore",
    "agreement_pairs",
    "agreement_score",
    "check_able",
    "default_words",
    "ioi_pairs",
    "ioi_score",
    "micro_italiano_words",
    "read_minimal_pairs",
    "words_for",
]
