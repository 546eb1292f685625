"""One SAE trained by several processes: who this one is, and the few messages that make one trainer of all of them.

Every process reads the whole corpus and runs the model on its own blocks of windows; the activations go to all, so that all
draw the same batch from the same buffer and a run's batches are the same whatever their number. Each trains on its part of
the batch. Between the loss and the optimiser gradients are summed, weighted by rows, so SAELens' clip sees the whole
batch's; firing counts are summed before the dead mask is read again; BatchTopK's threshold is that of the whole batch.

Bytes, for W processes, with d_in, d_sae, a batch of B tokens in all, a buffer of R tokens and forward passes of F, b bytes a
number:

    held by each        16 d_sae (2 d_in + 1) + model + (R + W F) d_in b + 4 (B / W) d_sae
    sent by each, step  8 d_sae d_in * 2 (W - 1) / W  +  B d_in b (W - 1) / W  +  4 d_sae

Minerva-7B (7.4 B parameters, bfloat16), d_in 4,096, d_sae 131,072, 8 GPUs, B = 32,768, R = 65,536, F = 8,192: each holds 17.2
GB of weights, gradients and Adam's averages, 14.8 of model, 1.1 of activations and 2.1 of scores, 35.2 GB; it sends 7.5 GB of
gradients and 0.2 of activations a step: 26 ms at 300 GB/s (NVLink), 390 ms at 20 GB/s (PCIe 4). The model up to its middle
takes 30 TFLOP a GPU and step, the encoder 4.4, about 90 ms at 400 TFLOP/s: 77 % of a step is work by NVLink, 19 % by PCIe. A
larger B costs no more messages. On paper: no line of this has met a GPU.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor, nn
from torch.autograd import Variable

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import RUN_FILE, fingerprint, first_difference, package_versions
from sae_italian.models.loading import device_of
from sae_italian.saes import weights_hash
from sae_italian.saes.architectures import start_at
from sae_italian.training.config import RunSpec
from sae_italian.training.shards import ShardedTopK, check_shards

# Their losses are means over tokens, and what they take from the whole batch is made global here.
JOINT = (
    *("standard", "gated", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "matching_pursuit"),
    *("tied", "sparse_topk", "topk_transcoder", "transcoder"),
)
LOST = ("gloo", "NCCL", "peer", "Timed out", "timed out", "Broken pipe", "Connection", "socket")  # in torch's errors
WORLD, GPU_BACKEND = "WORLD_SIZE", "cpu:gloo,cuda:nccl"
ANSWER_SECONDS = 2.0  # in which a process that still runs says so when another one is lost
PATIENCE = timedelta(days=1)  # for what rank 0 does alone, such as an evaluation


class Processes:
    """The processes that train one SAE, seen from the one of number `rank`. Alone, it sends nothing."""

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        self.sizes = [0] * world  # rows of each in the step under way
        self.under_way: list[Any] = []  # messages
        self.patient: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None

    def __deepcopy__(self, memo: Any) -> Processes:
        return self

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def by_first(self, do: Callable[[], object] = lambda: None) -> None:
        """Let rank 0 do something while the others wait."""
        if self.first:
            do()
        if self.world > 1:
            dist.barrier(self.patient)

    def any_of(self, *flags: bool) -> list[bool]:
        """Return which of the flags is up in any process."""
        told = torch.tensor(flags, dtype=torch.uint8)
        if self.world > 1:
            dist.all_reduce(told, dist.ReduceOp.MAX)
        return [bool(flag) for flag in told.tolist()]

    def gathered(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the rows [..., rows, width] of all processes in their order; `sizes`: how many each of the first has."""
        if self.world == 1:
            return rows
        parts = [rows.new_empty(*rows.shape[:-2], size, rows.shape[-1]) for size in sizes]
        if self.rank < len(parts):
            parts[self.rank] = rows.contiguous()
        sent: list[Any] = [dist.broadcast(part, rank, async_op=True) for rank, part in enumerate(parts) if sizes[rank]]
        for message in sent:
            message.wait()
        return torch.cat(parts, dim=-2)

    # --- one step of the trainer --------------------------------------------------------------------------------------

    def adopt(self, sae: Any) -> None:
        """Let the gradients of an SAE, and what its activation function takes of a batch, be those of all processes."""
        if self.world == 1 or isinstance(sae, ShardedTopK):
            return
        for parameter in filter(lambda each: each.requires_grad, sae.parameters()):
            parameter.register_post_accumulate_grad_hook(self._send)
        if hasattr(sae, "topk_threshold"):
            sae.activation_fn, update = _GlobalBatchTopK(sae.activation_fn.k, self), sae.update_topk_threshold
            sae.update_topk_threshold = lambda acts: update(self._least(acts))

    def step(self, trainer: Any, rows: Tensor) -> Any:
        """Take a step of SAELens' trainer on this process' rows, or on all by its latents."""
        if self.world == 1 or isinstance(trainer.sae, ShardedTopK):
            return trainer.step(rows)
        parts = rows.tensor_split(self.world)
        self.sizes = [len(part) for part in parts]
        before, trainer.act_freq_scores = trainer.act_freq_scores, torch.zeros_like(trainer.act_freq_scores)
        with self._started(trainer, rows):
            output = trainer.step(parts[self.rank])
        self._count(trainer, before)
        trainer.n_training_samples += len(rows) - len(parts[self.rank])
        return output

    @contextlib.contextmanager
    def _started(self, trainer: Any, rows: Tensor) -> Iterator[None]:
        """Start `b_dec` at the centre of the whole first batch, of which no process sees more than its part."""
        sae, start = trainer.sae, getattr(trainer.sae.cfg, "start", "zero")
        if trainer.n_training_steps or start == "zero":
            yield
            return
        rows = trainer.activation_scaler(rows.to(sae.device))
        start_at(sae, TrainStepInput(rows, {}, None, 0, False))
        sae.cfg.start = "zero"
        yield
        sae.cfg.start = start

    def _send(self, parameter: Tensor) -> None:
        """Send a gradient as soon as it is whole; all have come before `backward` returns, hence before the clip."""
        grad: Any = parameter.grad
        grad.mul_(self.sizes[self.rank] / sum(self.sizes))
        if not self.under_way:
            Variable._execution_engine.queue_callback(self._receive)
        self.under_way.append(dist.all_reduce(grad if grad.is_contiguous() else grad.T, async_op=True))

    def _receive(self) -> None:
        for message in self.under_way:
            message.wait()
        self.under_way.clear()

    def _count(self, trainer: Any, before: Tensor) -> None:
        """Sum the step's firing counts, and from them both of the trainer's counters: how often, and how long ago."""
        fired = trainer.act_freq_scores
        dist.all_reduce(fired)
        trainer.act_freq_scores = before + fired
        trainer.n_forward_passes_since_fired[fired > 0] = 0

    def _least(self, acts: Tensor) -> Tensor:
        """Return the least positive activation of all processes, 0 where there is none, as [1]."""
        least = torch.where(acts > 0, acts, torch.inf).min().detach()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return torch.where(least.isinf(), 0.0, least)[None]

    def row(self, trainer: Any, output: Any) -> dict[str, Any]:
        """Return the trainer's metrics of a step, over the rows and the latents of all processes."""
        by_latents = isinstance(trainer.sae, ShardedTopK)
        if self.world > 1 and not by_latents:
            whole = {name: self.gathered(getattr(output, name).detach(), self.sizes) for name in ("sae_in", "sae_out")}
            output = replace(output, **whole)
        row = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
        if self.world > 1:  # what was of this process' rows or latents alone, and its share in that of all
            shares = {"metrics/l0": 1, "sparsity/dead_features": 1, "sparsity/mean_passes_since_fired": 1 / self.world}
            if not by_latents:
                means = [key for key in row if key.startswith("losses/") or key == "metrics/l0"]
                shares = dict.fromkeys(means, self.sizes[self.rank] / sum(self.sizes))
            sums = torch.tensor([share * row[key] for key, share in shares.items()], dtype=torch.float64)
            dist.all_reduce(sums)
            row |= {key: type(row[key])(value) for key, value in zip(shares, sums.tolist(), strict=True)}
        return row

    # --- whether all are the same -------------------------------------------------------------------------------------

    def meet(self, out: Path) -> None:
        """Wait until rank 0 holds the folder. Raises: UsageError when this process does not see what was written."""
        self.by_first()
        if not (out / RUN_FILE).is_file():
            raise UsageError(
                f"{out} is not shared with {socket.gethostname()}: what rank 0 writes there is not seen. "
                "Give a folder on a file system that every machine mounts at the same path."
            )

    def compare(self, spec: RunSpec) -> None:
        """Raise UsageError, naming the first that differs, unless all processes have one config and the same versions."""
        told = {"config": spec.model_dump(mode="json"), "versions": package_versions()}
        everyone = self._everyone((socket.gethostname(), told))
        for rank, (host, other) in enumerate(everyone):
            if other != everyone[0][1]:
                difference = first_difference(everyone[0][1], other).replace("is now", f"of rank {rank} is")
                raise UsageError(
                    f"rank {rank} on {host} is not as rank 0 on {everyone[0][0]}: {difference}. "
                    "Start the same command with the same packages everywhere."
                )

    def check_equal(self, run: Any) -> None:
        """Raise UsageError, naming the processes, when weights or counters are not the same bits in all of them."""
        if self.world == 1:
            return
        everyone = self._everyone(_hash_of(run.trainer))
        if apart := [rank for rank, its in enumerate(everyone) if its != everyone[0]]:
            raise UsageError(
                f"after {run.n_steps} steps the weights of ranks {apart} are not those of rank 0; "
                "this state is not saved. Look for a fault of their machines, then --resume."
            )

    def _everyone(self, said: Any) -> list[Any]:
        told: list[Any] = [None] * self.world
        dist.all_gather_object(told, said)
        return told

    def lost(self, error: BaseException) -> UsageError:
        """Return what to say when a message fails: which processes no longer answer."""
        store = dist.distributed_c10d._get_default_store()
        dist.destroy_process_group()  # the others hear of it at once
        try:
            store.set(f"here/{self.rank}", "")
            time.sleep(ANSWER_SECONDS * (1 + 0.5 * self.first))  # rank 0 may keep the store, and goes last
            gone = [rank for rank in range(self.world) if not store.check([f"here/{rank}"])]
        except RuntimeError:
            gone = [0]
        who = f"rank {', '.join(map(str, gone))}" if gone else "another process"
        return UsageError(
            f"{who} of {self.world} was ended or hangs ({' '.join(str(error).split())[-80:]}). "
            "The last checkpoint is kept; --resume continues from it, with any number of processes."
        )


