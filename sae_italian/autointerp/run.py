"""Explain latents and score the explanations, with the controls that give the scores a meaning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from sae_italian.autointerp.explainers.choose import EXPLAINER, LOOKUP, rule_of
from sae_italian.autointerp.judged import judge_latent
from sae_italian.autointerp.protocols import Explainer, Judge, LatentExamples
from sae_italian.autointerp.scorers.by_rule import Judged
from sae_italian.autointerp.shown import latent_examples
from sae_italian.autointerp.store import Explanation, Feature, Store
from sae_italian.autointerp.tokens import token_strings
from sae_italian.autointerp.work import Explained, Task, Work, explain_batch, score_batch
from sae_italian.base.errors import UsageError
from sae_italian.base.storage import fingerprint
from sae_italian.base.units import in_threads, map_units
from sae_italian.cache import FeatureCache

__all__ = ["EXPLAINER", "LOOKUP", "STORE_FILE", "AutointerpConfig", "Run", "run_autointerp", "token_strings"]

STORE_FILE = "autointerp.sqlite"
SHUFFLED = "shuffled"
_BATCH = 16  # latents that are stored together
Item = TypeVar("Item")


@dataclass(frozen=True)
class AutointerpConfig:
    """What decides the explanations and scores."""

    width: int = 32
    """Longest example, in tokens."""
    n_examples: int = 50
    """Positives per latent and part; as many negatives of each source."""
    latents: int | None = None
    """How many live latents, drawn at random; None for all."""
    seed: int = 0


def stored_config(store: Store) -> AutointerpConfig:
    """Return the configuration that a store's explanations were made with, the defaults where it says nothing."""
    known, names = store.notes(), AutointerpConfig.__dataclass_fields__
    return AutointerpConfig(**{name: json.loads(known[name]) for name in names if name in known})


def run_autointerp(
    cache: FeatureCache,
    tokenizer: Any,
    config: AutointerpConfig | None = None,
    *,
    store: Path | None = None,
    sae: Any = None,
    explainers: Sequence[Explainer] = (),
    judges: Sequence[Judge] = (),
    workers: int = 1,
    run_units: Callable[..., Iterator[Any]] | None = None,
) -> Path:
    """Explain and score the latents of a cache with rules and the rule judge; return the store's path.

    `explainers` and `judges` come on top of these: every judge answers for every one of the explainers (for the rules'
    texts when there are none), on the same examples. `sae` gives the decoder neighbours where the cache does not know
    them. The store defaults to `autointerp.sqlite` in the cache. A run that was stopped continues where it was. Latents
    with too few examples in any part are stored as such, never scored. The rules are worked out in `workers` processes here, or
    by `run_units` (`base.units.map_units` with an engine), in batches of latents.

    Raises: UsageError when the tokenizer is not the cache's, or the store belongs to another cache or configuration.
    """
    from sae_italian.cache.layout import tokenizer_hash

    config = config or AutointerpConfig()
    if tokenizer_hash(tokenizer) != cache.manifest.tokenizer_hash:
        raise UsageError(f"{cache.folder} was built with another tokenizer than the one given.")
    store = store or cache.folder / STORE_FILE
    with Store(store, cache_identity(cache) | asdict(config)) as opened:
        run = Run(cache, tokenizer, config, opened, sae=sae, workers=workers, run_units=run_units)
        run.rules()
        for explainer in explainers:
            run.explain_with(explainer)
        for judge in judges:
            for name in [explainer.name for explainer in explainers] or [EXPLAINER]:
                run.score_with(judge, name)
    return store


def cache_identity(cache: FeatureCache) -> dict[str, str]:
    """Return what a store remembers of the cache it belongs to."""
    return {"cache": fingerprint(cache.manifest.model_dump(exclude={"versions", "sae"}))}


