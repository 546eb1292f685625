"""The SAE-level table: how well its latents are explained, and what the same numbers are for the controls."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae_italian.autointerp.run import EXPLAINER, LOOKUP
from sae_italian.autointerp.store import Store
from sae_italian.statistics import Estimate, mean_interval, wilson

GOOD = 0.8  # balanced accuracy from which a latent counts as detected


@dataclass(frozen=True)
class AutointerpSummary:
    """Means are over explained latents, with 95 % intervals over latents."""

    n_latents: int
    n_explained: int
    n_too_few: int
    n_dead: int
    detection: Estimate
    fuzzing: Estimate
    share_detected: Estimate  # detection balanced accuracy of 0.8 or more
    shuffled_detection: Estimate
    shuffled_fuzzing: Estimate
    lookup_detection: Estimate
    lookup_share_detected: Estimate
    gain_over_lookup: Estimate  # mean of the paired differences

    def as_dict(self) -> dict[str, Any]:
        return {
            name: getattr(self, name).as_dict() if isinstance(getattr(self, name), Estimate) else value
            for name, value in asdict(self).items()
        }


def summarise(path: Path, identity: dict[str, Any] | None = None) -> AutointerpSummary:
    """Return the summary of a store."""
    with Store(path, identity or {}) as store:
        statuses = [explanation.status for _, explanation in store.explanations(EXPLAINER).values()]

        def accuracy(scorer: str, explainer: str = EXPLAINER, control: str = "") -> dict[int, float]:
            return store.values(explainer=explainer, control=control, scorer=scorer, metric="balanced_accuracy")

        own, lookup = accuracy("detection"), accuracy("detection", LOOKUP)
        return AutointerpSummary(
            n_latents=len(statuses),
            n_explained=statuses.count("ok"),
            n_too_few=statuses.count("too few activations"),
            n_dead=statuses.count("dead"),
            detection=_mean(own),
            fuzzing=_mean(accuracy("fuzzing")),
            share_detected=_share(own),
            shuffled_detection=_mean(accuracy("detection", control="shuffled")),
            shuffled_fuzzing=_mean(accuracy("fuzzing", control="shuffled")),
            lookup_detection=_mean(lookup),
            lookup_share_detected=_share(lookup),
            gain_over_lookup=_mean({latent: own[latent] - lookup[latent] for latent in own if latent in lookup}),
        )


def _mean(values: dict[int, float]) -> Estimate:
    return mean_interval(np.array(list(values.values())))


def _share(values: dict[int, float]) -> Estimate:
    return wilson(sum(value >= GOOD for value in values.values()), len(values))
