"""Intervals: the bootstrap clustered by document, and Wilson's interval for shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Estimate(NamedTuple):
    """A value with its 95 % interval; NaN where there was nothing to measure."""

    value: float
    lo: float
    hi: float

    def as_dict(self) -> dict[str, float | None]:
        """Return value, lo and hi with None for NaN, as JSON wants it."""
        return {name: float(x) if np.isfinite(x) else None for name, x in self._asdict().items()}


NOTHING = Estimate(float("nan"), float("nan"), float("nan"))


def bootstrap(
    sums: Float[np.ndarray, "clusters quantities"],
    statistic: Callable[[Float[np.ndarray, "samples quantities"]], Float[np.ndarray, " samples"]],
    *,
    n_samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return `statistic` of the summed quantities and its percentile interval, resampling clusters (documents).

    The quantities are sums within a cluster, so any ratio of sums is resampled exactly by weighting the rows.
    """
    sums = np.asarray(sums, dtype=np.float64)
    if len(sums) == 0:
        return NOTHING
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(sums.sum(axis=0, keepdims=True))[0])
        rng = np.random.default_rng(seed)
        weights = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=n_samples)
        resampled = statistic(weights @ sums)
    resampled = resampled[np.isfinite(resampled)]
    if len(resampled) == 0:
        return Estimate(value, float("nan"), float("nan"))
    lo, hi = np.quantile(resampled, (0.025, 0.975))
    return Estimate(value, float(lo), float(hi))


def mean_interval(values: Float[np.ndarray, " n"], *, seed: int = 0) -> Estimate:
    """Return the mean of independent values (latents) with its bootstrap interval."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    pairs = np.stack([values, np.ones_like(values)], axis=1)
    return bootstrap(pairs, lambda total: total[:, 0] / total[:, 1], seed=seed)


def wilson(successes: int, n: int) -> Estimate:
    """Return a share and Wilson's 95 % score interval (Wilson 1927)."""
    if n == 0:
        return NOTHING
    z = 1.959964
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    lo = 0.0 if successes == 0 else float(centre - half)  # exact at the ends, where rounding would leave 1e-17
    hi = 1.0 if successes == n else float(centre + half)
    return Estimate(share, lo, hi)
