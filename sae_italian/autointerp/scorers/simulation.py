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
    """Score both draws; simulations of the same tokens are told together."""
    shown: Any = examples.simulation
    simulated = [one.judge.simulate(one.explanation, shown) for one in asked]
    for one, own in zip(asked, simulated, strict=True):
        lost = [example for example, values in zip(shown, own, strict=True) if isinstance(values, int)]
        one.answers["simulation"] = lost, Verdicts(np.full(len(lost), UNANSWERED))  # so that a rerun knows
    for draw in (TOP, RANDOM):
        mine = [i for i in range(len(shown)) if draw == TOP or shown.decile[i] >= 0]
        by_usable: dict[tuple[int, ...], list[int]] = {}  # nearly always all of them
        for number, own in enumerate(simulated):
            by_usable.setdefault(tuple(i for i in mine if np.ndim(own[i])), []).append(number)
        for usable, numbers in by_usable.items():
            found: list[Any] = [({"correlation": NOTHING, "constant": NOTHING}, ())] * len(numbers)
            if usable:
                true = [shown.activations[i] for i in usable]
                docs = np.repeat(shown.document[list(usable)], [len(each) for each in true])
                theirs = [np.concatenate([simulated[number][i] for i in usable]) for number in numbers]
                found = correlations(np.concatenate(true), np.stack(theirs), docs)
            for number, (metrics, falls) in zip(numbers, found, strict=True):
                n = len(usable), 0, len(mine) - len(usable)
                yield asked[number], Score(draw, metrics, *n, falls={"correlation": falls})


def correlations(
    true: Float[np.ndarray, " tokens"],
    simulated: Float[np.ndarray, "simulations tokens"],
    docs: Int[np.ndarray, " tokens"],
) -> list[tuple[dict[str, Estimate], Fall]]:
    """Return of each of several simulations of the same tokens `correlation` with its interval over documents, and its falls.

    `constant` is 1 where the correlation is undefined and taken as 0, without an interval. A fall is that without a group
    of documents, NaN where a group has none.
    """
    documents, index = np.unique(docs, return_inverse=True)
    true, simulated = np.asarray(true, dtype=np.float64), np.asarray(simulated, dtype=np.float64)
    ours = np.stack([np.ones(len(true)), true, true * true])
    theirs = np.concatenate([simulated, simulated * simulated, simulated * true])
    sums = np.stack([np.bincount(index, values) for values in np.concatenate([ours, theirs])])
    whole = sums.sum(axis=1, keepdims=True)
    sums = np.concatenate([whole, whole - sums, sums @ left_out(documents).T], axis=1)
    n, a, aa = sums[:3, None]
    s, ss, cross = sums[3:].reshape(3, len(simulated), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = (aa / n - (a / n) ** 2), (ss / n - (s / n) ** 2)
        scale = np.sqrt(variance[0] * variance[1])
        # differences of rounding size are no variance
        defined = (variance[0] > 1e-9 * aa / n) & (variance[1] > 1e-9 * ss / n)
        values = np.where(defined, (cross / n - a * s / n**2) / scale, 0.0).clip(-1, 1)
    n = 1 + len(documents)
    falls, found = falls_of(values[:, n:], sums[0, n:]), correlations_by_document(values[:, :n])
    found[1:, ~defined[:, 0]] = np.nan
    return [
        ({"correlation": Estimate(*each), "constant": NOTHING._replace(value=float(not known))}, own)
        for each, known, own in zip(found.T.tolist(), defined[:, 0], falls, strict=True)
    ]
