"""Analyses of a cache, an SAE or a model: gold labels, what a model knows of the language, and what single latents cause."""

from sae_italian.analysis.labels import GoldResult, gold_table
from sae_italian.analysis.latent import ablate, steer
from sae_italian.analysis.patching import Patcher, patch_inputs, patch_saes, thresholds
from sae_italian.analysis.tasks import check_able, ioi_pairs, ioi_score, italian_skills, words_for
from sae_italian.saes.baselines import random_twin

__all__ = [
    "GoldResult",
    "Patcher",
    "ablate",
    "check_able",
    "gold_table",
    "ioi_pairs",
    "ioi_score",
    "italian_skills",
    "patch_inputs",
    "patch_saes",
    "random_twin",
    "steer",
    "thresholds",
    "words_for",
]
