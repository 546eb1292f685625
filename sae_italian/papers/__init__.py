"""The papers' whole evaluations, one command each, and the comparison of an SAE with its baselines."""

from sae_italian.papers.baselines import Settings, compare_baselines

__all__ = ["Settings", "compare_baselines"]
