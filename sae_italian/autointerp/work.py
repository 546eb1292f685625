"""Explaining and scoring one latent by rule: all that needs a cache and no store, so that it can be done anywhere.

A unit of work is a batch of latents; who does it elsewhere than in this process opens the cache there with `open_work`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.autointerp.examples import ExampleSource
from sae_italian.autointerp.explainers.choose import EXPLAINER, LOOKUP, RuleExplainer
from sae_italian.autointerp.judges import ConstantJudge, RuleJudge
from sae_italian.autointerp.negatives import NegativeSource, find_neighbours
from sae_italian.autointerp.places import Places
from sae_italian.autointerp.protocols import LatentExamples
from sae_italian.autointerp.scorers import Asked, Row, score_rows
from sae_italian.autointerp.scorers.binary import HEADLINE
from sae_italian.autointerp.shown import latent_examples, promoted_tokens
from sae_italian.autointerp.store import Explanation
from sae_italian.cache import FeatureCache
from sae_italian.cache.read import Part

SHUFFLED = "shuffled"  # the control of another latent's explanation
LEAST_POSITIVES: dict[Part, int] = {"train": 10, "val": 5, "test": 10}  # segments

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
    """One latent's explanations, and on how many segments of each part it can be seen at work."""

    latent: int
    n_positives: tuple[int, ...]
    explanations: list[Explanation]


class Work:
    """Examples, rules and their scores of one cache's latents: all that needs no store, so that it can be done anywhere."""

    def __init__(
        self, cache: FeatureCache, tokenizer: Any, config: AutointerpConfig, latents: Sequence[int], sae: Any = None
    ):
        self.cache, self.config = cache, config
        self.source = ExampleSource(cache, width=config.width, seed=config.seed)
        self.places = Places(self.source, tokenizer)
        self.negatives = NegativeSource(self.source, find_neighbours(cache, latents, sae))
        self.explainer = RuleExplainer(self.places, self.negatives, config.n_examples)
        self.judge = RuleJudge(self.places)
        self.opener = partial(open_work, cache.folder, tokenizer, config, latents, sae)

    def prepare(self) -> None:
        """Compute now what every latent needs, so that processes forked afterwards share it."""
        import sklearn.tree  # noqa: F401  # two seconds, once instead of in every process

        self.places.prepare()
        self.negatives.prepare()

    def explain(self, latent: int) -> Explained:
        """Return the best rule and the token lookup of one latent, or why there is none."""
        activity = self.source.activity(latent)
        n = self.source.n_positives(activity)
        counted = tuple(n[part] for part in LEAST_POSITIVES)
        if any(n[part] < least for part, least in LEAST_POSITIVES.items()):
            status = "too few activations" if len(activity.position) else "dead"
            nothing = [Explanation(latent, explainer, status, "", "", None) for explainer in (EXPLAINER, LOOKUP)]
            return Explained(latent, counted, nothing)
        return Explained(latent, counted, self.explainer.explain_latent(latent, activity))

    def score(self, own: Known, lookup: Known, stranger: Known | None = None) -> list[Row]:
        """Return the score rows of a latent's rule, of its token lookup, and of another latent's rule as control."""
        asked = [Asked(self.judge, known[1], row_id=known[0]) for known in (own, lookup)]
        if stranger is not None:
            asked.append(Asked(self.judge, stranger[1], SHUFFLED, stranger[0]))
        always = [Asked(ConstantJudge(answer), own[1], row_id=own[0], only=HEADLINE) for answer in (True, False)]
        return score_rows([*asked, *always], self.examples(own[1].latent, n_train=0))

    def examples(self, latent: int, **settings: Any) -> LatentExamples:
        """Return what is shown of a latent; `settings` are those of `latent_examples`."""
        known: dict[str, Any] = {"n_test": self.config.n_examples}
        return latent_examples(self.negatives, latent, **known | settings)

    def promoted(self, latent: int) -> tuple[str, ...]:
        """Return the tokens whose logits a latent raises most, those that the cache's text never has left out."""
        return promoted_tokens(self.cache, self.places.strings, latent)


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
