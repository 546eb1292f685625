"""What this checkout takes for the work of another one: `python -m tests.bench kept OTHER`, after `git worktree add OTHER COMMIT`.

Both do the same work from the same files, one after the other in every round, each piece in a process of its own, so that
a busy machine slows both. Counted are the processor seconds of the process and of its children: the wall clock of a shared
machine says more about its neighbours. The other checkout makes the SAE and the cache that both read.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
STEP_SHAPE = {"d_in": 1152, "d_sae": 9_216, "k": 32}
WINDOWS_OF, LATENTS = 200, "200"
PIECES = ("start", "step", "run", "cache", "windows", "autointerp", "browse", "export")
# What only one of the two has to be told; the rest of a command line is the same for both.
N_LATENTS = {True: "--n-latents", False: "--latents"}


def bench_kept(options: argparse.Namespace) -> tuple[Any, str]:
    """Return processor seconds of both checkouts for every piece of work, and the median of the rounds' ratios.

    Raises: UsageError where `options.other` is no checkout of this project; SystemExit with a command's own words where
    one of them fails.
    """
    from sae_italian.base.errors import UsageError  # here, since the other checkout has it elsewhere

    other = options.other.resolve()
    if not (other / "sae_italian" / "__init__.py").is_file():
        raise UsageError(f"{other} holds no sae_italian. Make it: git worktree add {options.other} COMMIT")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sae, cache = str(folder / "sae"), folder / "cache"
        _command(other, "train", "mini/topk", f"training_tokens={options.tokens}", "--out", sae)
        build = ("cache", "build", sae, "--tokens", str(options.tokens), "--out")
        _command(other, *build, str(cache))
        for name in options.pieces or PIECES:
            times: dict[Path, list[float]] = {other: [], HERE: []}
            for number in range(options.repeats):
                for side in (other, HERE) if number % 2 else (HERE, other):
                    out = folder / f"{name}-{number}-{side == HERE}"
                    # A store lies beside its cache, so whoever explains needs a cache of its own.
                    own = shutil.copytree(cache, folder / f"{out.name}-cache") if name == "autointerp" else cache
                    times[side].append(_piece(name, side, build, own, out, options.tokens))
            ratio = statistics.median(ours / theirs for ours, theirs in zip(times[HERE], times[other], strict=True))
            rows.append({"piece": name, "ours": times[HERE], "theirs": times[other], "ratio": ratio})
    return rows, table_of(rows)


def _piece(name: str, side: Path, build: tuple[str, ...], cache: Path, out: Path, tokens: int) -> float:
    """Return the seconds of one piece of work by one checkout; its results go to `out`."""
    match name:
        case "start":
            return _command(side, "--version")
        case "step" | "windows":
            return _part(side, name, str(cache))
        case "run":
            return _command(side, "train", "mini/topk", f"training_tokens={tokens}", "--out", str(out))
        case "cache":
            return _command(side, *build, str(out))
        case "autointerp":
            return _command(side, "autointerp", str(cache), N_LATENTS[side == HERE], LATENTS)
        case "browse":
            return _command(side, "browse", str(cache), "--out", str(out))
    return _command(side, "export", str(cache), "--to", "neuronpedia", "--latents", f"0-{LATENTS}", "--out", str(out))


def _command(side: Path, *words: str) -> float:
    return _used([sys.executable, "-m", "sae_italian.cli", *words], side)


def _part(side: Path, name: str, cache: str) -> float:
    """Return what one step, or one latent's 40 windows, takes: this file run as a script with the other's package."""
    command = [sys.executable, "-P", __file__, name, cache]
    found = subprocess.run(command, env=_environment(side), cwd=side, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{name} of {side}: {found.stderr}")
    return float(found.stdout.split()[-1])


def _environment(side: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(side), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def _used(command: list[str], side: Path) -> float:
    """Return the processor seconds of a command and of what it starts."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=_environment(side), cwd=side, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} in {side}: {said.read().decode()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return the measurement as a Markdown table."""
    lines = ["| work | theirs, s | ours, s | ours / theirs |", "|---|---|---|---|"]
    for row in rows:
        theirs, ours = (statistics.median(row[name]) for name in ("theirs", "ours"))
        lines.append(f"| {row['piece']} | {theirs:.4g} | {ours:.4g} | {row['ratio']:.2f} |")
    return "\n".join(lines)


# --- inside either checkout ------------------------------------------------------------------------------------------


def _step() -> float:
    """Return the median seconds of forward and backward of `sparse_topk` on 2,048 random activations, after a warm-up."""
    import torch
    from sae_lens import TrainingSAE
    from sae_lens.saes.sae import TrainStepInput

    import sae_italian.plugin

    sae_italian.plugin.install()
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict({"architecture": "sparse_topk", **STEP_SHAPE, "dtype": "float32", "device": "cpu"})
    x, dead = torch.randn(2_048, STEP_SHAPE["d_in"]), torch.zeros(STEP_SHAPE["d_sae"], dtype=torch.bool)
    given = TrainStepInput(sae_in=x, dead_neuron_mask=dead, coefficients={}, n_training_steps=0, is_logging_step=False)

    def step() -> None:
        sae.zero_grad()
        sae.training_forward_pass(given).loss.backward()

    return _median(step, range(8))


def _windows(folder: str) -> float:
    """Return the median seconds that the 40 strongest windows of a latent take with their texts, read once before."""
    import numpy as np

    from sae_italian.cache import FeatureCache

    cache = FeatureCache.open(folder)
    live = np.flatnonzero(cache.statistics["count"] > 0)
    chosen = np.random.default_rng(0).choice(live, min(WINDOWS_OF, len(live)), replace=False).tolist()

    def read(latent: int) -> None:
        cache.latent(latent).windows("top", 40).shown()

    return _median(read, [*chosen, *chosen], n=len(chosen))


def _median(work: Any, given: Any, n: int = 7) -> float:
    """Return the median processor seconds of the last n of the calls."""
    times = []
    for each in given:
        begun = time.process_time()
        work(each) if work.__code__.co_argcount else work()
        times.append(time.process_time() - begun)
    return statistics.median(times[-n:])


if __name__ == "__main__":
    print(_step() if sys.argv[1] == "step" else _windows(sys.argv[2]))
