"""Decoder directions: how close they lie within one SAE and between two, against directions drawn at random, and a map.

Llama Scope shows the distribution of best matches (fig. 8) and one latent of the wide SAE that the narrow one has not
(section 5.2). Here both are numbers: the share of latents without a neighbour, and the latents that split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn.functional import normalize

from sae_italian.base.errors import UsageError
from sae_italian.base.pace import progress
from sae_italian.base.statistics import Estimate, wilson

BLOCK_ELEMENTS = 2**24  # cosines held at once: 64 MB
MapMethod = Literal["pca", "umap"]
UMAP_SETTINGS = {"metric": "cosine", "n_neighbors": 30, "min_dist": 0.1}  # of Tozzi and Bondielli 2026
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
EDGES = np.linspace(-1, 1, 201)  # of the histograms of best matches
ALIKE = 0.7  # cosine from which two latents are called the same (Paulo and Belrose 2025)
SHOWN = 20  # latents listed by index
ROUNDING = 1e-6  # of a cosine, allowed for


def threshold(n_latents: int, d: int) -> float:
    """Return the cosine above which two latents are neighbours: sqrt(12 ln F / D) (Llama Scope, section 5.1).

    By the Johnson-Lindenstrauss lemma some pair of F random directions in D dimensions exceeds it with a probability of
    about 2 / F. Below a few hundred dimensions it is loose, and above 1 it says nothing: see `random_directions`.
    """
    return math.sqrt(12 * math.log(max(n_latents, 2)) / d)


def random_directions(n: int, d: int, seed: int, *, like: Float[Tensor, "m d"] | None = None) -> Float[Tensor, "n d"]:
    """Return n random unit directions, uniform on the sphere.

    With `like` they have its mean and covariance: what the common subspace of these directions alone gives.
    """
    drawn = torch.randn(n, d, generator=torch.Generator().manual_seed(int(seed)), dtype=torch.float32)
    if like is not None:
        values, vectors = torch.linalg.eigh(torch.cov(like.cpu().double().T).reshape(d, d))
        drawn = drawn @ (vectors * values.clamp_min(0).sqrt()).float().T + like.mean(dim=0).cpu()
    return normalize(drawn, dim=-1)


@torch.no_grad()
def nearest_directions(
    rows: Float[Tensor, "n d"],
    others: Float[Tensor, "m d"],
    *,
    above: float = 1.0,
    itself: Int[Tensor, " n"] | None = None,
    what: str = "directions",
) -> pd.DataFrame:
    """Return for each row the `nearest` of the others, their `cosine`, and how many `neighbours` it has.

    Neighbours are the others with a cosine of `above` or more. `itself` names for each row the one of the others that it
    is, which does not count.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    size = max(1, BLOCK_ELEMENTS // len(others))
    with progress(what, total=len(rows), unit="latent", leave=False) as bar:
        for first in range(0, len(rows), size):
            cosine = rows[first : first + size].to(others.device) @ others.T
            if itself is not None:
                cosine[torch.arange(len(cosine)), itself[first : first + size]] = -2.0
            best, index = cosine.max(dim=1)
            count = (cosine >= above - ROUNDING).sum(dim=1)
            parts.append((index.cpu(), best.cpu().clamp(-1, 1), count.cpu()))
            bar.update(len(cosine))
    nearest, cosine, neighbours = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return pd.DataFrame({"nearest": nearest, "cosine": cosine, "neighbours": neighbours})


def map_of(units: Float[Tensor, "n d"], method: MapMethod = "pca", seed: int = 0) -> Float[np.ndarray, "n 2"]:
    """Return two coordinates for each direction.

    `pca` gives the first two principal components, the same for the same SAE; `umap` needs umap-learn and follows `seed`.
    Raises: UsageError for `umap` when it is not installed.
    """
    if method == "umap":
        try:
            import umap  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UsageError(
                "the map method 'umap' needs umap-learn, which is not installed: pip install umap-learn, or use 'pca'."
            ) from error
        more = UMAP_SETTINGS | {"n_neighbors": min(30, len(units) - 1), "random_state": seed % 2**32}
        return np.asarray(umap.UMAP(**more).fit_transform(units.cpu().numpy()), dtype=np.float32)
    # each component's largest loading is positive, so that signs repeat; of one dimension the second is 0
    with np.errstate(invalid="ignore"):  # of directions that are all zero
        found = PCA(min(2, units.shape[1]), svd_solver="covariance_eigh").fit_transform(units.cpu().double().numpy())
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1]))).astype(np.float32)


# --- comparisons ------------------------------------------------------------------------------------------------------


class Distribution(NamedTuple):
    """Cosines with the nearest direction: quantiles, the largest, and counts between EDGES."""

    quantiles: dict[str, float]
    largest: float
    mean: float
    histogram: list[int]

    @classmethod
    def of(cls, cosine: Float[np.ndarray, " n"]) -> Distribution:
        found = np.quantile(cosine, QUANTILES)
        named = {f"{100 * q:g} %": float(value) for q, value in zip(QUANTILES, found, strict=True)}
        return cls(named, float(cosine.max()), float(cosine.mean()), np.histogram(cosine, EDGES)[0].tolist())


class Split(NamedTuple):
    """A latent of the narrow SAE that is the nearest of several latents of the wide one, all of them neighbours."""

    latent: int
    into: list[int]
    cosines: list[float]


