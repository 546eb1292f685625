"""One TopK SAE whose latents are spread over the processes of a group: for dictionaries that no one device holds.

Each of W processes has d_sae / W latents, with their gradients, Adam's state and counters, and is given the batch [B, d_in]
of all, which the stream has gathered. A step

1. takes each process' own k best latents, gathers their scores, and keeps the k best of all: what the whole SAE keeps;
2. decodes them where they are, and adds the parts of the reconstruction by one all-reduce, whose backward is the identity:
   each process has the loss of the whole, so its latents' gradients need nothing from the others;
3. does both again for the auxiliary loss, with d_in / 2 of the dead latents;
4. clips by the norm of all gradients, one number, before SAELens' trainer clips what its process has.

A run with `shard_latents` is saved as that of the whole SAE: rank 0 gathers weights, Adam's averages and counters, 12 d_sae
(2 d_in + 1) bytes in main memory (`assembled`), and each process takes its part of what it loads (`load_part`).

Bytes that one process sends and gets in a step with float32 (`traffic`): B d_in for the tokens, 2 B d_out for the sum, B k W
for the scores, the same for the auxiliary loss with d_in / 2 for k. They do not grow with d_sae, while replicas add
all gradients, 2 d_sae (d_in + d_out) numbers: 1.07 GB at 65,536 latents of 2,048. Design and arithmetic: reference/multi-process.md.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from sae_italian.base.errors import UsageError
from sae_italian.saes.architectures import SparseTopKTrainingSAE
from sae_italian.saes.sparse import decode

CLIP = 1.0  # SAELens' trainer has no other
LATENT_AXIS = {"W_enc": 1, "W_dec": 0, "b_enc": 0}  # b_dec is everybody's
COUNTERS = ("act_freq_scores", "n_forward_passes_since_fired")  # of the trainer, a number a latent
FLOAT = 4  # bytes


def added(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, without a gradient."""
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


class ShardedTopK(SparseTopKTrainingSAE):
    """This process' latents of a `sparse_topk` SAE. Any SAELens trainer trains it, given the same batch in all processes.

    Losses and reconstruction are those of the whole SAE, `feature_acts` and the trainer's counters those of its latents.
    Made by `sharded`; `whole` gives the SAE back. The process group must be there, with the same d_sae / W everywhere.
    """

    watched = ()  # hooks would see this process' latents alone

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


def check_shards(cfg: Any, world: int = 1) -> None:
    """Raise UsageError, naming what is wrong, unless so many processes can share out an SAE's latents."""
    kind, each, heads = cfg.architecture().removeprefix("started_"), cfg.d_sae // world, cfg.reshape_activations
    narrow = getattr(cfg, "k_anneal_steps", 0) and each < cfg.d_in
    refused = {
        f"sae.architecture is {kind!r}; latents are sharded with sparse_topk alone.": kind != "sparse_topk",
        f"reshape_activations is {heads!r}; latents are sharded with none alone.": heads != "none",
        f"sae.d_sae is {cfg.d_sae}, which {world} processes cannot share equally. Use a multiple.": cfg.d_sae % world,
        f"k falls from d_in, {cfg.d_in}, but each of {world} processes has {each} latents. Use fewer.": narrow,
    }
    for told in filter(refused.get, refused):
        raise UsageError(told)


def sharded(sae: SparseTopKTrainingSAE, device: str | None = None) -> ShardedTopK:
    """Return this process' part of an SAE that all processes have, on the given device, else on its own.

    Raises: UsageError as `check_shards`.
    """
    check_shards(sae.cfg, dist.get_world_size())
    n = sae.cfg.d_sae // dist.get_world_size()
    part = ShardedTopK(replace(sae.cfg, d_sae=n, device=device or sae.cfg.device))
    part.load_state_dict(_each(sae.state_dict(), _own))
    _clip_together(part)
    return part


