"""`train --dry-run`: groups, tokens, memory, and the time that a measured probe lets expect."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sae_italian.base.errors import UsageError
from sae_italian.models import load_model
from sae_italian.models.activations import read_many
from sae_italian.training.config import RunSpec
from sae_italian.training.memory import GB, Memory, memory_of
from sae_italian.training.suite import SuiteSpec
from sae_italian.training.transcoder_run import open_run

REPEATS = 3


@dataclass(frozen=True)
class GroupPlan:
    """One pass of the model; `seconds` is None where nothing could be measured."""

    names: list[str]
    tokens: int
    memory: Memory
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    groups: list[GroupPlan]
    memory_gb: float | None  # what the suite may take
    note: str  # what was measured, or why not

    @property
    def seconds(self) -> float | None:
        known = [group.seconds for group in self.groups if group.seconds is not None]
        return sum(known) if len(known) == len(self.groups) else None

    def as_dict(self) -> dict[str, Any]:
        rows = [{**asdict(group), "memory_gb": group.memory.total_gb} for group in self.groups]
        return {"groups": rows, "seconds": self.seconds, "memory_gb": self.memory_gb, "note": self.note}

    def text(self) -> str:
        lines = []
        for number, group in enumerate(self.groups):
            lines.append(
                f"group {number}: {_count(len(group.names), 'SAE')}, {group.tokens:,} tokens, "
                f"memory {group.memory.text()}, time {_span(group.seconds)}"
            )
            lines.append(f"  {' '.join(group.names)}")
        n_saes, n_groups = sum(len(group.names) for group in self.groups), len(self.groups)
        limit = f" of {self.memory_gb:g} GB given" if self.memory_gb is not None else ""
        largest = max(group.memory.total_gb for group in self.groups)
        total = (
            f"{_count(n_saes, 'SAE')} in {_count(n_groups, 'group')}; largest group {largest:.2f} GB{limit}; "
            f"time {_span(self.seconds)}"
        )
        return "\n".join([*lines, total, self.note])


def plan_suite(suite: SuiteSpec) -> Plan:
    """Return the plan of a suite. Raises: UsageError as `SuiteSpec.groups`."""
    members = suite.members()
    return _plan([{name: members[name] for name in names} for names in suite.groups()], suite.memory_gb)


def plan_run(spec: RunSpec) -> Plan:
    """Return the plan of one SAE. Raises: UsageError as `RunSpec.sae_config`."""
    return _plan([{"SAE": spec}], None)


def _plan(groups: Sequence[dict[str, RunSpec]], memory_gb: float | None) -> Plan:
    seconds: list[float | None] = [None] * len(groups)
    memories = [memory_of(list(group.values())) for group in groups]
    try:
        probe = _Probe(next(iter(groups[0].values())), max(memory.total_gb for memory in memories))
        seconds = [probe.seconds(list(group.values())) for group in groups]
        note = probe.note()
    except UsageError as error:
        note = f"The time is not known: {error}"
    plans = [
        GroupPlan(list(group), next(iter(group.values())).training_tokens, memory, span)
        for group, memory, span in zip(groups, memories, seconds, strict=True)
    ]
    return Plan(plans, memory_gb, note)


class _Probe:
    """Times of this machine: the model's tokens per second up to a layer, and a training step of each shape of SAE.

    Raises: UsageError when the model cannot be loaded, or the memory is not there.
    """

    def __init__(self, spec: RunSpec, needed_gb: float):
        free = _free_gb(spec.device)
        if needed_gb > free:
            raise UsageError(f"the probe needs {needed_gb:.1f} GB as the run does, and {free:.1f} GB are free here.")
        self.spec = spec
        self.model = load_model(spec.model, dtype=spec.dtype, device=spec.device)
        self.forwards: dict[tuple[str, ...], float] = {}
        self.steps: dict[str, float] = {}

    def seconds(self, specs: Sequence[RunSpec]) -> float:
        """Return the time of training these SAEs on one pass."""
        hooks = tuple(dict.fromkeys(hook for spec in specs for hook in (spec.hook_name, spec.hook_name_out) if hook))
        n_tokens, batch = specs[0].training_tokens, specs[0].train_batch_size_tokens
        return n_tokens * self._forward(hooks) + n_tokens / batch * sum(self._step(spec) for spec in specs)

    def note(self) -> str:
        per_second = 1 / max(self.forwards.values())
        steps = ", ".join(f"{1000 * value:.0f}" for value in self.steps.values())
        return (
            f"Measured on {self.spec.device}: {per_second:,.0f} tokens/s through the model, SAE steps of {steps} ms (medians of "
            f"{REPEATS}); reading the corpus, checkpoints and evaluations are not in it."
        )

    def _forward(self, hooks: tuple[str, ...]) -> float:
        """Return seconds per token."""
        if hooks not in self.forwards:
            spec, vocab = self.spec, self.model.config.vocab_size
            shape = (spec.store_batch_size_prompts, spec.context_size)
            tokens = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(0)).to(self.model.device)
            self.forwards[hooks] = _timed(lambda: read_many(self.model, tokens, hooks)) / tokens.numel()
        return self.forwards[hooks]

    def _step(self, spec: RunSpec) -> float:
        """Return seconds per training step, the k of the end being used."""
        config = spec.sae_config()
        shape = str((config.architecture(), config.d_in, config.d_sae, spec.train_batch_size_tokens))
        if shape not in self.steps:
            with tempfile.TemporaryDirectory() as folder:
                plain = spec.model_copy(update={"k_anneal_share": 0.0})
                run = open_run(plain, self.model, Path(folder))
                size = (spec.train_batch_size_tokens, config.d_in)
                batch = {name: torch.randn(size, device=spec.device) for name in run.hook_names}
                self.steps[shape] = _timed(lambda: run.step(batch))
        return self.steps[shape]


def _timed(function: Callable[[], Any]) -> float:
    """Return the median time of a call, the first one left out."""
    times = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _free_gb(device: str) -> float:
    """Return what is free now, on the GPU or in RAM."""
    import psutil

    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / GB
    return psutil.virtual_memory().available / GB


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
