"""The SAE-level table: how well its latents are explained, and what the same numbers are for the controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae_italian.autointerp.protocols import FUZZING_NEGATIVES, SEGMENT_NEGATIVES
from sae_italian.autointerp.run import EXPLAINER, LOOKUP, SHUFFLED
from sae_italian.autointerp.scorers.by_rule import GAIN
from sae_italian.autointerp.scorers.simulation import RANDOM, TOP
from sae_italian.autointerp.store import Store
from sae_italian.base.statistics import Estimate, mean_interval, wilson

GOOD = 0.8  # balanced accuracy from which a latent counts as detected
HEADLINE = {"detection": "random", "fuzzing": "silent-token"}  # the negatives behind a score named without any
ENOUGH = 300  # latents from which a summary may stand for an SAE


@dataclass(frozen=True)
class AutointerpSummary:
    """One explainer's explanations under one judge. Means are over explained latents, with 95 % intervals over latents.

    Numbers named without a negative source are those with random negatives (detection) and with the silent tokens of the
    same segments (fuzzing).
    """

    explainer: str
    judge: str
    n_latents: int
    n_explained: int
    n_too_few: int
    n_dead: int
    detection: Estimate
    fuzzing: Estimate
    simulation: Estimate  # correlation, strongest and random segments
    simulation_random: Estimate  # random segments alone
    share_detected: Estimate  # detection balanced accuracy of 0.8 or more
    shuffled_detection: Estimate
    shuffled_fuzzing: Estimate
    shuffled_simulation: Estimate
    lookup_detection: Estimate  # the lookup is a rule and is always judged as one
    lookup_fuzzing: Estimate
    lookup_simulation: Estimate
    lookup_share_detected: Estimate
    gain_over_lookup: Estimate  # mean of the paired differences
    only_token: Estimate  # share of latents that the lookup detects and that the explanation explains no better
    always_yes: Estimate
    always_no: Estimate
    by_negatives: dict[str, dict[str, Estimate]]  # scorer -> negatives -> mean balanced accuracy
    gains: dict[str, dict[str, Estimate]]  # scorer -> negatives -> mean gain over the lookup
    by_decile: list[Estimate]  # mean share of positives found, weakest tenth first
    enough: bool  # at least 300 latents were drawn at random, or all there are

    def as_dict(self) -> dict[str, Any]:
        return _plain({name: getattr(self, name) for name in self.__dataclass_fields__})


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def summarise(
    path: Path, identity: dict[str, Any] | None = None, *, explainer: str = EXPLAINER, judge: str = "rule"
) -> AutointerpSummary:
    """Return the summary of a store for one explainer and judge, the rules and the rule judge by default."""
    with Store(path, identity or {}) as store:
        statuses = [explanation.status for _, explanation in store.explanations(explainer).values()]

        def values(
            scorer: str,
            metric: str = "balanced_accuracy",
            *,
            who: str = explainer,
            control: str = "",
            by: str = judge,
            negatives: str | None = None,
        ) -> dict[int, float]:
            return store.values(
                explainer=who,
                control=control,
                scorer=scorer,
                metric=metric,
                judge=by,
                negatives=negatives or HEADLINE.get(scorer, TOP),
            )

        def lookup(scorer: str, metric: str = "balanced_accuracy") -> dict[int, float]:
            return values(scorer, metric, who=LOOKUP, by="rule")

        own = values("detection")
        return AutointerpSummary(
            explainer=explainer,
            judge=judge,
            n_latents=len(statuses),
            n_explained=statuses.count("ok"),
            n_too_few=statuses.count("too few activations"),
            n_dead=statuses.count("dead"),
            detection=_mean(own),
            fuzzing=_mean(values("fuzzing")),
            simulation=_mean(values("simulation", "correlation")),
            simulation_random=_mean(values("simulation", "correlation", negatives=RANDOM)),
            share_detected=_share(own, lambda value: value >= GOOD),
            shuffled_detection=_mean(values("detection", control=SHUFFLED)),
            shuffled_fuzzing=_mean(values("fuzzing", control=SHUFFLED)),
            shuffled_simulation=_mean(values("simulation", "correlation", control=SHUFFLED)),
            lookup_detection=_mean(lookup("detection")),
            lookup_fuzzing=_mean(lookup("fuzzing")),
            lookup_simulation=_mean(lookup("simulation", "correlation")),
            lookup_share_detected=_share(lookup("detection"), lambda value: value >= GOOD),
            gain_over_lookup=_mean(values("detection", GAIN)),
            only_token=_only_token(store, own, lookup("detection"), explainer, judge),
            always_yes=_mean(values("detection", by="always-yes", who=EXPLAINER)),
            always_no=_mean(values("detection", by="always-no", who=EXPLAINER)),
            by_negatives=_by_negatives(lambda scorer, negatives: values(scorer, negatives=negatives)),
            gains=_by_negatives(lambda scorer, negatives: values(scorer, GAIN, negatives=negatives)),
            by_decile=[_mean(values("detection", f"tpr_decile_{tenth}")) for tenth in range(10)],
            enough=len(statuses) >= ENOUGH or not _drawn(store),
        )


def _by_negatives(values: Callable[[str, str], dict[int, float]]) -> dict[str, dict[str, Estimate]]:
    sources = (("detection", SEGMENT_NEGATIVES), ("fuzzing", FUZZING_NEGATIVES))
    found = {scorer: {name: values(scorer, name) for name in names} for scorer, names in sources}
    return {scorer: {name: _mean(rows) for name, rows in by.items() if rows} for scorer, by in found.items()}


def _only_token(store: Store, own: dict[int, float], lookup: dict[int, float], explainer: str, judge: str) -> Estimate:
    """A latent is only a token when the lookup detects it and the interval of the explanation's gain reaches 0."""
    lows = store.connection.execute(
        """SELECT score.latent, score.lo, score.value FROM score JOIN explanation ON explanation.id = score.explanation_id
           WHERE explainer = ? AND judge = ? AND control = '' AND scorer = 'detection' AND negatives = 'random'
             AND metric = ?""",
        (explainer, judge, GAIN),
    )
    better = {latent for latent, lo, value in lows if (value if lo is None else lo) > 0}
    return _share(
        {latent: lookup[latent] if latent not in better else 0.0 for latent in own if latent in lookup},
        lambda value: value >= GOOD,
    )


def _drawn(store: Store) -> bool:
    """True when the store holds a draw of the latents, not all of them."""
    return dict(store.connection.execute("SELECT key, value FROM run")).get("latents", "null") != "null"


def _mean(values: dict[int, float]) -> Estimate:
    return mean_interval(np.array(list(values.values())))


def _share(values: dict[int, float], good: Callable[[float], bool]) -> Estimate:
    return wilson(sum(good(value) for value in values.values()), len(values))
