"""Training of transcoders, which SAELens can only load: latents of one activation that reconstruct another.

SAELens' trainer hands a training SAE one tensor per step, so input and target come side by side, [tokens, d_in + d_out];
`PairScaler` scales each half by its own factor, as Llama Scope does. What the step returns as `sae_in` is the target, so
that the trainer's explained variance is that of the target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.transcoder import TranscoderConfig
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor, nn

from sae_italian import plugin
from sae_italian.saes.topk import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, latents_first
from sae_italian.saes.transcoders import TOPK_TRANSCODER, TopKTranscoderConfig

TRANSCODER = "transcoder"


class _Transcodes:
    """What a transcoder changes in a training SAE of SAELens: shapes, the target of the loss, and the folding of scales."""

    cfg: Any
    dtype: torch.dtype
    device: torch.device
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def initialize_weights(self) -> None:
        """Start W_enc and W_dec as independent random directions of norm `decoder_init_norm` (1 if None), biases zero."""
        cfg, norm = self.cfg, self.cfg.decoder_init_norm or 1.0

        def directions(d: int) -> Float[Tensor, "d_sae d"]:
            return norm * nn.functional.normalize(
                torch.randn(cfg.d_sae, d, dtype=self.dtype, device=self.device), dim=-1
            )

        def zeros(d: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(d, dtype=self.dtype, device=self.device))

        self.W_dec, self.b_dec, self.b_enc = nn.Parameter(directions(cfg.d_out)), zeros(cfg.d_out), zeros(cfg.d_sae)
        self.W_enc = nn.Parameter(directions(cfg.d_in).T.contiguous())

    def process_sae_in(self, sae_in: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        return self.hook_sae_input(sae_in.to(self.dtype))  # pyright: ignore[reportAttributeAccessIssue]

    def halves(self, step_input: TrainStepInput) -> tuple[Float[Tensor, "tokens d_in"], Float[Tensor, "tokens d_out"]]:
        """Return input and target of a step."""
        x, y = step_input.sae_in.split([self.cfg.d_in, self.cfg.d_out], dim=-1)
        return x, y.to(self.dtype)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return losses and activations of one step; `step_input.sae_in` is [tokens, d_in + d_out]."""
        this: Any = self
        x, y = self.halves(step_input)
        feature_acts, hidden_pre = this.encode_with_hidden_pre(x)
        y_hat = this.decode(feature_acts)
        mse_loss = this.mse_loss_fn(y_hat, y).sum(dim=-1).mean()
        aux_losses = this.calculate_aux_loss(replace(step_input, sae_in=y), feature_acts, hidden_pre, y_hat)
        loss = mse_loss
        for value in aux_losses.values():
            loss = loss + value
        return TrainStepOutput(
            sae_in=y,
            sae_out=y_hat,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=loss,
            losses={"mse_loss": mse_loss, **aux_losses},
        )

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: tuple[float, float]) -> None:
        """Fold the factors of input and target: latents of raw inputs are those of scaled ones, outputs are raw."""
        scale_in, scale_out = scaling_factor
        self.W_enc.data *= scale_in
        self.W_dec.data /= scale_out
        self.b_dec.data /= scale_out
        self.cfg.normalize_activations = "none"


@dataclass(kw_only=True)
class TopKTranscoderTrainingConfig(SparseTopKTrainingSAEConfig):
    """The fields of SAELens' TopK with the width of the target; saved as `topk_transcoder`."""

    d_out: int
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return TOPK_TRANSCODER

    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKTranscoderConfig


class TopKTranscoderTraining(_Transcodes, SparseTopKTrainingSAE):
    """A transcoder with TopK latents and sparse gradients: y^ = TopK(x W_enc + b_enc) W_dec + b_dec."""

    cfg: TopKTranscoderTrainingConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_enc.data = latents_first(self.W_enc.data)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return losses and sparse activations of one step; `step_input.sae_in` is [tokens, d_in + d_out]."""
        x, y = self.halves(step_input)
        return self.sparse_step(x, y, step_input.dead_neuron_mask)

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Fold the decoder's norms as SAELens' TopK does, and add the skip connection of the saved class: zero."""
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict["W_skip"] = torch.zeros(self.cfg.d_out, self.cfg.d_in, dtype=self.dtype)


@dataclass(kw_only=True)
class TranscoderTrainingConfig(StandardTrainingSAEConfig):
    """SAELens' L1 training config with the width of the target; saved as SAELens' `transcoder`."""

    d_out: int
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return TRANSCODER

    def get_inference_config_class(self) -> type[SAEConfig]:
        return TranscoderConfig


class TranscoderTraining(_Transcodes, StandardTrainingSAE):
    """A transcoder with ReLU latents and an L1 penalty on latents times decoder norm."""

    cfg: TranscoderTrainingConfig  # pyright: ignore[reportIncompatibleVariableOverride]


TRAINED_TRANSCODERS = {
    TOPK_TRANSCODER: (TopKTranscoderTraining, TopKTranscoderTrainingConfig),
    TRANSCODER: (TranscoderTraining, TranscoderTrainingConfig),
}


class PairScaler(ActivationScaler):
    """SAELens' scaler for input and target side by side: each gets the factor sqrt(width) / mean norm."""

    scaling_factor: tuple[float, float] | None  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, d_in: int):
        super().__init__()
        self.d_in = d_in

    def scale(self, acts: Float[Tensor, "tokens both"]) -> Float[Tensor, "tokens both"]:
        if self.scaling_factor is None:
            return acts
        scale_in, scale_out = self.scaling_factor
        return torch.cat([acts[:, : self.d_in] * scale_in, acts[:, self.d_in :] * scale_out], dim=-1)

    @torch.no_grad()
    def estimate_scaling_factor(
        self, d_in: int, data_provider: Iterator[Tensor], n_batches_for_norm_estimate: int = 16
    ) -> None:
        sums, n, d_out = [0.0, 0.0], 0, 0
        for _ in range(n_batches_for_norm_estimate):
            halves = next(data_provider).float().tensor_split([d_in], dim=-1)
            n, d_out = n + len(halves[0]), halves[1].shape[-1]
            sums = [total + half.norm(dim=-1).sum().item() for total, half in zip(sums, halves, strict=True)]
        self.scaling_factor = (d_in**0.5 * n / sums[0], d_out**0.5 * n / sums[1])


plugin.has_run(__name__)  # SAELens was told nothing while this module was being imported
