"""Analyses of a cache, an SAE or a model: gold labels that single latents detect, what a model knows of the language."""

from sae_italian.analysis.gold import GoldResult, gold_table
from sae_italian.analysis.skills import agreement_accuracy, ioi_logit_differences, italian_skills

__all__ = ["GoldResult", "agreement_accuracy", "gold_table", "ioi_logit_differences", "italian_skills"]
