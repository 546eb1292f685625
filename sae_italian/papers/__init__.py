"""The papers' whole evaluations, one command each, and the comparison of an SAE with its baselines."""

from sae_italian.papers.job import MINI
from sae_italian.papers.measure import Settings, compare_baselines
from sae_italian.papers.reproduce import reproduce

__all__ = ["MINI", "Settings", "compare_baselines", "reproduce"]