@torch.no_grad()
def whole(part: ShardedTopK) -> SparseTopKTrainingSAE:
    """Return at rank 0, in main memory, the SAE of which each has a part; elsewhere, that part.

    All processes must call it. The SAE is saved as any `sparse_topk`.
    """
    state = _each(part.state_dict(), _at_first)
    if dist.get_rank():
        return part
    n = part.cfg.d_sae * dist.get_world_size()
    sae = SparseTopKTrainingSAE(replace(part.cfg, d_sae=n, device="meta"))
    sae.load_state_dict(state, assign=True)
    return sae.to("cpu")


def assembled(trainer: Any) -> Any:
    """Return a trainer to be saved: itself, or at rank 0 that of the whole SAE. All must call it."""
    if not isinstance(trainer.sae, ShardedTopK):
        return trainer
    together = copy.copy(trainer)
    together.sae = whole(trainer.sae)
    for name in COUNTERS:
        setattr(together, name, _at_first(getattr(trainer, name), 0))
    state = _moments(trainer.sae, trainer.optimizer.state_dict(), _at_first)
    together.optimizer = SimpleNamespace(state_dict=lambda: state)
    return together


def load_part(trainer: Any, folder: Path) -> None:
    """Let this process' part of an SAE go on from the saved training of a whole one, whoever saved it."""
    part, cfg, state = trainer.sae, trainer.cfg, load_file(folder / SAE_WEIGHTS_FILENAME)
    part.process_state_dict_for_loading(state)
    part.load_state_dict(_each(state, _own))
    cut = trainer.optimizer.register_load_state_dict_pre_hook(lambda _, all_: _moments(part, all_, _own))
    trainer.cfg = replace(cfg, device="cpu")  # where SAELens puts what it reads: the device may not hold it
    trainer.load_trainer_state(folder)
    trainer.cfg = cfg
    cut.remove()
    for name in COUNTERS:
        setattr(trainer, name, _own(getattr(trainer, name), 0).to(cfg.device))


def _own(tensor: Tensor, axis: int | None) -> Tensor:
    """Return this process' part of a tensor that lists latents along an axis; None: all have all of it."""
    n = 0 if axis is None else tensor.shape[axis] // dist.get_world_size()
    return (tensor if axis is None else tensor.narrow(axis, dist.get_rank() * n, n)).clone()


def _at_first(tensor: Tensor, axis: int | None) -> Tensor:
    """Return at rank 0, in main memory, the tensor of which each has a part; elsewhere, that part."""
    if axis == 1:  # laid out as `latents_first`, which Adam wants of its averages too
        return _at_first(tensor.T, 0).T
    if axis is None:
        return tensor.detach().cpu().clone()
    tensor = tensor.detach().cpu().contiguous()
    parts = None if dist.get_rank() else [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.gather(tensor, parts)
    return torch.cat(parts) if parts else tensor


def _each(state: Mapping[str, Tensor], of: Callable[[Tensor, int | None], Tensor]) -> dict[str, Tensor]:
    return {name: of(tensor, LATENT_AXIS.get(name)) for name, tensor in state.items()}


def _moments(part: ShardedTopK, state: Any, of: Callable[[Tensor, int | None], Tensor]) -> dict[str, Any]:
    """Return an optimiser's state with `of` each tensor and its latents' axis; step counts have none."""
    found, axes = {}, [LATENT_AXIS.get(name) for name, _ in part.named_parameters()]
    for n, moments in state["state"].items():
        found[n] = {key: of(tensor, axes[n] if tensor.dim() else None) for key, tensor in moments.items()}
    return {**state, "state": found}


def traffic(tokens: int, d_in: int, k: int, world: int, *, dead: bool) -> dict[str, int]:
    """Return the bytes of each kind that a process hands to the collectives in one step of `tokens` tokens in all.

    What goes over the wire is `gather` times W - 1 and `add` times 2 (W - 1) / W, in a ring. dead: with the auxiliary loss.
    """
    gather = tokens // world * d_in + tokens * (k + (d_in // 2 if dead else 0))
    add = tokens * d_in * (2 if dead else 1)
    return {"gather": FLOAT * gather, "add": FLOAT * add}
