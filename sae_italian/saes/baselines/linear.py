"""Directions as a SAELens SAE: what any decomposition becomes, so that every tool here runs on it unchanged."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_italian.saes.loading import weights_hash

_EARLIER = ("random_twin_of", "baseline", "baseline_of", "top_k_of")  # metadata of what an SAE was made from


class Directions(NamedTuple):
    """Latents c = ReLU(encoder^T (x - mean)), x^ = c decoder + mean; the decoder's rows are of unit norm."""

    encoder: Float[Tensor, "d_in n"]
    decoder: Float[Tensor, "n d_in"]
    mean: Float[Tensor, " d_in"]


def signed(encoder: Float[Tensor, "d_in n"], decoder: Float[Tensor, "n d_in"], mean: Tensor) -> Directions:
    """Return 2 n latents, v_1 .. v_n and then -v_1 .. -v_n, of components whose scores have a sign.

    Together the two reconstruct what the component does, as ReLU(s) - ReLU(-s) = s. Cunningham et al. 2023 do this for
    PCA and ICA under top-k (`to_topk_dict` in their code: the components and their negatives).
    """
    return unit(torch.cat([encoder, -encoder], dim=1), torch.cat([decoder, -decoder], dim=0), mean)


def unit(encoder: Float[Tensor, "d_in n"], decoder: Float[Tensor, "n d_in"], mean: Tensor) -> Directions:
    """Return the same function with decoder rows of unit norm, so that a latent's size is what it writes."""
    norm = decoder.norm(dim=-1).clamp_min(1e-12)
    return Directions(encoder * norm, decoder / norm[:, None], mean)


def as_sae(directions: Directions, like: Any, name: str, k: int | None = None) -> Any:
    """Return directions as a SAELens `StandardSAE`, or with k as a `TopKSAE`, at the place `like` was trained at.

    Metadata are those of `like` with `baseline` (the name) and `baseline_of` (the weights' hash of `like`).
    """
    from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

    n, d_in = directions.decoder.shape
    metadata = copy.deepcopy(like.cfg.metadata)
    for key in _EARLIER:
        if key in metadata.__dict__:
            delattr(metadata, key)
    metadata.baseline, metadata.baseline_of = name, weights_hash(like)
    shared: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": n,
        "dtype": like.cfg.dtype,
        "device": str(like.device),
        "apply_b_dec_to_input": True,
        "metadata": metadata,
    }
    sae: Any = StandardSAE(StandardSAEConfig(**shared)) if k is None else TopKSAE(TopKSAEConfig(**shared, k=min(k, n)))
    with torch.no_grad():
        sae.W_enc.copy_(directions.encoder)
        sae.W_dec.copy_(directions.decoder)
        sae.b_enc.zero_()
        sae.b_dec.copy_(directions.mean)
    return sae.eval()


def with_top_k(sae: Any, k: int) -> Any:
    """Return any SAE of an encoder and a decoder matrix with only its k strongest latents per token kept.

    The strength of a latent is what it writes, its activation times its decoder's norm. Latents that the SAE's own
    threshold silences stay silent only if its activation is ReLU or top-k; `top_k_of` in the metadata is its hash.
    """
    from sae_lens import TopKSAE, TopKSAEConfig

    cfg = sae.cfg
    metadata = copy.deepcopy(cfg.metadata)
    metadata.top_k_of = weights_hash(sae)
    kept: Any = TopKSAE(
        TopKSAEConfig(
            d_in=cfg.d_in,
            d_sae=cfg.d_sae,
            dtype=cfg.dtype,
            device=str(sae.device),
            k=min(k, cfg.d_sae),
            apply_b_dec_to_input=cfg.apply_b_dec_to_input,
            normalize_activations=cfg.normalize_activations,
            rescale_acts_by_decoder_norm=True,
            metadata=metadata,
        )
    )
    # SAELens' rescaling multiplies activations by the norms and divides by them when it decodes: the function is the same
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(kept, name).copy_(getattr(sae, name))
    return kept.eval()
