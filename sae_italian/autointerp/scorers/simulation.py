"""Simulation: how well do the activations expected from an explanation follow the true ones?

Pearson's correlation over the concatenated tokens of all segments (Bills et al. 2023). As in Cunningham et al. 2023
there are two draws: the strongest segments with as many random ones, and the random ones alone; random means at random
among the segments on which the latent is active. A constant simulation correlates with nothing: 0, and counted.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sae_italian.autointerp.examples import LatentExamples, Verdicts
from sae_italian.autointerp.scorers import Asked, Score, scorer
from sae_italian.autointerp.scorers.binary import Fall, falls_of, left_out
from sae_italian.autointerp.store import UNANSWERED
from sae_italian.base.statistics import NOTHING, Estimate, correlations_by_document

TOP, RANDOM = "top-and-random", "random-only"


@scorer(needs="simulate", metric="correlation")
def simulation(asked: Sequence[Asked], examples: LatentExamples) -> Iterator[tuple[Asked, Score]]:
    """Score both draws."""
    shown: Any = examples.simulation
    simulated = [(one, one.judge.simulate(one.explanation, shown)) for one in asked]
    for one, own in simulated:
        lost = [example for example, values in zip(shown, own, strict=True) if isinstance(values, int)]
        one.answers["simulation"] = lost, Verdicts(np.full(len(lost), UNANSWERED))  # so that a rerun knows
    for draw in (TOP, RANDOM):
        mine = [i for i in range(len(shown)) if draw == TOP or shown.decile[i] >= 0]
        for one, own in simulated:
            metrics, falls = {"correlation": NOTHING, "constant": NOTHING}, ()
            if usable := [i for i in mine if np.ndim(own[i])]:
                true, said = (np.concatenate([each[i] for i in usable]) for each in (shown.activations, own))
                metrics, falls = correlated(
                    true, said, np.repeat(shown.document[usable], [len(own[i]) for i in usable])
                )
            yield one, Score(draw, metrics, len(usable), 0, len(mine) - len(usable), {"correlation": falls})


def correlated(
    true: Float[np.ndarray, " tokens"],
    simulated: Float[np.ndarray, " tokens"],
    docs: Int[np.ndarray, " tokens"],
) -> tuple[dict[str, Estimate], Fall]:
    """Return `correlation` with its interval over documents, and its falls without a group of these.

    `constant` is 1 where the correlation is undefined and taken as 0, without an interval. A fall is NaN where a group has
    no document.
    """
    documents, index = np.unique(docs, return_inverse=True)
    a, s = (np.asarray(values, dtype=np.float64) for values in (true, simulated))
    sums = np.stack([np.bincount(index, values) for values in (np.ones(len(a)), a, s, a * a, s * s, a * s)])
    whole = sums.sum(axis=1, keepdims=True)
    n, a, s, aa, ss, cross = np.concatenate([whole, whole - sums, sums @ left_out(documents).T], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = aa / n - (a / n) ** 2, ss / n - (s / n) ** 2
        # differences of rounding size are no variance
        defined = (variance[0] > 1e-9 * aa / n) & (variance[1] > 1e-9 * ss / n)
        r = (cross / n - a * s / n**2) / np.sqrt(variance[0] * variance[1])
    r = np.where(defined, r, 0.0).clip(-1, 1)
    own, left = np.split(r, [1 + len(documents)])  # each: all, then without a document, or without a group
    found = Estimate(*correlations_by_document(own[None])[:, 0].tolist())
    metrics = {
        "correlation": found if defined[0] else NOTHING._replace(value=0.0),
        "constant": NOTHING._replace(value=float(not defined[0])),
    }
    return metrics, falls_of(left, n[len(own) :])
