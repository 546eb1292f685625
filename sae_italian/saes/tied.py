"""The SAE of Cunningham et al. 2023 (arXiv 2309.08600): tied weights of unit norm, ReLU, L1, no decoder bias.

c = ReLU(W x + b), x^ = W^T c, with the rows of W normalised inside the forward pass, as their code does. Their loss is
mean_d (x - x^)^2 + alpha |c|_1; SAELens sums over d, so `l1_coefficient` = alpha * d_in gives the same gradients times
d_in, and Adam takes the same steps.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import register_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainCoefficientConfig, TrainingSAE, TrainingSAEConfig, TrainStepInput
from sae_lens.saes.standard_sae import StandardSAEConfig
from torch import Tensor, nn


@dataclass(kw_only=True)
class TiedTrainingSAEConfig(TrainingSAEConfig):
    """Saved as SAELens' `standard`. `decoder_init_norm` only sets how far Adam's first steps turn a direction."""

    l1_coefficient: float = 1.0
    l1_warm_up_steps: int = 0
    apply_b_dec_to_input: bool = False
    decoder_init_norm: float | None = 1.0

    @classmethod
    def architecture(cls) -> str:
        return "tied"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return StandardSAEConfig


class TiedTrainingSAE(TrainingSAE[TiedTrainingSAEConfig]):
    """W_dec [d_sae, d_in] is the one matrix that is trained; b_dec stays zero."""

    b_enc: nn.Parameter

    def initialize_weights(self) -> None:
        super().initialize_weights()
        del self.W_enc
        self.b_dec.requires_grad_(False)
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device))

    def directions(self) -> Float[Tensor, "d_sae d_in"]:
        """Return the rows of W at unit norm; the gradient passes through the normalisation."""
        return torch.nn.functional.normalize(self.W_dec, dim=-1, eps=1e-8)

    def encode_with_hidden_pre(self, x: Float[Tensor, "... d_in"]) -> tuple[Tensor, Tensor]:
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.directions().T + self.b_enc)
        return self.hook_sae_acts_post(self.activation_fn(hidden_pre)), hidden_pre

    def decode(self, feature_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_in"]:
        return self.hook_sae_recons(feature_acts @ self.directions() + self.b_dec)

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"l1": TrainCoefficientConfig(value=self.cfg.l1_coefficient, warm_up_steps=self.cfg.l1_warm_up_steps)}

    def calculate_aux_loss(self, step_input: TrainStepInput, feature_acts: Tensor, **_: Tensor) -> dict[str, Tensor]:
        return {"l1_loss": step_input.coefficients["l1"] * feature_acts.sum(-1).mean()}

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """ReLU carries a factor through, so only b_enc changes and the weights stay tied and of unit norm."""
        self.b_enc.data /= scaling_factor
        self.cfg.normalize_activations = "none"

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Write both matrices, as SAELens' StandardSAE reads them."""
        directions = self.directions().detach()
        state_dict["W_dec"] = directions.clone()
        state_dict["W_enc"] = directions.T.contiguous().clone()


register_sae_training_class("tied", TiedTrainingSAE, TiedTrainingSAEConfig)
