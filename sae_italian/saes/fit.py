"""What an SAE does on activations: its latents, what it writes, how well that fits.

Shapes: x [tokens, d_in] the SAE's input, y [tokens, d_out] its target (x itself for an SAE), z [tokens, d_sae] latents.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import atomic_path, path_of

CHUNK = 256  # tokens encoded at once: 65,536 latents of them are 67 MB


class Fit(NamedTuple):
    """How well y is explained; means over the tokens."""

    explained_variance: float  # centred: 1 - sum|y - y^|^2 / sum|y - mean|^2
    explained_variance_uncentred: float  # 1 - sum|y - y^|^2 / sum|y|^2
    l0: float
    dead: float  # share of latents that never fired


def encoded(sae: Any, x: Float[Tensor, "tokens d_in"]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield x, where the SAE is, and its latents, dense, a few tokens at a time."""
    for part in x.split(CHUNK):
        part = part.to(sae.device, sae.dtype)
        z = sae.encode(part)
        yield part, z.to_dense() if z.is_sparse else z


def decoded(sae: Any, z: Tensor, x: Tensor) -> Tensor:
    """Return what the SAE writes for latents z read from x: decode, and a transcoder's skip connection where it has one."""
    skip = getattr(sae, "W_skip", None)
    return sae.decode(z) if skip is None else sae.decode(z) + x @ skip.T


@torch.no_grad()
def fit(sae: Any, x: Tensor, y: Tensor, scale: float = 1.0) -> Fit:
    """Return how well sae(scale * x) / scale explains y; the output of one that writes elsewhere is not scaled back."""
    error, n_active, fired = 0.0, 0, 0
    metadata = sae.cfg.metadata
    elsewhere = metadata.hook_name_out not in (None, metadata.hook_name) or x.shape != y.shape
    out_scale = 1.0 if elsewhere else scale
    for (part, z), target in zip(encoded(sae, x * scale), y.split(CHUNK), strict=True):
        y_hat = decoded(sae, z, part) / out_scale
        error += (target.to(y_hat.device) - y_hat).cpu().double().pow(2).sum().item()
        n_active += int(z.count_nonzero())
        fired = fired | (z != 0).any(0)
    return Fit(*explained(error, y), n_active / len(x), 1 - torch.as_tensor(fired).cpu().double().mean().item())


def explained(error: float, y: Float[Tensor, "tokens d_out"]) -> tuple[float, float]:
    """Return centred and uncentred explained variance of an error, the squares summed over all of y."""
    wide = y.cpu().double()  # an Apple GPU has no float64
    return 1 - error / (wide - wide.mean(0)).pow(2).sum().item(), 1 - error / wide.pow(2).sum().item()


@torch.no_grad()
def firing_counts(sae: Any, x: Float[Tensor, "tokens d_in"]) -> Int[Tensor, " d_sae"]:
    """Return on how many of the tokens each latent fires."""
    counts = torch.zeros(sae.cfg.d_sae, dtype=torch.long, device=sae.device)
    for _, z in encoded(sae, x):
        counts += (z != 0).sum(0)
    return counts


def mean_l0(sae: Any, x: Float[Tensor, "tokens d_in"]) -> float:
    """Return how many latents of an SAE are active on a token, on average."""
    return firing_counts(sae, x).sum().item() / max(len(x), 1)


@torch.no_grad()
def threshold_for(
    sae: Any, x: Float[Tensor, "tokens d_in"], k: float, gains: Float[Tensor, " d_sae"] | float = 1.0
) -> float:
    """Return the number above which lie the k * tokens largest scores, or 0 when fewer than that are positive.

    Scores are the pre-activations that a top-k or a threshold compares, times `gains`.
    """
    norm = gains * (sae.W_dec.norm(dim=-1) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else 1.0)
    wanted = max(1, round(k * len(x)))
    largest, floor = torch.empty(0), 0.0
    for part in x.split(CHUNK):
        scores = (sae.process_sae_in(part.to(sae.device)) @ sae.W_enc + sae.b_enc) * norm
        largest = torch.cat([largest, scores[scores > floor].cpu()])
        if len(largest) > 2 * wanted:
            largest = largest.topk(wanted + 1).values
            floor = largest[-1].item()
    if len(largest) <= wanted:
        return 0.0
    last = largest.topk(wanted + 1).values[-2:].double()
    return last.mean().item() if last[0] > last[1] else last[1].item()


def save_sae(sae: Any, out: str | Path) -> Path:
    """Write an SAE in SAELens' format to a new folder. Raises: UsageError when the folder is there and not empty."""
    out = check_free(out)
    with atomic_path(out) as temporary:
        sae.save_model(temporary)
    return out


def check_free(out: str | Path) -> Path:
    """Return the folder if nothing would be overwritten in it. Raises: UsageError otherwise."""
    if (out := path_of(out)).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already and not empty. Give another --out.")
    return out
