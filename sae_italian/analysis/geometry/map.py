"""Two coordinates for every latent, from its decoder direction: a picture of which latents lie close to which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_italian.analysis.geometry.directions import directions
from sae_italian.base.errors import UsageError, nearest

Method = Literal["pca", "umap"]
METHODS = ("pca", "umap")
UMAP_SETTINGS = {"metric": "cosine", "n_neighbors": 30, "min_dist": 0.1}  # those of Tozzi and Bondielli 2026


def latent_map(
    sae: Any, *, latents: Sequence[int] | None = None, method: Method = "pca", seed: int = 0
) -> Float[np.ndarray, "n 2"]:
    """Return two coordinates for each latent (or each of `latents`, in their order), from its unit decoder direction.

    `pca` gives the first two principal components, the same for the same SAE; `umap` needs umap-learn and follows `seed`.
    Raises: UsageError for an unknown method, and for `umap` when it is not installed.
    """
    return map_of(directions(sae, latents), method, seed)


def map_of(units: Float[Tensor, "n d"], method: Method = "pca", seed: int = 0) -> Float[np.ndarray, "n 2"]:
    """Return two coordinates for each direction. Raises: UsageError as `latent_map`."""
    if method not in METHODS:
        raise UsageError(f"map method {method!r} is unknown. {nearest(method, METHODS)}")
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
