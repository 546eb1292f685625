"""TopK SAEs trained with sparse gradients: a SAELens training architecture that is saved as plain `topk`.

`sae.architecture: sparse_topk` takes the fields of SAELens' `topk` and gives its losses and gradients, from one dense
matrix product per step instead of six (see `sparse.py`). Any SAELens trainer runs it as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from sae_italian import plugin
from sae_italian.saes.sparse import decode, encode_rows
from sae_italian.saes.sparse_products import Workspace

SPARSE_TOPK = "sparse_topk"


@dataclass
class SparseTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """The fields of SAELens' `topk`; `use_sparse_activations` says nothing here, they always are.

    bf16_screening: find the candidates of the top-k in bfloat16 and rank them in float32 (`sparse_screen.py`): the same
    latents, faster where the machine has bfloat16 products.
    """

    bf16_screening: bool = False

    @classmethod
    def architecture(cls) -> str:
        return SPARSE_TOPK

    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


class SparseTopKTrainingSAE(TopKTrainingSAE):
    """SAELens' `TopKTrainingSAE`, with the training step on the k kept latents only.

    The number kept is `active_k`, `cfg.k` at the start; it may be changed between steps (K-annealing), up to d_sae.
    `feature_acts` of a step is a sparse tensor without gradient, for statistics; `hidden_pre` holds the kept values.
    Where somebody has hooked `hook_sae_acts_pre` or `hook_sae_acts_post`, which want the whole matrix, the step is
    SAELens' own.
    """

    cfg: SparseTopKTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, cfg: SparseTopKTrainingSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self._workspace = Workspace()

    @property
    def active_k(self) -> int:
        """How many latents a token keeps now."""
        return self.activation_fn.k  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]

    @active_k.setter
    def active_k(self, k: int) -> None:
        if not 1 <= k <= self.cfg.d_sae:
            raise ValueError(f"active_k is {k}; it must be from 1 to d_sae, {self.cfg.d_sae}")
        self.activation_fn.k = k  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return TopK(self.cfg.k, use_sparse_activations=False)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_enc.data = latents_first(self.W_enc.data)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return losses and reconstruction as SAELens' own does, with sparse `feature_acts`."""
        if any(
            hook._forward_hooks or hook._backward_hooks for hook in (self.hook_sae_acts_pre, self.hook_sae_acts_post)
        ):
            return super().training_forward_pass(step_input)
        return self.sparse_step(step_input.sae_in, step_input.sae_in, step_input.dead_neuron_mask)

    def sparse_step(self, x: Tensor, target: Tensor, dead: Tensor | None) -> TrainStepOutput:
        """Return the losses of reconstructing `target` [batch, d_out] from x [batch, d_in]; for an SAE they are one.

        dead: boolean [d_sae], the latents that the auxiliary loss trains. Raises: ValueError as SAELens' auxiliary loss.
        """
        sae_in, input_bias = self._sparse_input(x)
        norm = self.get_W_dec_norm() if self.cfg.rescale_acts_by_decoder_norm else None
        # one view of the encoder for both encodings, so that autograd adds the second's sparse gradient in place
        rows = self.W_enc.T
        encoder: dict[str, Any] = {"input_bias": input_bias, "norm": norm}
        values, indices = encode_rows(
            sae_in,
            rows,
            self.b_enc,
            self.active_k,
            workspace=self._workspace,
            screen=self.cfg.bf16_screening,
            **encoder,
        )
        out = self.hook_sae_recons(decode(values, indices, self.W_dec, workspace=self._workspace) + self.b_dec)
        out = self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)
        losses = {"mse_loss": self.mse_loss_fn(out, target).sum(dim=-1).mean()}
        losses["auxiliary_reconstruction_loss"] = self._auxiliary_loss(sae_in, rows, encoder, target - out, dead)
        acts = values.detach() if norm is None else values.detach() * norm[indices]
        return TrainStepOutput(
            sae_in=target,
            sae_out=out,
            feature_acts=_sparse_acts(acts, indices, self.cfg.d_sae),
            hidden_pre=values,
            loss=sum(losses.values(), start=out.new_zeros(())),
            losses=losses,
        )

    def _sparse_input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the encoder's input, and the bias in it whose gradient the encoder gives; None where autograd does."""
        if x.requires_grad:
            return self.process_sae_in(x), None
        with torch.no_grad():
            sae_in = self.process_sae_in(x)
        return sae_in, self.b_dec if self.cfg.apply_b_dec_to_input else None

    def _auxiliary_loss(
        self, sae_in: Tensor, rows: Tensor, encoder: dict[str, Any], residual: Tensor, dead: Tensor | None
    ) -> Tensor:
        """Return SAELens' `calculate_topk_aux_loss`, from the dead latents alone."""
        latents = None if dead is None else dead.nonzero().flatten()
        if latents is None or not len(latents):
            return residual.new_zeros(())
        if self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise ValueError(
                f"the auxiliary loss is not defined with normalize_activations={self.cfg.normalize_activations!r}; "
                "use 'none' or 'expected_average_only_in'"
            )
        k_aux = residual.shape[-1] // 2
        scale = min(len(latents) / k_aux, 1.0)
        if encoder["norm"] is not None:
            encoder = {**encoder, "norm": encoder["norm"][latents]}
        values, indices = encode_rows(
            sae_in, rows, self.b_enc, min(k_aux, len(latents)), latents=latents, relu=False, **encoder
        )
        recons = self.reshape_fn_out(decode(values, indices, self.W_dec, latents=latents), self.d_head)
        loss = (recons - residual.detach()).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * scale * loss

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict["W_enc"] = latents_first(state_dict["W_enc"])


def latents_first(W_enc: Tensor) -> Tensor:
    """Return W_enc [d_in, d_sae] laid out so that each latent's column is one run of memory."""
    return W_enc.T.contiguous().T


def _sparse_acts(values: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    """Return the activations [batch, d_sae] as a sparse tensor."""
    batch, k = indices.shape
    tokens = torch.arange(batch, device=indices.device).repeat_interleave(k)
    where = torch.stack([tokens, indices.flatten()])
    return torch.sparse_coo_tensor(where, values.flatten(), (batch, d_sae), check_invariants=False)


plugin.has_run(__name__)  # SAELens was told nothing while this module was being imported
