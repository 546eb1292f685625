"""Decoder directions, and the nearest of one SAE's among another's: block by block, never all pairs at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sae_italian.base.errors import UsageError

BLOCK_ELEMENTS = 2**24  # cosines held at once: 64 MB


class Nearest(NamedTuple):
    """For every row of one set of directions, what is nearest to it in another."""

    cosine: Float[np.ndarray, " n"]  # with the nearest
    index: Int[np.ndarray, " n"]  # of the nearest
    count: Int[np.ndarray, " n"]  # directions whose cosine is at or above the threshold


@torch.no_grad()
def directions(sae: Any, latents: Sequence[int] | None = None) -> Float[Tensor, "n d"]:
    """Return unit decoder directions, W_dec [d_sae, d] row by row; a row of zeros stays zero.

    Raises: UsageError for a latent that the SAE does not have.
    """
    rows = sae.W_dec.detach().float()
    if latents is not None:
        chosen = torch.as_tensor(np.asarray(latents, dtype=np.int64))
        if len(chosen) and not (int(chosen.min()) >= 0 and int(chosen.max()) < len(rows)):
            raise UsageError(f"latents {int(chosen.min())} to {int(chosen.max())} asked; this SAE has {len(rows):,}.")
        rows = rows[chosen.to(rows.device)]
    return torch.nn.functional.normalize(rows, dim=-1)


def threshold(n_latents: int, d: int) -> float:
    """Return the cosine above which two latents are neighbours: sqrt(12 ln F / D) (Llama Scope, section 5.1).

    By the Johnson-Lindenstrauss lemma some pair of F random directions in D dimensions exceeds it with a probability of
    about 2 / F. Below a few hundred dimensions it is loose, and above 1 it says nothing: see `random_directions`.
    """
    return math.sqrt(12 * math.log(max(n_latents, 2)) / d)


def random_directions(n: int, d: int, seed: int) -> Float[Tensor, "n d"]:
    """Return n random unit directions, uniform on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=-1)


def random_like(units: Float[Tensor, "n d"], n: int, seed: int) -> Float[Tensor, "n d"]:
    """Return n random unit directions with the mean and covariance of `units`: what their common subspace alone gives."""
    mean = units.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov(units.double().T).reshape(len(mean), len(mean)))
    root = (vectors * values.clamp_min(0).sqrt()).float().cpu()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, len(mean), generator=generator) @ root.T + mean.cpu()
    return torch.nn.functional.normalize(drawn, dim=-1)


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
    starts = tqdm(range(0, len(rows), size), desc=desc, disable=None if desc else True)
    for first in starts:
        cosine = rows[first : first + size].to(others.device) @ others.T
        if itself is not None:
            cosine[torch.arange(len(cosine)), itself[first : first + size]] = -2.0
        best, index = cosine.max(dim=1)
        parts.append((best.cpu(), index.cpu(), (cosine >= above - 1e-6).sum(dim=1).cpu()))
    columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
    return Nearest(np.clip(columns[0], -1, 1), columns[1], columns[2])
