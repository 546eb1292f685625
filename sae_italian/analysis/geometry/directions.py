"""Decoder directions: the nearest of one SAE's among another's, block by block, and two coordinates for each on a map."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from sae_italian.base.errors import UsageError, nearest

BLOCK_ELEMENTS = 2**24  # cosines held at once: 64 MB
MapMethod = Literal["pca", "umap"]
UMAP_SETTINGS = {"metric": "cosine", "n_neighbors": 30, "min_dist": 0.1}  # those of Tozzi and Bondielli 2026


class Nearest(NamedTuple):
    """For every row of one set of directions, what is nearest to it in another."""

    cosine: Float[np.ndarray, " n"]  # with the nearest
    index: Int[np.ndarray, " n"]  # of the nearest
    count: Int[np.ndarray, " n"]  # directions whose cosine is at or above the threshold


def unit_directions(sae: Any) -> Float[Tensor, "d_sae d"]:
    """Return unit decoder directions, W_dec [d_sae, d] row by row; a row of zeros stays zero."""
    return normalize(sae.W_dec.detach().float(), dim=-1)


def threshold(n_latents: int, d: int) -> float:
    """Return the cosine above which two latents are neighbours: sqrt(12 ln F / D) (Llama Scope, section 5.1).

    By the Johnson-Lindenstrauss lemma some pair of F random directions in D dimensions exceeds it with a probability of
    about 2 / F. Below a few hundred dimensions it is loose, and above 1 it says nothing: see `random_directions`.
    """
    return math.sqrt(12 * math.log(max(n_latents, 2)) / d)


def random_directions(n: int, d: int, seed: int) -> Float[Tensor, "n d"]:
    """Return n random unit directions, uniform on the sphere."""
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def random_like(units: Float[Tensor, "m d"], n: int, seed: int) -> Float[Tensor, "n d"]:
    """Return n random unit directions with the mean and covariance of `units`: what their common subspace alone gives."""
    mean = units.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov(units.double().T).reshape(len(mean), len(mean)))
    root = (vectors * values.clamp_min(0).sqrt()).float().cpu()
    drawn = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed))
    return normalize(drawn @ root.T + mean.cpu(), dim=-1)


@torch.no_grad()
def nearest_directions(
    rows: Float[Tensor, "n d"],
    others: Float[Tensor, "m d"],
    *,
    above: float = 1.0,
    itself: Int[Tensor, " n"] | None = None,
    desc: str | None = None,
) -> Nearest:
    """Return for each row the nearest of the others by cosine, and how many have a cosine of `above` or more.

    `itself` names for each row the one of the others that it is, which does not count. Rounding of 1e-6 is allowed for.
    Raises: UsageError when the two differ in dimensions, or there is nothing to compare with.
    """
    if rows.shape[1] != others.shape[1]:
        raise UsageError(f"directions of {rows.shape[1]} and of {others.shape[1]} dimensions cannot be compared.")
    if len(others) < (1 if itself is None else 2):
        raise UsageError(f"there are {len(others)} directions to compare with; at least 1 other is needed.")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    size = max(1, BLOCK_ELEMENTS // len(others))
    for first in tqdm(range(0, len(rows), size), desc=desc, disable=None if desc else True):
        cosine = rows[first : first + size].to(others.device) @ others.T
        if itself is not None:
            cosine[torch.arange(len(cosine)), itself[first : first + size]] = -2.0
        best, index = cosine.max(dim=1)
        parts.append((best.cpu(), index.cpu(), (cosine >= above - 1e-6).sum(dim=1).cpu()))
    columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
    return Nearest(np.clip(columns[0], -1, 1), columns[1], columns[2])


def map_of(units: Float[Tensor, "n d"], method: MapMethod = "pca", seed: int = 0) -> Float[np.ndarray, "n 2"]:
    """Return two coordinates for each direction.

    `pca` gives the first two principal components, the same for the same SAE; `umap` needs umap-learn and follows `seed`.
    Raises: UsageError for an unknown method, and for `umap` when it is not installed.
    """
    if method not in get_args(MapMethod):
        raise UsageError(f"map method {method!r} is unknown. {nearest(method, get_args(MapMethod))}")
    return _pca(units) if method == "pca" else _umap(units, seed)


def _pca(units: Float[Tensor, "n d"]) -> Float[np.ndarray, "n 2"]:
    """Return the two leading principal components; each one's largest loading is positive, so that signs repeat."""
    centred = units - units.mean(dim=0)
    values, vectors = torch.linalg.eigh((centred.T @ centred).double())
    axes = vectors[:, values.argsort(descending=True)[:2]]
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    found = torch.zeros(len(units), 2, dtype=torch.float64)
    found[:, : axes.shape[1]] = (centred.double() @ axes).cpu()  # one dimension only: the second coordinate is 0
    return found.float().numpy()


def _umap(units: Float[Tensor, "n d"], seed: int) -> Float[np.ndarray, "n 2"]:
    try:
        import umap  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            "the map method 'umap' needs umap-learn, which is not installed: pip install umap-learn, or use 'pca'."
        ) from error
    if len(units) <= 3:
        raise UsageError(f"UMAP needs more than 3 latents, there are {len(units)}; use 'pca'.")
    settings = UMAP_SETTINGS | {"n_neighbors": min(30, len(units) - 1)}
    return np.asarray(umap.UMAP(random_state=seed, **settings).fit_transform(units.cpu().numpy()), dtype=np.float32)