ALONE = Processes()


class _GlobalBatchTopK(nn.Module):
    """SAELens' BatchTopK over the batch of all processes: a process keeps what is not below the last of all that are kept.

    Each sends as many of its largest as could all be kept. Equal values at the threshold are kept all.
    """

    def __init__(self, k: float, processes: Processes):
        super().__init__()
        self.k, self.processes = k, processes

    def forward(self, x: Tensor) -> Tensor:
        acts, sizes = x.relu(), self.processes.sizes
        n_kept, width = int(self.k * sum(sizes)), acts.shape[-1]
        with torch.no_grad():
            n_sent = [min(n_kept, size * width) for size in sizes]
            largest = acts.flatten().topk(n_sent[self.processes.rank]).values
            least = self.processes.gathered(largest[:, None], n_sent).flatten().topk(n_kept).values[-1]
        return acts * (acts >= least)


def _hash_of(trainer: Any) -> str:
    """Return a hash of a trainer's weights, counters and input scale; of sharded latents, what all have."""
    if isinstance(trainer.sae, ShardedTopK):
        return fingerprint([trainer.sae.b_dec.tolist(), trainer.activation_scaler.scaling_factor])
    counters = [each.tolist() for each in (trainer.n_forward_passes_since_fired, trainer.act_freq_scores)]
    return weights_hash(trainer.sae) + fingerprint([*counters, trainer.activation_scaler.scaling_factor])


