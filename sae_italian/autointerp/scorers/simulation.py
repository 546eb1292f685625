"""Simulation: how well do the activations expected from an explanation follow the true ones?

Pearson's correlation over the concatenated tokens of all segments (Bills et al. 2023). As in Cunningham et al. 2023
there are two draws: the strongest segments with as many random ones, and the random ones alone; random means at random
among the segments on which the latent is active. A constant simulation correlates with nothing: 0, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from sae_italian.autointerp.protocols import Example, Score
from sae_italian.autointerp.scorers.resample import Documents, estimates
from sae_italian.base.statistics import NOTHING, Estimate

TOP, RANDOM = "top-and-random", "random-only"


def simulation(simulated: Sequence[Float[np.ndarray, " tokens"] | None], examples: Sequence[Example]) -> list[Score]:
    """Score both draws. `examples` are the strongest segments (decile -1), then as many random ones."""
    docs = np.unique([example.document for example in examples], return_inverse=True)[1]
    scores = []
    for draw in (TOP, RANDOM):
        mine = [i for i, example in enumerate(examples) if draw == TOP or example.decile >= 0]
        usable = [i for i in mine if simulated[i] is not None]
        lengths = [len(examples[i].activations) for i in usable]
        metrics = {"correlation": NOTHING, "constant": NOTHING}
        if usable:
            metrics = correlation(
                np.concatenate([examples[i].activations for i in usable]),
                np.concatenate([np.asarray(simulated[i]) for i in usable]),
                np.repeat(docs[usable], lengths),
            )
        scores.append(Score("simulation", draw, metrics, len(usable), 0, len(mine) - len(usable)))
    return scores


def correlation(
    true: Float[np.ndarray, " tokens"], simulated: Float[np.ndarray, " tokens"], docs: Int[np.ndarray, " tokens"]
) -> dict[str, Estimate]:
    """Return `correlation` with its interval over documents, and `constant`: 1 where it is undefined and taken as 0."""
    return correlations(true, np.asarray(simulated)[None], docs)[0]


def correlations(
    true: Float[np.ndarray, " tokens"],
    simulated: Float[np.ndarray, "simulations tokens"],
    docs: Int[np.ndarray, " tokens"],
) -> list[dict[str, Estimate]]:
    """Return for each of several simulations of the same tokens what `correlation` does; all are resampled together."""
    documents = Documents(docs)
    true, simulated = np.asarray(true, dtype=np.float64), np.asarray(simulated, dtype=np.float64)
    ours = np.stack([np.ones(len(true)), true, true * true])
    theirs = np.concatenate([simulated, simulated * simulated, simulated * true])
    sums = documents.all_sums(docs, np.concatenate([ours, theirs])) @ documents.weights.T
    n, a, aa = sums[:3, None]
    s, ss, cross = sums[3:].reshape(3, len(simulated), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = (aa / n - (a / n) ** 2), (ss / n - (s / n) ** 2)
        scale = np.sqrt(variance[0] * variance[1])
        # differences of rounding size are no variance
        defined = (variance[0] > 1e-9 * aa / n) & (variance[1] > 1e-9 * ss / n)
        values = np.where(defined, (cross / n - a * s / n**2) / scale, 0.0).clip(-1, 1)
    nan = float("nan")
    return [
        {"correlation": estimate, "constant": Estimate(float(not known), nan, nan)}
        for estimate, known in zip(estimates(values), defined[:, 0].tolist(), strict=True)
    ]
