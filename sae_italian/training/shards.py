"""One TopK SAE whose latents are spread over the processes of a group: for dictionaries that no one device holds.

Each of W processes has d_sae / W latents, with their gradients, Adam's state and counters, and sees the tokens of all. A step

1. gathers the processes' tokens, so that all see the same batch [B, d_in];
2. takes each process' own k best latents, gathers their scores, and keeps the k best of all: what the whole SAE keeps;
3. decodes them where they are, and adds the parts of the reconstruction by one all-reduce, whose backward is the identity:
   each process has the loss of the whole, so its latents' gradients need nothing from the others;
4. does both again for the auxiliary loss, with d_in / 2 of the dead latents;
5. clips by the norm of all gradients, one number, before SAELens' trainer clips what its process has.

Bytes that one process sends and gets in a step with float32 (`traffic`): B d_in for the tokens, 2 B d_out for the sum, B k W
for the scores, the same for the auxiliary loss with d_in / 2 for k. They do not grow with d_sae, while replicas add
all gradients, 2 d_sae (d_in + d_out) numbers: 1.07 GB at 65,536 latents of 2,048. Design and arithmetic: reference/multi-process.md.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from sae_italian.base.errors import UsageError
from sae_italian.saes.architectures import SparseTopKTrainingSAE, latents_first, start_at
from sae_italian.saes.sparse import SelectRows, decode, encode_rows, set_k

CLIP = 1.0  # SAELens' trainer has no other
LATENT_AXIS = {"W_enc": 1, "W_dec": 0, "b_enc": 0}  # b_dec is everybody's
FLOAT = 4  # bytes


class _Added(torch.autograd.Function):
    """The sum over all processes. Each of them has the whole loss, so that the gradient is everybody's own."""

    @staticmethod
    def forward(ctx, part):  # pyright: ignore[reportIncompatibleMethodOverride]
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradients[0]


