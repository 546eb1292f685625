"""Explainers: those that need no LLM, their rules, and the text of a rule."""

from __future__ import annotations

from typing import Protocol

from sae_italian.autointerp.examples import LatentExamples
from sae_italian.autointerp.store import Explanation


class Explainer(Protocol):
    """Turns examples into explanations, with an LLM or without. `name` is how the store and the tables call it.

    `concurrency` says how many latents may be in its hands at once (threads), 1 for one that computes. `n_train`, where
    it has one, is the number of training positives it wants, and `settings` are what its explanations depend on.
    """

    name: str
    concurrency: int

    def explain(self, examples: LatentExamples) -> list[Explanation]:
        """Return one explanation per name this explainer answers for; failures are explanations with that status."""
        ...
