"""A transcoder with TopK latents, which SAELens lacks: how sparsify's transcoders are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.topk_sae import TopK
from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig
from torch import Tensor

from sae_italian import plugin

TOPK_TRANSCODER = "topk_transcoder"


@dataclass
class TopKTranscoderConfig(SkipTranscoderConfig):
    """SAELens' SkipTranscoderConfig with `k`, the number of latents kept per token."""

    k: int = 100

    @classmethod
    def architecture(cls) -> str:
        return TOPK_TRANSCODER

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "k": self.k}


class TopKTranscoder(SkipTranscoder):
    """y = TopK(ReLU(x W_enc + b_enc)) W_dec + b_dec + W_skip x; W_skip is zero where there is no skip connection."""

    cfg: TopKTranscoderConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def get_activation_fn(self) -> Callable[[Float[Tensor, "... d_sae"]], Float[Tensor, "... d_sae"]]:
        return TopK(self.cfg.k, use_sparse_activations=False)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> TopKTranscoder:
        return cls(TopKTranscoderConfig.from_dict(config_dict))  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        raise NotImplementedError("folding the decoder's norm would change which latents are the top k")


plugin.has_run(__name__)  # SAELens was told nothing while this module was being imported