class Run:
    """One cache, one configuration, one open store."""

    def __init__(
        self,
        cache: FeatureCache,
        tokenizer: Any,
        config: AutointerpConfig,
        store: Store,
        *,
        sae: Any = None,
        workers: int = 1,
        run_units: Callable[..., Iterator[Any]] | None = None,
    ):
        self.cache, self.config, self.store, self.workers = cache, config, store, workers
        self.run_units = run_units
        self.latents = self._latents()
        self.work = Work(
            cache,
            tokenizer,
            self.latents,
            sae,
            width=config.width,
            n_examples=config.n_examples,
            seed=config.seed,
        )
        self.places, self.negatives = self.work.places, self.work.negatives

    def _latents(self) -> list[int]:
        """Return the latents to explain: all, or a random draw of live ones."""
        if self.config.latents is None:
            return list(range(self.cache.manifest.d_sae))
        live = np.flatnonzero(self.cache.statistics["count"] > 0)
        rng = np.random.default_rng(self.config.seed)
        return sorted(rng.permutation(live)[: self.config.latents].tolist())

    # --- rules -------------------------------------------------------------------------------------------------------

    def rules(self) -> None:
        """Explain every latent by a rule and by token lookup, then score these with the rule judge."""
        done = self.store.explained(EXPLAINER)
        todo = [latent for latent in self.latents if latent not in done]
        if self.run_units is None:
            self.work.prepare()
        for batch in self._map(explain_batch, todo, "explain"):
            self.store.add_explanations(
                [explanation for found in batch for explanation in found.explanations],
                [self._feature(found) for found in batch],
            )
        self._score_rules()

    def _feature(self, found: Explained) -> Feature:
        """Return how often a latent fires, its maximum, and on how many segments of each part it can be seen."""
        statistics = self.cache.statistics
        latent = found.latent
        return Feature(latent, int(statistics["count"][latent]), float(statistics["max"][latent]), *found.n_positives)

    def _score_rules(self) -> None:
        """Score each latent's rule, its token lookup, and as control the rule of another latent."""
        own, lookup = self.store.explanations(EXPLAINER), self.store.explanations(LOOKUP)
        live = [latent for latent, (_, explanation) in own.items() if explanation.status == "ok"]
        stranger = strangers(live, self.config.seed)
        done = self.store.scored(EXPLAINER, "rule")

        def judged(found: tuple[int, Explanation], control: str = "") -> Judged:
            assert found[1].rule is not None
            return Judged(found[0], rule_of(found[1].rule), control)

        todo = []
        for latent in live:
            if latent not in done:
                others = [judged(own[stranger[latent]], SHUFFLED)] if latent in stranger else []
                todo.append(Task(latent, judged(own[latent]), judged(lookup[latent]), others))
        for batch in self._map(score_batch, todo, "score"):
            self.store.add_scores(row for rows in batch for row in rows)

    def _map(self, function: Callable[[Work, list[Any]], Item], items: list[Any], desc: str) -> Iterator[Item]:
        """Yield the function's result for each batch of items, in order, wherever the work is done."""
        units = list(_batches(items))
        if self.run_units is not None:
            results = self.run_units(function, units, setup=self.work.opener)
        else:
            workers = min(self.workers, max(1, len(units)))
            results = map_units(partial(function, self.work), units, workers=workers, fork=True)
        with tqdm(total=len(items), desc=desc, unit="latent", disable=None) as bar:
            for unit, result in zip(units, results, strict=True):
                bar.update(len(unit))
                yield result

    # --- explainers and judges that are handed in ----------------------------------------------------------------------

    def shown(self, latent: int) -> LatentExamples:
        """Return what others than the rules are shown of a latent."""
        ids = np.asarray(self.cache.statistics["promoted_ids"][latent])
        strings = self.places.strings
        promoted = tuple(strings[token].strip() for token in ids.tolist() if token < len(strings))
        return latent_examples(self.negatives, latent, n_test=self.config.n_examples, promoted=promoted)

    def explain_with(self, explainer: Explainer) -> None:
        """Explain with another explainer the latents that have a rule; the others keep their status under its name."""
        self._claim(explainer)
        rules, done = self.store.explanations(EXPLAINER), self.store.explained(explainer.name)
        left = {latent: explanation for latent, (_, explanation) in rules.items() if latent not in done}
        unexplained = [e._replace(explainer=explainer.name) for e in left.values() if e.status != "ok"]
        self.store.add_explanations(unexplained)
        todo = [latent for latent, explanation in left.items() if explanation.status == "ok"]
        shown = (self.shown(latent) for latent in todo)
        found = in_threads(explainer.explain, shown, explainer.concurrency)
        for explanations in tqdm(found, total=len(todo), desc=explainer.name, unit="latent", disable=None):
            self.store.add_explanations(explanations)

    def _claim(self, who: Explainer | Judge) -> None:
        """Hold an explainer or judge to the settings (prompts, examples) that its earlier work here had."""
        settings = getattr(who, "settings", None)
        if settings is not None:
            self.store.claim(f"{type(who).__name__} {who.name}", settings)

    def score_with(self, judge: Judge, name: str) -> None:
        """Let a judge score one explainer's explanations, and as control each on another latent's examples."""
        self._claim(judge)
        own, lookup = self.store.explanations(name), self.store.explanations(LOOKUP)
        live = [latent for latent, (_, explanation) in own.items() if explanation.status == "ok"]
        stranger = strangers(live, self.config.seed)
        done = self.store.scored(name, judge.name)
        todo = [latent for latent in live if latent not in done]

        def score(shown: LatentExamples):
            other = own.get(stranger.get(shown.latent, -1))
            return judge_latent(judge, self.places, shown, own[shown.latent], lookup[shown.latent], other)

        shown = (self.shown(latent) for latent in todo)
        found = in_threads(score, shown, judge.concurrency)
        for rows, judgements in tqdm(found, total=len(todo), desc=judge.name, unit="latent", disable=None):
            self.store.add_scores(rows, judgements)


def strangers(latents: Sequence[int], seed: int) -> dict[int, int]:
    """Return for each latent another one, at random and each once; nobody keeps its own. {} for fewer than two."""
    if len(latents) < 2:
        return {}
    shuffled = np.random.default_rng(seed).permutation(np.asarray(latents)).tolist()
    return dict(zip(shuffled, shuffled[1:] + shuffled[:1], strict=True))


def _batches(items: Iterable[Item], n: int = _BATCH) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == n:
            yield batch
            batch = []
    if batch:
        yield batch
