"""One SAE by one process and by two, of one thread each: tokens per second, and how long they wait for messages.

Every process takes the same number of tokens a step, so twice the processes are to do nearly twice the tokens. Rounds of one
and of two alternate. A message's time holds the wait for the other process, also for its turn on a busy machine; processor
time per token does not: it tells what the messages themselves cost.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.models import load_model
from sae_italian.training import load_spec
from sae_italian.training.config import RunSpec
from sae_italian.training.loop import SAERun
from sae_italian.training.processes import joined
from sae_italian.training.run import open_stream
from tests.training.forked import together

MESSAGES = ("gathered", "_receive", "_count", "any_of")


def _steps(spec: RunSpec, model: Any, n_steps: int) -> dict[str, float]:
    """Return what some steps of this process took, after two that are not counted; a step is that of `Loop`."""
    with joined(spec) as processes, tempfile.TemporaryDirectory() as folder:
        waited = [0.0]

        def timed(send: Any) -> Any:
            def sent(*given: Any) -> Any:
                began = time.perf_counter()
                found = send(*given)
                waited[0] += time.perf_counter() - began
                return found

            return sent

        for name in MESSAGES:
            setattr(processes, name, timed(getattr(processes, name)))
        stream = open_stream(spec, model, list(spec.hook_names), processes)
        run = SAERun(spec, model, Path(folder), processes)
        run.prepare(stream)
        for step in range(n_steps + 2):
            if step == 2:
                waited[0], began, cpu = 0.0, time.perf_counter(), time.process_time()
            run.step(next(stream))
            processes.any_of(False)
        return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "waited": waited[0]}


def bench_processes(options: argparse.Namespace) -> tuple[Any, str]:
    """Return rounds and medians as JSON, and as text."""
    settings = [f"{key}={getattr(options, key)}" for key in ("model", "hook_name", "corpus")]
    settings += [f"sae.d_sae={options.d_sae}", "sae.architecture=sparse_topk", "sae.start=mean", "sae.k=32"]
    settings += ["context_size=256", "store_batch_size_prompts=8", "buffer_tokens=16384", "repeat_corpus=true"]
    model, rounds = load_model(options.model), []
    for _ in range(options.repeats):
        row: dict[str, float] = {}
        for n in (1, 2):
            spec = load_spec("mini/topk", *settings, f"train_batch_size_tokens={n * options.tokens}")
            found = together(n, _steps, spec, model, options.steps, seconds=500)
            if not all(isinstance(each, dict) for each in found):
                raise UsageError(f"a process failed: {found}")
            tokens = n * options.tokens * options.steps
            row[f"rate_{n}"] = tokens / max(each["seconds"] for each in found)
            row[f"cpu_{n}"] = 1e6 * sum(each["cpu"] for each in found) / tokens
            row[f"waited_{n}"] = statistics.mean(each["waited"] / each["seconds"] for each in found)
        rounds.append({**row, "speedup": row["rate_2"] / row["rate_1"], "load": os.getloadavg()[0]})
    middle = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    lines = [
        "| processes | tokens/s | waiting for messages | processor time a token |\n|---|---|---|---|\n"
        + "\n".join(
            f"| {n} | {middle[f'rate_{n}']:,.0f} | {100 * middle[f'waited_{n}']:.0f} % | {middle[f'cpu_{n}']:.0f} us |"
            for n in (1, 2)
        ),
        f"\n{middle['speedup']:.2f} times the tokens per second by two (median of {len(rounds)} rounds, "
        f"{min(row['speedup'] for row in rounds):.2f} to {max(row['speedup'] for row in rounds):.2f}); by processor time "
        f"alone {2 * middle['cpu_1'] / middle['cpu_2']:.2f}. Load of the machine {middle['load']:.1f} on "
        f"{os.cpu_count()} cores.",
    ]
    return {"rounds": rounds, "median": middle}, "\n".join(lines)
