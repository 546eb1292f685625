"""The architectures that SAELens lacks, each registered with it: sparse TopK, and transcoders to train and to load.

| name | what it is | saved as |
|---|---|---|
| `sparse_topk` | SAELens' `topk` with the same losses and gradients, several times faster (`sparse.py`) | `topk` |
| `topk_transcoder` | latents of one activation that reconstruct another, TopK | `topk_transcoder` |
| `transcoder` | the same with ReLU and an L1 penalty | SAELens' `transcoder` |
| `started_topk`, ... | SAELens' own, with a `start` at the mean and a k that falls during the first steps | what SAELens saves |

SAELens' trainer hands a training SAE one tensor per step, so a transcoder's input and target come side by side,
[tokens, d_in + d_out]; `PairScaler` scales each half by its own factor, as Llama Scope does. What the step returns as
`sae_in` is the target, so that the trainer's explained variance is that of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, make_dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from sae_lens import register_sae_class, register_sae_training_class
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput, mse_loss
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopK, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor, nn

from sae_italian.saes.sparse import SelectRows, decode, encode_rows, set_k

Start = Literal["zero", "mean"]
MASSIVE = 4  # times the median norm: such a row is left out of the centre (Gemma 3's BOS has 4.5 to 16)


@torch.no_grad()
def start_at(sae: Any, step_input: TrainStepInput) -> None:
    """Let an SAE in training start at the centre of its first batch, as `cfg.start` says; in later steps do nothing.

    Activations of real models are nearly all mean: at layer 8 of Gemma 3 270M the mean's norm is 5,158 where a vector's is
    5,187. From `b_dec` = 0 the latents must first build that mean, and 97 % of them die of it; from the mean they describe
    what differs. The encoder reads x - b_dec, or gets the same shift by its bias where it reads x itself:
    b_enc = -centre W_enc. As in sparsify (`SparseCoder`, its first batch).
    Rows of massive activations, such as a BOS that was not left out, do not count. A transcoder's `b_dec` is at its
    target's centre.
    """
    if sae.cfg.start == "zero" or step_input.n_training_steps > 0:
        return
    x = step_input.sae_in
    centre = _centre(sae.process_sae_in(x))
    if not sae.cfg.apply_b_dec_to_input:
        if not hasattr(sae, "b_enc"):
            raise ValueError(
                f"start {sae.cfg.start!r} needs apply_b_dec_to_input=true in {type(sae).__name__}; or set start=zero."
            )
        sae.b_enc -= centre @ sae.W_enc
    sae.b_dec += _centre(sae.target(x)) if isinstance(sae, _Transcodes) else centre


def _centre(rows: Float[Tensor, "batch d"]) -> Float[Tensor, " d"]:
    """Return the mean of the rows of ordinary norm."""
    norms = rows.norm(dim=-1)
    return rows[norms <= MASSIVE * norms.median()].mean(0)


@dataclass
class SparseTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """The fields of SAELens' `topk`; `use_sparse_activations` says nothing here, they always are.

    k_anneal_steps: the first training steps, in which the number of latents that may fire falls to k (`sparse.annealed_k`).
    start: where `b_dec` starts: at `zero` or at the `mean` of the first batch (`start_at`).
    """

    k_anneal_steps: int = 0
    start: Start = "zero"


class SparseTopKTrainingSAE(TopKTrainingSAE):
    """SAELens' `TopKTrainingSAE`, with the training step on the k kept latents only.

    `feature_acts` of a step is a sparse tensor without gradient, for statistics; `hidden_pre` holds the kept values.
    Where somebody has hooked `hook_sae_acts_pre` or `hook_sae_acts_post`, which want the whole matrix, the step is
    SAELens' own. More than `cfg.k` latents are kept in the first `cfg.k_anneal_steps` steps.
    """

    cfg: SparseTopKTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    watched = ("hook_sae_acts_pre", "hook_sae_acts_post")

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return TopK(self.cfg.k, use_sparse_activations=False)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_enc.data = latents_first(self.W_enc.data)

    def target(self, sae_in: Tensor) -> Tensor:
        """Return what is reconstructed, [batch, d_out], of what the trainer gives; for an SAE it is all of it."""
        return sae_in

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return losses and reconstruction as SAELens' own does, with sparse `feature_acts`.

        Raises: ValueError as SAELens' auxiliary loss, which trains the latents of `dead_neuron_mask`.
        """
        x, target = step_input.sae_in, self.target(step_input.sae_in)
        set_k(self, step_input)
        start_at(self, step_input)
        hooks = (getattr(self, name) for name in self.watched)
        if target is x and any(hook._forward_hooks or hook._backward_hooks for hook in hooks):
            return super().training_forward_pass(step_input)
        sae_in, input_bias = self._sparse_input(x)
        norm = self.get_W_dec_norm() if self.cfg.rescale_acts_by_decoder_norm else None
        # one view of the encoder for both encodings, so that autograd adds the second's sparse gradient in place
        rows = self.W_enc.T
        encoder: dict[str, Any] = {"input_bias": input_bias, "norm": norm}
        k: int = self.activation_fn.k  # pyright: ignore[reportAssignmentType, reportAttributeAccessIssue]
        values, acts, indices = self._encoded(sae_in, rows, self.b_enc, k, encoder)
        out = self.hook_sae_recons(self._decoded(values, indices, self.W_dec) + self.b_dec)
        out = self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)
        losses = {"mse_loss": self.mse_loss_fn(out, target).sum(dim=-1).mean()}
        auxiliary = self._auxiliary_loss(sae_in, rows, encoder, target - out, step_input.dead_neuron_mask)
        losses["auxiliary_reconstruction_loss"] = auxiliary
        return TrainStepOutput(
            sae_in=target,
            sae_out=out,
            feature_acts=sparse_acts(acts, indices, self.cfg.d_sae),
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

    def _encoded(
        self, sae_in: Tensor, rows: Tensor, b_enc: Tensor, k: int, encoder: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the k latents that are kept of some: their values, these times the decoder's norm, and which they are."""
        values, indices = encode_rows(sae_in, rows, b_enc, k, **encoder)
        norm = encoder["norm"]
        return values, values.detach() if norm is None else values.detach() * norm[indices], indices

    def _decoded(self, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        return decode(values, indices, W_dec)

    def _n_of_all(self, latents: Tensor) -> int:
        return len(latents)

    def _auxiliary_loss(
        self, sae_in: Tensor, rows: Tensor, encoder: dict[str, Any], residual: Tensor, dead: Tensor | None
    ) -> Tensor:
        """Return SAELens' `calculate_topk_aux_loss`, from the dead latents alone."""
        latents = rows.new_zeros(0, dtype=torch.long) if dead is None else dead.nonzero().flatten()
        n_dead = self._n_of_all(latents)
        if not n_dead:
            return residual.new_zeros(())
        if self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise ValueError(
                f"the auxiliary loss is not defined with normalize_activations={self.cfg.normalize_activations!r}; "
                "use 'none' or 'expected_average_only_in'"
            )
        k_aux, norm = residual.shape[-1] // 2, encoder["norm"]
        encoder = encoder | {"norm": None if norm is None else norm[latents], "relu": False}
        rows, W_dec = (SelectRows.apply(each, latents) for each in (rows, self.W_dec))
        values, _, indices = self._encoded(sae_in, rows, self.b_enc[latents], min(k_aux, n_dead), encoder)
        recons = self.reshape_fn_out(self._decoded(values, indices, W_dec), self.d_head)
        loss = (recons - residual.detach()).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(n_dead / k_aux, 1.0) * loss

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict["W_enc"] = latents_first(state_dict["W_enc"])


def latents_first(W_enc: Tensor) -> Tensor:
    """Return W_enc [d_in, d_sae] laid out so that each latent's column is one run of memory."""
    return W_enc.T.contiguous().T


def sparse_acts(values: Tensor, indices: Tensor, d_sae: int) -> Tensor:
    """Return the activations [batch, d_sae] as a sparse tensor."""
    batch, k = indices.shape
    where = torch.stack([torch.arange(batch, device=indices.device).repeat_interleave(k), indices.flatten()])
    return torch.sparse_coo_tensor(where, values.flatten(), (batch, d_sae), check_invariants=False)


# --- transcoders ------------------------------------------------------------------------------------------------------


@dataclass
class TopKTranscoderConfig(SkipTranscoderConfig):
    """SAELens' SkipTranscoderConfig with `k`, the number of latents kept per token."""

    k: int = 100

    @classmethod
    def architecture(cls) -> str:
        return "topk_transcoder"


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


class _Transcodes(TrainingSAE[Any]):
    """What a transcoder changes in a training SAE of SAELens: shapes, what it reads and writes, the folding of scales."""

    b_enc: nn.Parameter

    def initialize_weights(self) -> None:
        """Start W_enc and W_dec as independent random directions of norm `decoder_init_norm` (1 if None), biases zero."""
        cfg, norm = self.cfg, self.cfg.decoder_init_norm or 1.0
        place: dict[str, Any] = {"dtype": self.dtype, "device": self.device}

        def directions(d: int) -> Float[Tensor, "d_sae d"]:
            return norm * nn.functional.normalize(torch.randn(cfg.d_sae, d, **place), dim=-1)

        self.W_dec = nn.Parameter(directions(cfg.d_out))
        self.b_dec, self.b_enc = (nn.Parameter(torch.zeros(d, **place)) for d in (cfg.d_out, cfg.d_sae))
        self.W_enc = nn.Parameter(directions(cfg.d_in).T.contiguous())

    def process_sae_in(self, sae_in: Float[Tensor, "... d_in_or_both"]) -> Float[Tensor, "... d_in"]:
        return self.hook_sae_input(sae_in[..., : self.cfg.d_in].to(self.dtype))

    def target(self, sae_in: Float[Tensor, "tokens both"]) -> Float[Tensor, "tokens d_out"]:
        return sae_in[..., self.cfg.d_in :].to(self.dtype)

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
    """The fields of `sparse_topk` with the width of the target; saved as `topk_transcoder`."""

    d_out: int
    apply_b_dec_to_input: bool = False


class TopKTranscoderTraining(_Transcodes, SparseTopKTrainingSAE):
    """A transcoder with TopK latents and sparse gradients: y^ = TopK(x W_enc + b_enc) W_dec + b_dec."""

    cfg: TopKTranscoderTrainingConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_enc.data = latents_first(self.W_enc.data)

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Fold the decoder's norms as SAELens' TopK does, and add the skip connection of the saved class: zero."""
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict["W_skip"] = self.W_dec.new_zeros(self.cfg.d_out, self.cfg.d_in)


@dataclass(kw_only=True)
class TranscoderTrainingConfig(StandardTrainingSAEConfig):
    """SAELens' L1 training config with the width of the target and `start`; saved as SAELens' `transcoder`."""

    d_out: int
    apply_b_dec_to_input: bool = False
    start: Start = "zero"


class TranscoderTraining(_Transcodes, StandardTrainingSAE):
    """A transcoder with ReLU latents and an L1 penalty on latents times decoder norm."""

    cfg: TranscoderTrainingConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return losses and activations of one step; `step_input.sae_in` is [tokens, d_in + d_out]."""
        y = self.target(step_input.sae_in)
        start_at(self, step_input)
        self.mse_loss_fn = lambda y_hat, _: mse_loss(y_hat, y)
        return replace(super().training_forward_pass(step_input), sae_in=y)


class PairScaler(ActivationScaler):
    """SAELens' scaler for input and target side by side: each gets the factor sqrt(width) / mean norm."""

    scaling_factor: tuple[float, float] | None  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, d_in: int):
        super().__init__()
        self.d_in = d_in

    def scale(self, acts: Float[Tensor, "tokens both"]) -> Float[Tensor, "tokens both"]:
        if self.scaling_factor is None:
            return acts
        halves = zip(acts.tensor_split([self.d_in], dim=-1), self.scaling_factor, strict=True)
        return torch.cat([half * factor for half, factor in halves], dim=-1)

    @torch.no_grad()
    def estimate_scaling_factor(
        self, d_in: int, data_provider: Iterator[Tensor], n_batches_for_norm_estimate: int = 16
    ) -> None:
        rows = torch.cat([next(data_provider).float() for _ in range(n_batches_for_norm_estimate)])
        halves = rows.tensor_split([d_in], dim=-1)
        x, y = (half.shape[-1] ** 0.5 * len(rows) / half.norm(dim=-1).sum().item() for half in halves)
        self.scaling_factor = (x, y)


# --- registering ------------------------------------------------------------------------------------------------------


class _Starts(TrainingSAE[Any]):
    """A training SAE of SAELens that starts where `cfg.start` says, and whose k, if it has one, falls in the first
    `cfg.k_anneal_steps` steps; whichever trainer counts the steps."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        set_k(self, step_input)
        start_at(self, step_input)
        return super().training_forward_pass(step_input)


def _register(name: str, sae_class: type, config_class: Any, saved_as: str) -> None:
    """Register a training architecture that is saved as another, by both names."""
    config_class.architecture = classmethod(lambda _cls: name)
    config_class.get_inference_config_class = lambda _self: get_sae_class(saved_as)[1]
    register_sae_training_class(name, sae_class, config_class)


def _register_twin(name: str, saved_as: str) -> None:
    """Register the twin `started_NAME` of one of SAELens' own, with two fields more: `start` and `k_anneal_steps`."""
    sae_class, config_class = get_sae_training_class(name)
    more: list[Any] = [("k_anneal_steps", int, 0), ("start", Start, "zero")]
    config = make_dataclass(f"Started{config_class.__name__}", more, bases=(config_class,))
    _register(f"started_{name}", type(f"Started{sae_class.__name__}", (_Starts, sae_class), {}), config, saved_as)


register_sae_class("topk_transcoder", TopKTranscoder, TopKTranscoderConfig)
_register("sparse_topk", SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, "topk")
_register("topk_transcoder", TopKTranscoderTraining, TopKTranscoderTrainingConfig, "topk_transcoder")
_register("transcoder", TranscoderTraining, TranscoderTrainingConfig, "transcoder")
for _name in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "standard", "jumprelu", "gated"):
    _register_twin(_name, "jumprelu" if "batch" in _name else _name)
