"""Explaining and scoring one latent by rule: all that needs a cache and no store, so that it can be done anywhere.

A unit of work is a batch of latents; who does it elsewhere than in this process opens the cache there with `open_work`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.autointerp.examples import ExampleSource
from sae_italian.autointerp.explainers.choose import EXPLAINER, LOOKUP, RuleExplainer
from sae_italian.autointerp.negatives import NegativeSource
from sae_italian.autointerp.neighbours import find_neighbours
from sae_italian.autointerp.places import Places
from sae_italian.autointerp.scorers.by_rule import Judged, RuleScorer
from sae_italian.autointerp.store import Explanation
from sae_italian.cache import FeatureCache
from sae_italian.cache.read import Part

LEAST_POSITIVES: dict[Part, int] = {"train": 10, "val": 5, "test": 10}


class Task(NamedTuple):
    """One latent to score: its own rule, its token lookup, and the rules of others as controls."""

    latent: int
    own: Judged
    lookup: Judged
    others: list[Judged]


class Explained(NamedTuple):
    """One latent's explanations, and on how many segments of each part it can be seen at work."""

    latent: int
    n_positives: tuple[int, int, int]
    explanations: list[Explanation]


class Work:
    """Examples, rules and scores of one cache's latents."""

    def __init__(
        self,
        cache: FeatureCache,
        tokenizer: Any,
        latents: list[int],
        sae: Any,
        *,
        width: int,
        n_examples: int,
        seed: int,
    ):
        self.cache, self.n_examples = cache, n_examples
        self.source = ExampleSource(cache, width=width, seed=seed)
        self.places = Places(self.source, tokenizer)
        self.negatives = NegativeSource(self.source, find_neighbours(cache, latents, sae))
        self.explainer = RuleExplainer(self.places, self.negatives, n_examples)
        self.scorer = RuleScorer(self.places, self.negatives, n_examples)
        self.opener = partial(
            open_work, cache.folder, tokenizer, latents, sae, width=width, n_examples=n_examples, seed=seed
        )

    def prepare(self) -> None:
        """Compute now what every latent needs, so that processes forked afterwards share it."""
        import sklearn.tree  # noqa: F401  # two seconds, once instead of in every process

        self.places.prepare()
        self.negatives.prepare()

    def explain(self, latent: int) -> Explained:
        """Return the best rule and the token lookup of one latent, or why there is none."""
        activity = self.source.activity(latent)
        n = self.source.n_positives(activity)
        counted = (n["train"], n["val"], n["test"])
        if any(n[part] < least for part, least in LEAST_POSITIVES.items()):
            status = "too few activations" if len(activity.position) else "dead"
            nothing = [Explanation(latent, explainer, status, "", "", None) for explainer in (EXPLAINER, LOOKUP)]
            return Explained(latent, counted, nothing)
        return Explained(latent, counted, self.explainer.explain_latent(latent, activity))

    def score(self, task: Task) -> list[tuple[Any, ...]]:
        """Return the score rows of one latent."""
        return self.scorer.score(task.latent, task.own, task.lookup, task.others)


def open_work(folder: Path, *arguments: Any, **settings: Any) -> Work:
    """Return the work on the cache in a folder, ready."""
    work = Work(FeatureCache.open(folder), *arguments, **settings)
    work.prepare()
    return work


def explain_batch(work: Work, latents: list[int]) -> list[Explained]:
    return [work.explain(latent) for latent in latents]


def score_batch(work: Work, tasks: list[Task]) -> list[list[tuple[Any, ...]]]:
    return [work.score(task) for task in tasks]
