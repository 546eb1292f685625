"""Explain latents and score the explanations, with the controls that give the scores a meaning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sae_italian.autointerp.examples import Activity, Examples, ExampleSource
from sae_italian.autointerp.rules import FAMILIES, Family, KeyTable, Rule, describe, fit
from sae_italian.autointerp.scorers import Score, best_threshold, detection, fuzzing
from sae_italian.autointerp.store import Explanation, Store
from sae_italian.cache import FeatureCache
from sae_italian.errors import UsageError
from sae_italian.storage import fingerprint

EXPLAINER, LOOKUP = "token-statistics", "token-lookup"
WORTH = 0.02  # balanced accuracy on the validation examples that each step from token to previous to bigram must bring
LEAST_POSITIVES = {"train": 10, "val": 5, "test": 10}
STORE_FILE = "autointerp.sqlite"


@dataclass(frozen=True)
class AutointerpConfig:
    """What decides the explanations and scores."""

    width: int = 32
    """Longest example, in tokens."""
    n_examples: int = 50
    """Positives per latent and part; as many negatives."""
    latents: int | None = None
    """How many live latents, drawn at random; None for all."""
    seed: int = 0


def run_autointerp(
    cache: FeatureCache, tokenizer: Any, config: AutointerpConfig | None = None, *, store: Path | None = None
) -> Path:
    """Explain and score the latents of a cache with the rule explainer and the rule judge; return the store's path.

    The store defaults to `autointerp.sqlite` in the cache. A run that was stopped continues where it was. Latents with
    too few examples in any part are stored as such, never scored.

    Raises: UsageError when the tokenizer is not the cache's, or the store belongs to another cache or configuration.
    """
    from sae_italian.cache.build import tokenizer_hash

    config = config or AutointerpConfig()
    if tokenizer_hash(tokenizer) != cache.manifest.tokenizer_hash:
        raise UsageError(f"{cache.folder} was built with another tokenizer than the one given.")
    store = store or cache.folder / STORE_FILE
    identity = {"cache": fingerprint(cache.manifest.model_dump(exclude={"versions", "sae"})), **asdict(config)}
    with Store(store, identity) as opened:
        _Run(cache, tokenizer, config, opened).everything()
    return store


class _Run:
    def __init__(self, cache: FeatureCache, tokenizer: Any, config: AutointerpConfig, store: Store):
        self.cache, self.config, self.store = cache, config, store
        self.source = ExampleSource(cache, width=config.width, seed=config.seed)
        self.table = KeyTable(self.source)
        self.strings = token_strings(tokenizer, self.table.vocab)
        self.describe = partial(describe, vocab=self.table.vocab, strings=self.strings)

    def latents(self) -> list[int]:
        """Return the latents to explain: all, or a random draw of live ones."""
        if self.config.latents is None:
            return list(range(self.cache.manifest.d_sae))
        live = np.flatnonzero(self.cache.statistics["count"] > 0)
        rng = np.random.default_rng(self.config.seed)
        return sorted(rng.permutation(live)[: self.config.latents].tolist())

    def everything(self) -> None:
        done = self.store.explained()
        todo = [latent for latent in self.latents() if latent not in done]
        for latent in tqdm(todo, desc="explain", unit="latent", disable=None):
            self.store.add_explanations(self.explain(latent))
        self.score_all()

    # --- explaining --------------------------------------------------------------------------------------------------

    def explain(self, latent: int) -> list[Explanation]:
        """Return the best rule and the token lookup of one latent, or why there is none."""
        activity = self.source.activity(latent)
        n = self.config.n_examples
        parts = {part: self.source.draw(latent, activity, part, n) for part in ("train", "val", "test")}
        if any(len(parts[part].positive) < least for part, least in LEAST_POSITIVES.items()):
            status = "too few activations" if len(activity.position) else "dead"
            return [Explanation(latent, explainer, status, "", "", None) for explainer in (EXPLAINER, LOOKUP)]
        fitted = {family: self.tuned(activity, parts["val"], family) for family in FAMILIES}
        # a family further down the list must be worth its complexity
        best = max(FAMILIES, key=lambda family: fitted[family][1] - WORTH * FAMILIES.index(family))
        return [
            self.explanation(latent, EXPLAINER, fitted[best][0]),
            self.explanation(latent, LOOKUP, fitted["token"][0]),
        ]

    def tuned(self, activity: Activity, val: Examples, family: Family) -> tuple[Rule, float]:
        """Return the family's rule with its threshold chosen on the validation examples, and its accuracy there."""
        rule = fit(self.source, self.table, activity, family)
        strengths = [
            self.table.predict(rule, self.source.grid(segments)).max(axis=1, initial=0.0)
            for segments in (val.positive, val.negative)
        ]
        threshold, accuracy = best_threshold(*strengths)
        return replace(rule, threshold=threshold), accuracy

    def explanation(self, latent: int, explainer: str, rule: Rule) -> Explanation:
        texts = self.describe(rule, language="it"), self.describe(rule, language="en")
        return Explanation(latent, explainer, "ok", *texts, rule.as_dict())

    # --- scoring -----------------------------------------------------------------------------------------------------

    def score_all(self) -> None:
        """Score every explanation on its own latent, and a shuffled one as control: each latent's, given to another."""
        own, lookup = self.store.explanations(EXPLAINER), self.store.explanations(LOOKUP)
        live = [latent for latent, (_, explanation) in own.items() if explanation.status == "ok"]
        shuffled = np.random.default_rng(self.config.seed).permutation(live).tolist()
        stranger = dict(zip(shuffled, shuffled[1:] + shuffled[:1], strict=True))  # a cycle: nobody keeps its own
        done = self.store.scored()
        for latent in tqdm(
            [latent for latent in live if latent not in done], desc="score", unit="latent", disable=None
        ):
            activity = self.source.activity(latent)
            examples = self.source.draw(latent, activity, "test", self.config.n_examples)
            rows: list[tuple[Any, ...]] = []
            pairs = [(own[latent], ""), (lookup[latent], "")]
            if len(live) > 1:
                pairs.append((own[stranger[latent]], "shuffled"))
            for (row_id, explanation), control in pairs:
                assert explanation.rule is not None
                rule = Rule.from_dict(explanation.rule)
                scores = [detection(self.source, self.table, rule, examples)]
                scores.append(fuzzing(self.source, self.table, rule, activity, examples.positive, latent))
                rows += _rows(row_id, latent, control, scores)
            self.store.add_scores(rows)


def _rows(row_id: int, latent: int, control: str, scores: list[Score]) -> Iterator[tuple[Any, ...]]:
    for score in scores:
        for metric, estimate in score.metrics.items():
            numbers = estimate.as_dict()
            where = (row_id, latent, control, score.scorer, "rule", score.negatives, metric)
            yield (*where, numbers["value"], numbers["lo"], numbers["hi"], score.n_positive, score.n_negative)


def token_strings(tokenizer: Any, n: int) -> list[str]:
    """Return the text of each of the first n token ids, a leading space kept; bytes that are no text show as <0x..>."""
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    metaspace = state["model"].get("byte_fallback", False) or "▁" in str(state.get("pre_tokenizer")) + str(
        state.get("normalizer")
    )
    if metaspace:
        return [(backend.id_to_token(i) or f"<{i}>").replace("▁", " ") for i in range(n)]
    return [tokenizer.decode([i]).replace("\ufffd", "·") for i in range(n)]  # byte-level: half a letter shows as a dot
