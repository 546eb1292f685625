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
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from torch.nn.functional import pad

from sae_italian.base.errors import UsageError
from sae_italian.saes.architectures import SparseTopKTrainingSAE, latents_first
from sae_italian.saes.sparse import decode

CLIP = 1.0  # SAELens' trainer has no other
LATENT_AXIS = {"W_enc": 1, "W_dec": 0, "b_enc": 0}  # b_dec is everybody's
FLOAT = 4  # bytes


def added(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, without a gradient."""
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


class ShardedTopK(SparseTopKTrainingSAE):
    """This process' latents of a `sparse_topk` SAE. Any SAELens trainer trains it; its counters are those of its latents.

    Made by `sharded`; `whole` gives the SAE back. The process group must be there, with the same d_sae / W everywhere.
    """

    watched = ()  # hooks would see this process' latents alone

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return losses and reconstruction of the whole SAE on all processes' tokens; `feature_acts` are this process'.

        Raises: ValueError as `SparseTopKTrainingSAE`.
        """
        return super().training_forward_pass(replace(step_input, sae_in=torch.cat(of_all(step_input.sae_in))))

    def _sparse_input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        sae_in, bias = super()._sparse_input(x)
        bias = None if bias is None else bias.view_as(bias)  # what every process has and uses for its own latents:
        if bias is not None and bias.requires_grad:  # its gradient is the sum over all
            bias.register_hook(added)
        return sae_in, bias

    def _encoded(
        self, sae_in: Tensor, rows: Tensor, b_enc: Tensor, k: int, encoder: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return this process' best, those that are not among the k best of all processes as zeros."""
        here = min(k, len(rows))
        values = scores = sae_in.new_zeros(len(sae_in), 0)
        indices = values.long()
        if here:
            values, scores, indices = super()._encoded(sae_in, rows, b_enc, here, encoder)
        kept = best_of_all(pad(scores, (0, k - here), value=-torch.inf), k)[:, :here]
        return values * kept, scores * kept, indices

    def _decoded(self, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        part = decode(values, indices, W_dec) if indices.numel() else W_dec.new_zeros(len(values), W_dec.shape[1])
        return part - part.detach() + added(part)  # each process has the loss of the whole: its gradient is its own

    def _n_of_all(self, latents: Tensor) -> int:
        return int(added(torch.tensor(len(latents), device=latents.device)))


def of_all(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all processes, in their order; all have one shape."""
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def best_of_all(scores: Float[Tensor, "tokens n"], k: int) -> Bool[Tensor, "tokens n"]:
    """Return which of this process' candidates are among the k of largest score of all processes' together."""
    n, first = scores.shape[1], dist.get_rank() * scores.shape[1]
    together = torch.cat(of_all(scores), dim=1)
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
        norm = (added(torch.stack(own).sum()) + sae.b_dec.grad.pow(2).sum()).sqrt()  # pyright: ignore[reportOptionalMemberAccess]
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
    sae = SparseTopKTrainingSAE(replace(part.cfg, d_sae=part.cfg.d_sae * dist.get_world_size()))
    for name, tensor in part.state_dict().items():
        axis, parts = LATENT_AXIS.get(name), of_all(tensor)
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
