"""An SAE put into a model with its reconstruction error added back, so that only edits of latents have an effect.

With error e = x - decode(encode(x)), x' = decode(z') + e = x + (z' - z) F, where F holds a row per latent: the direction
that one unit of it writes. A transcoder's z is read at one hook and its edit written at another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_italian.autointerp.pieces import piece_texts
from sae_italian.base.errors import UsageError
from sae_italian.corpora.packing import special_mask
from sae_italian.saes import check_fits, hooks_of

_AFFINE = ("none", "expected_average_only_in")


def edit_hooks(sae: Any, model: Any) -> tuple[str, str]:
    """Return the hook the SAE reads and the one it writes, the same for all but transcoders.

    Raises: UsageError when SAE and model do not fit, when the hook can only be read, and for an SAE that rescales each
    activation by its own norm, whose latents write no fixed direction.
    """
    check_fits(sae, model, writes=True)
    normalise = getattr(sae.cfg, "normalize_activations", "none")
    if normalise not in _AFFINE:
        raise UsageError(
            f"the SAE has normalize_activations {normalise!r}, so a latent writes another direction for each token. "
            f"Use an SAE with one of: {', '.join(_AFFINE)}."
        )
    return hooks_of(sae)


def codes(sae: Any, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
    """Return the SAE's latents of x, dense, where x is."""
    z = sae.encode(x.to(sae.device, sae.dtype))
    return (z.to_dense() if z.is_sparse else z).to(x.device)


@torch.no_grad()
def written_directions(sae: Any, latents: Sequence[int] | Int[Tensor, " n"]) -> Float[Tensor, "n d_out"]:
    """Return what one unit of each latent adds to the reconstruction: decode is affine, so decode(unit) - decode(0).

    Raises: UsageError when the SAE has no such latent.
    """
    wanted = torch.as_tensor(latents, dtype=torch.int64, device=sae.device)
    for latent in wanted[(wanted < 0) | (wanted >= sae.cfg.d_sae)].tolist():
        raise UsageError(f"latent {latent} does not exist; the SAE has latents 0 to {sae.cfg.d_sae - 1}.")
    units = torch.zeros(len(wanted) + 1, sae.cfg.d_sae, dtype=sae.dtype, device=sae.device)
    units[torch.arange(len(wanted)), wanted] = 1
    written = sae.decode(units)
    return written[:-1] - written[-1]


def special(tokens: Int[Tensor, "batch pos"], tokenizer: Any) -> Bool[Tensor, "batch pos"]:
    """Return where the special tokens are, to which an SAE is not applied."""
    return torch.from_numpy(special_mask(tokens.cpu().numpy(), tokenizer)).to(tokens.device)


_strings = lru_cache(maxsize=4)(piece_texts)


def token_text(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each id by itself, a leading space kept."""
    strings = _strings(tokenizer, len(tokenizer))
    return [strings[int(i)] for i in ids]
