"""The SAE's training step: ours against SAELens' `topk`, and against the encoder product and top-k that both need.

Times are of one run: the ways alternate, so a busy machine slows all of them, and a ratio is the median of the ratios of
runs that followed one another. Memory is the peak of a process that did nothing else.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae_italian.base.errors import UsageError

SAELENS, OURS, BARE = "saelens topk", "sae_italian sparse_topk", "encoder product + top-k"
ARCHITECTURES = {SAELENS: "topk", OURS: "sparse_topk"}


class Shape(NamedTuple):
    """The sizes of one step."""

    d_in: int
    d_sae: int
    k: int
    batch: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"d_in {self.d_in:,}, d_sae {self.d_sae:,}, k {self.k}, batch {self.batch:,}, {self.dtype}"


SHAPES = {
    "cpu": [Shape(1152, 9_216, 32, 2048), Shape(1152, 36_864, 32, 2048)],
    "cuda": [Shape(2048, 65_536, k, 8192, "bfloat16") for k in (32, 64)],  # Minerva-1B, 32x
}


def check_device(device: str) -> None:
    """Raise UsageError for a device that is not one of cpu and cuda, or that this machine lacks."""
    if device not in SHAPES:
        raise UsageError(f"--device is {device!r}; it must be one of {', '.join(SHAPES)}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device is 'cuda', but PyTorch sees no CUDA GPU here. Use --device cpu.")


def measure_steps(shape: Shape, *, device: str = "cpu", repeats: int = 5) -> dict[str, Any]:
    """Return seconds of forward and backward of each way, and their ratios to ours (above 1: ours is faster)."""
    x = _inputs(shape, device)
    ways: dict[str, Callable[[], Any]] = {name: _step(shape, name, x) for name in ARCHITECTURES}
    ways[BARE] = _bare(shape, x)
    return _interleaved(ways, shape, device, repeats)


def measure_trainer(shape: Shape, *, device: str = "cpu", repeats: int = 5) -> dict[str, Any]:
    """Return seconds of SAELens' whole `SAETrainer.step` (statistics, clipping, Adam) with each SAE, and the ratios.

    The third way is our SAE with the trainer tuned by `saes.sparse.tune`.
    """
    from sae_italian.saes.sparse import tune

    x = _inputs(shape, device)
    stock, ours, tuned = (_trainer(shape, name, device) for name in (SAELENS, OURS, OURS))
    tune(tuned)
    ways = {SAELENS: stock, f"{OURS}, stock trainer": ours, OURS: tuned}
    return _interleaved({name: lambda t=trainer: t.step(x) for name, trainer in ways.items()}, shape, device, repeats)


def _interleaved(ways: dict[str, Callable[[], Any]], shape: Shape, device: str, repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(repeats + 1):  # the first warms up
        for name, way in ways.items():
            _wait(device)
            started = time.perf_counter()
            way()
            _wait(device)
            if round_:
                seconds[name].append(time.perf_counter() - started)
    ratios = {
        name: [theirs / ours for theirs, ours in zip(runs, seconds[OURS], strict=True)]
        for name, runs in seconds.items()
    }
    return {
        **shape._asdict(),
        "device": device,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "seconds": {name: _spread(runs) for name, runs in seconds.items()},
        "ratio": {name: _spread(runs) for name, runs in ratios.items()},
    }


def _spread(runs: list[float]) -> dict[str, float]:
    return {"median": statistics.median(runs), "min": min(runs), "max": max(runs)}


def _inputs(shape: Shape, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape.batch, shape.d_in, generator=generator).to(device, getattr(torch, shape.dtype))


def _sae(shape: Shape, name: str, device: str) -> Any:
    from sae_lens import TrainingSAE

    torch.manual_seed(0)
    config = {"d_in": shape.d_in, "d_sae": shape.d_sae, "k": shape.k, "dtype": shape.dtype, "device": device}
    return TrainingSAE.from_dict({"architecture": ARCHITECTURES[name], **config})


def _step(shape: Shape, name: str, x: torch.Tensor) -> Callable[[], None]:
    """Return forward and backward of one SAE on x, with no latent dead."""
    from sae_lens.saes.sae import TrainStepInput

    sae = _sae(shape, name, x.device.type)
    dead = torch.zeros(shape.d_sae, dtype=torch.bool, device=x.device)
    given = TrainStepInput(sae_in=x, dead_neuron_mask=dead, coefficients={}, n_training_steps=0, is_logging_step=False)

    def step() -> None:
        sae.zero_grad()
        sae.training_forward_pass(given).loss.backward()

    return step


def _bare(shape: Shape, x: torch.Tensor) -> Callable[[], Any]:
    sae = _sae(shape, SAELENS, x.device.type)
    W_enc, b_enc = sae.W_enc.detach(), sae.b_enc.detach()
    return lambda: torch.addmm(b_enc, x, W_enc).topk(shape.k, dim=-1, sorted=False)


def _trainer(shape: Shape, name: str, device: str) -> Any:
    from sae_lens import LoggingConfig, SAETrainer
    from sae_lens.config import SAETrainerConfig

    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=1_000 * shape.batch,
        device=device,
        autocast=False,
        lr=1e-4,
        lr_end=1e-5,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=shape.batch,
        dead_feature_window=1_000,
        feature_sampling_window=2_000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(cfg=config, sae=_sae(shape, name, device), data_provider=iter(()))


def measure_memory(shape: Shape, *, device: str = "cpu", steps: int = 3) -> dict[str, Any]:
    """Return the peak memory in MiB of each SAE's training steps, each in a process of its own.

    `peak_mib` leaves out what Python and the libraries take before the SAE is made; `process_mib` is all of it (on
    CUDA both are the allocator's peak).
    """
    peaks = {}
    for name in ARCHITECTURES:
        call = f"peak_of({tuple(shape)}, {name!r}, {device!r}, {steps})"
        code = f"import json; from tests.bench.training import peak_of; print(json.dumps({call}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UsageError(f"the memory of {name!r} could not be measured: {done.stderr.strip().splitlines()[-1:]}")
        peaks[name] = json.loads(done.stdout.splitlines()[-1])
    ratio = {name: peak["peak_mib"] / peaks[OURS]["peak_mib"] for name, peak in peaks.items()}
    return {**shape._asdict(), "device": device, "memory": peaks, "ratio": ratio}


def peak_of(sizes: tuple[Any, ...], name: str, device: str, steps: int) -> dict[str, float]:
    """Take some training steps and return the most memory they needed, in this process."""
    shape = Shape(*sizes)
    x = _inputs(shape, device)
    _sae(Shape(2, 4, 1, 1), name, device)  # what importing and first use cost is not the step's
    before = 0.0 if device == "cuda" else _status_mib("VmRSS")
    step = _step(shape, name, x)
    for _ in range(steps):
        step()
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else _status_mib("VmHWM")
    return {"peak_mib": round(peak - before, 1), "process_mib": round(peak, 1)}


def _status_mib(field: str) -> float:
    """Return a memory figure of this process, from Linux; VmHWM is the peak since it started."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise UsageError("the memory of a step is measured on Linux only.")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def times_table(title: str, results: list[dict[str, Any]]) -> str:
    """Return the times of some shapes as one table."""
    lines = []
    for result in results:
        shape = Shape(*(result[field] for field in Shape._fields))
        lines.append(f"{title}: {shape}; {result['device']}, {result['threads']} threads (load {result['load']:.1f})")
        lines.append(f"  {'':40} {'ms, median':>12} {'min .. max':>18} {'against ours':>24}")
        for name, spread in result["seconds"].items():
            ms, ratio = {key: 1000 * value for key, value in spread.items()}, result["ratio"][name]
            lines.append(
                f"  {name:40} {ms['median']:>12,.1f} {ms['min']:>8,.0f} .. {ms['max']:>6,.0f} "
                f"{ratio['median']:>9.2f} ({ratio['min']:.2f} .. {ratio['max']:.2f})"
            )
    return "\n".join(lines)


def memory_table(results: list[dict[str, Any]]) -> str:
    """Return the memory of some shapes as one table."""
    lines = []
    for result in results:
        lines.append(f"peak memory: {Shape(*(result[field] for field in Shape._fields))}; {result['device']}")
        for name, peak in result["memory"].items():
            lines.append(
                f"  {name:40} {peak['peak_mib']:>8,.0f} MiB for the step, {peak['process_mib']:>8,.0f} MiB the process"
                f"   {result['ratio'][name]:.2f}"
            )
    return "\n".join(lines)
