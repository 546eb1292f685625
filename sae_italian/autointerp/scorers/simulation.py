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
from sae_italian.statistics import NOTHING, Estimate

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
    documents = Documents(docs)
    true, simulated = np.asarray(true, dtype=np.float64), np.asarray(simulated, dtype=np.float64)
    products = (np.ones(len(true)), true, simulated, true * true, simulated * simulated, true * simulated)
    sums = np.stack([documents.sums(docs, product) for product in products], axis=1)
    n, a, s, aa, ss, cross = (documents.weights @ sums).T
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = (aa / n - (a / n) ** 2), (ss / n - (s / n) ** 2)
        scale = np.sqrt(variance[0] * variance[1])
        # differences of rounding size are no variance
        defined = (variance[0] > 1e-9 * aa / n) & (variance[1] > 1e-9 * ss / n)
        values = np.where(defined, (cross / n - a * s / n**2) / scale, 0.0).clip(-1, 1)
    constant = float(not defined[0])
    return {"correlation": estimates(values[None])[0], "constant": Estimate(constant, float("nan"), float("nan"))}