@contextlib.contextmanager
def joined(spec: RunSpec) -> Iterator[Processes]:
    """Join the processes that RANK and WORLD_SIZE speak of, as torchrun and Ray Train set them; without them, yield ALONE.

    Raises: UsageError for a batch or an architecture that cannot be shared, a process that never joins, one of another
    config or of other packages; and, naming it, when one ends or gives no sign for `process_timeout_seconds` in the block.
    """
    world, rank = (int(os.environ.get(name, default)) for name, default in ((WORLD, 1), ("RANK", 0)))
    if world == 1:
        if spec.shard_latents:
            raise UsageError("shard_latents is for several processes, as --processes 4. Set it to false.")
        yield ALONE
        return
    check_joint(spec, world)
    ours = not dist.is_initialized()
    if ours:
        _connect(spec, rank, world)
    here = None
    try:
        here = Processes(rank, world)
        here.compare(spec)
        yield here
    except UsageError:
        time.sleep(ANSWER_SECONDS * (rank > 0))  # what stops all of them, rank 0 says
        raise
    except RuntimeError as error:
        if here is None or not any(sign in str(error) for sign in LOST):
            raise
        raise here.lost(error) from error
    finally:
        if ours and dist.is_initialized():
            dist.destroy_process_group()


def check_joint(spec: RunSpec, world: int) -> None:
    """Raise UsageError for what so many processes cannot train, and for a device that is not here."""
    if spec.shard_latents:
        check_shards(spec.sae_config(), world)
    architecture = str(spec.sae.get("architecture"))
    if architecture.removeprefix("started_") not in JOINT:
        raise UsageError(
            f"sae.architecture {architecture!r} is not known to train alike in several processes. "
            f"Use one process, or one of {', '.join(JOINT)}."
        )
    if spec.seeds > 1:
        raise UsageError(
            f"seeds is {spec.seeds}; several processes train one seed. Use one process, or leave seeds out."
        )
    if spec.device.startswith("mps"):
        raise UsageError(
            "device is mps, which one process alone can train on. Leave --processes out, or use cpu or cuda."
        )
    device_of(spec.device)
    if spec.train_batch_size_tokens < world:
        raise UsageError(
            f"{world} processes share a batch of {spec.train_batch_size_tokens} tokens, less than one each. "
            "Raise train_batch_size_tokens, or use fewer processes."
        )


def _connect(spec: RunSpec, rank: int, world: int) -> None:
    on_gpu = placed(spec).device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(placed(spec).device)
    wait, place = spec.process_timeout_seconds, ":".join(os.environ.get(f"MASTER_{x}", "?") for x in ("ADDR", "PORT"))
    try:
        dist.init_process_group(GPU_BACKEND if on_gpu else "gloo", timeout=timedelta(seconds=wait))
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        if "EADDRINUSE" in why or "in use" in why:
            told = f"port {place} is in use on this machine. Give another, as torchrun --master-port or MASTER_PORT."
        elif rank == 0 and "ed out" in why:
            told = (
                f"not all {world} processes came to {place} within {wait:g} s. Start the others, then this one again."
            )
        else:
            told = f"rank {rank} of {world} does not reach rank 0 at {place} within {wait:g} s ({why:.150})."
        raise UsageError(told) from error


def placed(spec: RunSpec) -> RunSpec:
    """Return the spec with the device of this process: of several GPUs of a machine, the one of its number there."""
    if spec.device != "cuda" or "LOCAL_RANK" not in os.environ:
        return spec
    return spec.model_copy(update={"device": f"cuda:{os.environ['LOCAL_RANK']}"})