class _Shared(torch.autograd.Function):
    """A tensor that all processes have, used by each for its own latents: its gradient is the sum over all."""

    @staticmethod
    def forward(ctx, tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class ShardedTopK(SparseTopKTrainingSAE):
    """This process' latents of a `sparse_topk` SAE. Any SAELens trainer trains it; its counters are those of its latents.

    Made by `sharded`; `whole` gives the SAE back. The process group must be there, with the same d_sae / W everywhere.
    """

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return losses and reconstruction of the whole SAE on all processes' tokens; `feature_acts` are this process'.

        Raises: ValueError as `SparseTopKTrainingSAE`.
        """
        set_k(self, step_input)
        x = gathered_rows(step_input.sae_in)
        step_input = replace(step_input, sae_in=x)
        start_at(self, step_input)
        with torch.no_grad():
            sae_in = self.process_sae_in(x)
        norm = self.get_W_dec_norm() if self.cfg.rescale_acts_by_decoder_norm else None
        bias = _Shared.apply(self.b_dec) if self.cfg.apply_b_dec_to_input else None
        encoder: dict[str, Any] = {"input_bias": bias, "norm": norm}
        rows, k = self.W_enc.T, int(self.activation_fn.k)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        values, indices = encode_rows(sae_in, rows, self.b_enc, min(k, len(rows)), **encoder)
        scores = values.detach() if norm is None else values.detach() * norm[indices]
        kept = best_of_all(scores, k)
        values, scores = values * kept, scores * kept
        decoded = _Added.apply(decode(values, indices, self.W_dec))
        auxiliary = partial(self._shared_loss, sae_in, rows, encoder, dead=step_input.dead_neuron_mask)
        return self.step_output(x, decoded, values, scores, indices, auxiliary)

    def _shared_loss(
        self, sae_in: Tensor, rows: Tensor, encoder: dict[str, Any], residual: Tensor, dead: Tensor | None
    ) -> Tensor:
        """Return SAELens' auxiliary loss of the dead latents of all processes; those that have none take part."""
        latents = rows.new_zeros(0, dtype=torch.long) if dead is None else dead.nonzero().flatten()
        n_dead = torch.tensor(len(latents), device=rows.device)
        dist.all_reduce(n_dead)
        n_all, k_aux = int(n_dead), residual.shape[-1] // 2
        if not n_all:
            return residual.new_zeros(())
        if self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise ValueError(f"the auxiliary loss is not defined with {self.cfg.normalize_activations!r}")
        k, part = min(k_aux, n_all), residual.new_zeros(residual.shape)
        candidates = residual.new_full((len(residual), k), -torch.inf)
        values = indices = None
        if len(latents):
            norm = None if encoder["norm"] is None else encoder["norm"][latents]
            chosen, W_dec = (SelectRows.apply(each, latents) for each in (rows, self.W_dec))
            few = min(k, len(latents))
            encoder = encoder | {"norm": norm}
            values, indices = encode_rows(sae_in, chosen, self.b_enc[latents], few, relu=False, **encoder)
            candidates[:, :few] = values.detach() if norm is None else values.detach() * norm[indices]
        kept = best_of_all(candidates, k)
        if values is not None and indices is not None:
            part = decode(values * kept[:, : values.shape[1]], indices, W_dec)
        loss = (_Added.apply(part) - residual.detach()).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(n_all / k_aux, 1.0) * loss


def gathered_rows(rows: Float[Tensor, "tokens d"]) -> Float[Tensor, "all_tokens d"]:
    """Return the rows of all processes, in their order; each must have as many."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def best_of_all(scores: Float[Tensor, "tokens n"], k: int) -> Bool[Tensor, "tokens n"]:
    """Return which of this process' candidates are among the k of largest score of all processes' together."""
    parts = [torch.empty_like(scores) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, scores.contiguous())
    n, first = scores.shape[1], dist.get_rank() * scores.shape[1]
    together = torch.cat(parts, dim=1)
    best = torch.zeros_like(together, dtype=torch.bool)
    best.scatter_(1, together.topk(min(k, together.shape[1]), dim=-1, sorted=False).indices, True)
    return best[:, first : first + n]


def _clip_together(sae: ShardedTopK) -> None:
    """Let the last gradient of a backward pass scale all of them, so that the norm of all processes' is at most CLIP."""
    parameters = [p for p in sae.parameters() if p.requires_grad]
    arrived: set[int] = set()

    def clip(parameter: Tensor) -> None:
        arrived.add(id(parameter))
        if len(arrived) < len(parameters):
            return
        arrived.clear()
        own = [p.grad.pow(2).sum() for p in parameters if p is not sae.b_dec and p.grad is not None]
        total = torch.stack(own).sum()
        dist.all_reduce(total)
        norm = (total + sae.b_dec.grad.pow(2).sum()).sqrt()  # pyright: ignore[reportOptionalMemberAccess]
        for p in parameters:
            p.grad.mul_((CLIP / (norm + 1e-6)).clamp(max=1.0))  # pyright: ignore[reportOptionalMemberAccess]

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(clip)


def sharded(sae: SparseTopKTrainingSAE) -> ShardedTopK:
    """Return this process' part of an SAE that all processes have, on its device.

    Raises: UsageError when the latents cannot be shared out equally, or their input is cut into heads.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if sae.cfg.reshape_activations != "none":
        raise UsageError(
            f"reshape_activations is {sae.cfg.reshape_activations!r}; latents are sharded with none alone."
        )
    if sae.cfg.d_sae % world:
        raise UsageError(f"sae.d_sae is {sae.cfg.d_sae}, which {world} processes cannot share equally. Use a multiple.")
    n = sae.cfg.d_sae // world
    part = ShardedTopK(replace(sae.cfg, d_sae=n))
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            axis = LATENT_AXIS.get(name)
            getattr(part, name).copy_(tensor if axis is None else tensor.narrow(axis, rank * n, n))
    part.W_enc.data = latents_first(part.W_enc.data)
    _clip_together(part)
    return part


@torch.no_grad()
def whole(part: ShardedTopK) -> SparseTopKTrainingSAE:
    """Return the SAE of which every process has a part, on every process: it is saved as any `sparse_topk`."""
    world = dist.get_world_size()
    sae = SparseTopKTrainingSAE(replace(part.cfg, d_sae=part.cfg.d_sae * world))
    for name, tensor in part.state_dict().items():
        axis = LATENT_AXIS.get(name)
        parts = [torch.empty_like(tensor.contiguous()) for _ in range(world)]
        dist.all_gather(parts, tensor.contiguous())
        getattr(sae, name).copy_(parts[0] if axis is None else torch.cat(parts, dim=axis))
    return sae


def traffic(tokens: int, d_in: int, k: int, world: int, *, dead: bool) -> dict[str, int]:
    """Return the bytes of each kind that a process hands to the collectives in one step of `tokens` tokens in all.

    What goes over the wire is `gather` times W - 1 and `add` times 2 (W - 1) / W, in a ring. dead: with the auxiliary loss.
    """
    k_aux = d_in // 2 if dead else 0
    gather = tokens // world * d_in + tokens * (k + k_aux)
    add = tokens * d_in * (2 if dead else 1)
    return {"gather": FLOAT * gather, "add": FLOAT * add}
