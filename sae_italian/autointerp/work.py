"""Explaining and scoring one latent by rule: all that needs a cache and no store, so that it can be done anywhere.

A unit of work is a batch of latents; who does it elsewhere than in this process opens the cache there with `open_work`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_italian.autointerp.draws import ExampleSource, find_neighbours
from sae_italian.autointerp.examples import LatentExamples, latent_examples, promoted_tokens
from sae_italian.autointerp.explainers.choose import EXPLAINER, LOOKUP, RuleExplainer
from sae_italian.autointerp.judges import ConstantJudge, RuleJudge
from sae_italian.autointerp.places import Places
from sae_italian.autointerp.scorers import Asked, Row, score_rows
from sae_italian.autointerp.scorers.binary import HEADLINE
from sae_italian.autointerp.store import Explanation, Feature
from sae_italian.base.errors import UsageError
from sae_italian.cache import FeatureCache
from sae_italian.cache.layout import tokenizer_hash
from sae_italian.cache.passages import LatentActivations
from sae_italian.models import load_tokenizer

SHUFFLED = "shuffled"  # the control of another latent's explanation
WHOLE = "whole rule"  # the rule as it was fitted, of which the explanation displays a part
LEAST_POSITIVES = (10, 5, 10)  # segments of train, val and test

Known = tuple[int, Explanation]  # an explanation with its id in the store


@dataclass(frozen=True)
class AutointerpConfig:
    """What decides the explanations and scores."""

    width: int = 32
    """Longest example, in tokens."""
    n_examples: int = 50
    """Positives per latent and part of the documents; as many negatives of each source."""
    latents: int | None = None
    """How many live latents, drawn at random; default: all, the dead ones among them."""
    seed: int = 0
    """Seed of every random draw."""


class Explained(NamedTuple):
    """One latent's explanations, and how much there was to see of it."""

    feature: Feature
    explanations: list[Explanation]


class Work:
    """Examples, rules and their scores of one cache's latents: all that needs no store, so that it can be done anywhere."""

    def __init__(self, cache: FeatureCache, tokenizer: Any, config: AutointerpConfig, sae: Any = None):
        """Raises: UsageError when the tokenizer is not the one that the cache was built with."""
        if tokenizer_hash(tokenizer) != cache.manifest.tokenizer_hash:
            raise UsageError(f"{cache.folder} was built with another tokenizer than the one given.")
        self.cache, self.config = cache, config
        self.latents = list(range(cache.manifest.d_sae))
        if config.latents is not None:
            live = np.flatnonzero(cache.statistics["count"] > 0)
            self.latents = sorted(np.random.default_rng(config.seed).permutation(live)[: config.latents].tolist())
        neighbours = find_neighbours(cache, self.latents, sae)
        self.source = ExampleSource(cache, neighbours, width=config.width, seed=config.seed)
        self.places = Places(self.source, tokenizer)
        self.explainer, self.judge = RuleExplainer(self.places, config.n_examples), RuleJudge(self.places)
        self.opener = partial(open_work, cache.folder, tokenizer, config, sae)

    def prepare(self) -> None:
        """Compute now what every latent needs, so that processes forked afterwards share it."""
        import sklearn.tree  # noqa: F401  # two seconds, once instead of in every process

        self.places.prepare()
        self.source.prepare()

    def explain(self, latent: int) -> Explained:
        """Return the best rule and the token lookup of one latent, or why there is none."""
        activity, statistics = self.source.activity(latent), self.cache.statistics
        n = self.source.n_positives(activity)
        feature = Feature(latent, int(statistics["count"][latent]), float(statistics["max"][latent]), *n)
        if any(found < least for found, least in zip(n, LEAST_POSITIVES, strict=True)):
            status = "too few activations" if len(activity.position) else "dead"
            return Explained(feature, [Explanation(latent, name, status, "", "", None) for name in (EXPLAINER, LOOKUP)])
        return Explained(feature, self.explainer.explain_activity(activity))

    def score(self, own: Known, lookup: Known, stranger: Known | None = None) -> list[Row]:
        """Return the score rows of a latent's rule, its token lookup, the whole rule, and another latent's as control."""
        asked = [Asked(self.judge, known[1], row_id=known[0]) for known in (own, lookup)]
        asked.append(Asked(RuleJudge(self.places, whole=True), own[1], WHOLE, own[0]))
        if stranger is not None:
            asked.append(Asked(self.judge, stranger[1], SHUFFLED, stranger[0]))
        always = [Asked(ConstantJudge(answer), own[1], row_id=own[0], only=HEADLINE) for answer in (True, False)]
        return score_rows([*asked, *always], self.examples(own[1].latent, n_train=0))

    def examples(self, latent: int, **settings: Any) -> LatentExamples:
        """Return what is shown of a latent; `settings` are those of `latent_examples`."""
        return latent_examples(self.source, latent, **{"n_test": self.config.n_examples, **settings})

    def promoted(self, latent: int) -> tuple[str, ...]:
        """Return the tokens whose logits a latent raises most, those that the cache's text never has left out."""
        return promoted_tokens(self.cache, self.places.strings, latent)


@lru_cache(maxsize=1)
def _work_on(cache: FeatureCache) -> Work:
    """Return the work on a cache, kept: to open it takes seconds."""
    return Work(cache, load_tokenizer(cache.manifest.model), AutointerpConfig())


def explain_latent(latent: LatentActivations) -> Explanation:
    """Return the rule of one latent, made now and stored nowhere; its `status` says why where there is none."""
    return _work_on(latent.cache).explain(latent.latent).explanations[0]


def open_work(folder: Path, *arguments: Any) -> Work:
    """Return the work on the cache in a folder, ready."""
    work = Work(FeatureCache.open(folder), *arguments)
    work.prepare()
    return work


def explain_batch(work: Work, latents: list[int]) -> list[Explained]:
    """Explain a batch of latents: a unit of work."""
    return [work.explain(latent) for latent in latents]


def score_batch(work: Work, known: list[tuple[Known, Known, Known | None]]) -> list[list[Row]]:
    """Score a batch of latents' own rules, lookups and strangers: a unit of work."""
    return [work.score(*each) for each in known]
