"""Analyses of a cache, an SAE or a model: gold labels that single latents detect, what a model knows of the language."""

from sae_italian.analysis.gold import GoldResult, gold_table
from sae_italian.analysis.tasks import italian_skills

__all__ = ["GoldResult", "gold_table", "italian_skills"]