@dataclass(frozen=True)
class Comparison:
    """The latents of `source` against the nearest of `target` (of itself, when both are the same SAE).

    `random` is the largest cosine of as many random directions with the nearest of as many others as `target` has: the
    empirical threshold. Shares carry Wilson's 95 % interval over latents.
    """

    source: str
    target: str
    d: int
    n_source: int  # latents compared
    n_target: int
    threshold: float  # sqrt(12 ln F / D), F the larger width
    used: float  # the threshold that decides what is a neighbour
    matches: Distribution
    random: Distribution  # the same numbers of uniformly random directions
    random_like: Distribution  # of random directions with each SAE's own mean and covariance
    neighbours: Estimate  # share of the source's latents whose nearest is at or above `used`
    new: Estimate  # 1 - neighbours
    above_random: Estimate  # share above the largest random cosine
    alike: Estimate  # share with a cosine of 0.7 or more
    mutual: Estimate  # share whose nearest has them as its nearest in turn
    several: Estimate  # share with two neighbours or more
    split: Estimate  # share of the target's latents that split into several of the source
    splits: list[Split]  # the ones that split most, at most SHOWN
    newest: list[int]  # the source's latents of smallest best cosine, at most SHOWN
    rows: pd.DataFrame = field(repr=False, compare=False)  # latent, its nearest of the target, cosine, neighbours

    @property
    def within(self) -> bool:
        return self.source == self.target


class Set(NamedTuple):
    """The unit decoder directions of one SAE that take part: those of live latents, where it is known which are alive."""

    name: str
    units: Float[Tensor, "n d"]  # a row of zeros stays zero
    latent: Int[np.ndarray, " n"]

    @classmethod
    def of(cls, name: str, sae: Any, alive: Bool[np.ndarray, " d_sae"] | None = None) -> Set:
        """Raises: UsageError when fewer than two latents are alive."""
        units = normalize(sae.W_dec.detach().float(), dim=-1)
        latent = np.arange(len(units)) if alive is None else np.flatnonzero(alive)
        if len(latent) < 2:
            raise UsageError(f"{name} has {len(latent)} live latents; a comparison needs 2 or more.")
        return cls(name, units[torch.from_numpy(latent).to(units.device)], latent)

    def nearest(self, rows: Int[np.ndarray, " n"], target: Set, **settings: Any) -> pd.DataFrame:
        """Return what is nearest in the target to some rows of this set; a direction is not its own neighbour."""
        chosen = torch.from_numpy(rows)
        itself = chosen if self is target else None
        return nearest_directions(self.units[chosen.to(self.units.device)], target.units, itself=itself, **settings)


def compare(
    source: Set, target: Set, *, sample: int | None = None, above: float | None = None, seed: int = 0
) -> Comparison:
    """Compare the latents of one set with the nearest of another, or of itself when it is given twice.

    What is new in a wide SAE against a narrow one, and which of the narrow one's latents split: source the wide one.
    `sample` looks at so many latents of the source, drawn from `seed`; `above` is the cosine that makes a neighbour
    (default: sqrt(12 ln F / D), or where that is 1 or more the largest cosine of the random directions).
    Both must write into the same space.
    """
    rows = np.arange(len(source.latent))
    if sample is not None and sample < len(rows):
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:sample])
    n, m, d = len(rows), len(target.latent), target.units.shape[1]
    theory = threshold(max(len(source.latent), m), d)
    random, random_like = (_by_chance(source, target, n, seed, covariance=like) for like in (False, True))
    used = above if above is not None else theory if theory < 1 else random.largest
    # a latent of a sample may have its neighbours among all
    found: Any = source.nearest(rows, target, above=used, what=f"{source.name} to {target.name}")
    asked, back = np.unique(found.nearest, return_inverse=True)
    mutual = target.nearest(asked, source).nearest.to_numpy()[back] == rows
    found = found.assign(nearest=target.latent[found.nearest])
    found.insert(0, "latent", source.latent[rows])
    near = found.cosine >= used - ROUNDING
    splits = [] if source is target else _splits(found[near])
    shares = {
        "neighbours": near,
        "new": ~near,
        "above_random": found.cosine > random.largest,
        "alike": found.cosine >= ALIKE,
        "mutual": mutual,
        "several": found.neighbours >= 2,
    }
    return Comparison(
        source=source.name,
        target=target.name,
        d=d,
        n_source=n,
        n_target=m,
        threshold=theory,
        used=used,
        matches=Distribution.of(found.cosine.to_numpy()),
        random=random,
        random_like=random_like,
        **{name: wilson(int(which.sum()), n) for name, which in shares.items()},
        split=wilson(len(splits), m),
        splits=sorted(splits, key=lambda split: (-len(split.into), -split.cosines[0], split.latent))[:SHOWN],
        newest=found[~near].sort_values("cosine", kind="stable").latent[:SHOWN].tolist(),
        rows=found,
    )


def _by_chance(source: Set, target: Set, n: int, seed: int, *, covariance: bool) -> Distribution:
    """Return the best matches of n random directions among as many others as the target has, or among themselves.

    With `covariance` they are drawn like the directions in whose place they stand.
    """
    here, there = (
        random_directions(size, units.shape[1], own_seed, like=units if covariance else None)
        for units, size, own_seed in ((source.units, n, 2 * seed), (target.units, len(target.latent), 2 * seed + 1))
    )
    rows, itself = (there[:n], torch.arange(n)) if source is target else (here, None)
    return Distribution.of(nearest_directions(rows, there, itself=itself).cosine.to_numpy())


def _splits(near: Any) -> list[Split]:
    """Return the target's latents that are the nearest, and a neighbour, of two or more rows."""
    several = near[near.duplicated("nearest", keep=False)]
    falling = several.sort_values("cosine", ascending=False, kind="stable")
    return [Split(*row) for row in falling.groupby("nearest")[["latent", "cosine"]].agg(list).itertuples()]
