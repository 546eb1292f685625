"""One reproduction: its steps one after the other, each kept as a file, and the SAEs trained by the paper's recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import read_json, utc_now, write_json
from sae_italian.papers.document import Section
from sae_italian.papers.paper import Paper
from sae_italian.papers.subject import Subject
from sae_italian.training import read_values, spec_from_dict, suite_from_dict, train, train_suite

MINI_WIDTH = 128  # d_in of the model that the recipes in configs/mini are for
SKIPPED = "skipped"
RATIO = 2  # d_sae / d_in in figure 2 of Cunningham et al. 2023
Results = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a reproduction works on; `sae` is an SAE that was given, which is then not trained."""

    paper: Paper
    subject: Subject
    budget: dict[str, Any]
    out: Path
    sae: str | None = None

    def values(self, n_tokens: int, *overrides: str) -> dict[str, Any]:
        """Return the recipe's settings for this model and so many tokens.

        The mini recipes are scaled to the width of the model: k and the L1 coefficient by the square root of d_in / 128
        (k then passes near the papers' 32 of 2,048 and 50 of 4,096), lr by its inverse; warm-up and decay keep their
        shares of the steps.
        """
        values = read_values(self.paper.recipe, *overrides)
        scale = (self.subject.d_in / MINI_WIDTH) ** 0.5
        sae, share = values["sae"], n_tokens / values["training_tokens"]
        if "k" in sae:
            sae["k"] = max(1, round(sae["k"] * scale))
        if "l1_coefficient" in sae:
            sae["l1_coefficient"] *= scale
        for key in ("lr_warm_up_steps", "lr_decay_steps"):
            values[key] = int(values.get(key, 0) * share)
        return values | {
            "model": self.subject.name,
            "corpus": self.subject.corpus,
            "text_column": self.subject.text_column,
            "repeat_corpus": True,
            "context_size": self.subject.context_size,
            "training_tokens": n_tokens,
            "buffer_tokens": min(values["buffer_tokens"], max(n_tokens // 4, values["train_batch_size_tokens"])),
            "lr": values["lr"] / scale,
            "checkpoint_every_tokens": max(n_tokens, 1),
            "seed": values.get("seed", 42),
        }

    def train(
        self, name: str, hook_name: str, d_sae: int, n_tokens: int, *overrides: str, sae: dict[str, Any] | None = None
    ) -> Path:
        """Train one SAE by the recipe into `out/saes/<name>`, or go on where that was stopped; return the folder.

        `sae` replaces the recipe's architecture and its settings, as they are.
        """
        values = self.values(n_tokens, *overrides)
        values |= {"hook_name": hook_name, "sae": (sae or values["sae"]) | {"d_sae": d_sae}}
        folder = self.out / "saes" / name
        return train(spec_from_dict(values), folder, resume=folder.is_dir())

    def train_suite(
        self, name: str, layers: list[int], sites: list[str], expansions: list[float], n_tokens: int, memory_gb: float
    ) -> dict[str, Path]:
        """Train layers x sites x widths on one pass of the model; return the folders by name, e.g. `L1R-8x`."""
        values = self.values(n_tokens)
        del values["hook_name"]
        values["sae"].pop("d_sae", None)
        values["sae"].pop("decoder_init_norm", None)
        values |= {"layers": layers, "sites": sites, "expansions": expansions, "memory_gb": memory_gb}
        folder = self.out / "saes" / name
        return {path.name: path for path in train_suite(suite_from_dict(values), folder, resume=folder.is_dir())}

    def only_trained(self) -> None:
        """Raise UsageError, which skips the step, where an SAE was given."""
        if self.sae is not None:
            raise UsageError("an SAE was given; this part trains others beside it. Leave out --sae to have it.")

    def layers(self, at_most: int) -> list[int]:
        """Return the budget's layers, or so many spread evenly over the model, first and last among them.

        One is the middle layer.
        """
        if self.budget["layers"]:
            return list(self.budget["layers"])
        n = self.subject.n_layers
        if at_most == 1:
            return [(n - 1) // 2]
        if n <= at_most:
            return list(range(n))
        return [round(i * (n - 1) / (at_most - 1)) for i in range(at_most)]


def variant(layer: int, ratio: float, factor: float) -> str:
    """Return the name of the SAE with so many latents per dimension and its L1 coefficient times a factor."""
    return f"L{layer}-{ratio:g}x-l1-{factor:g}"


class Step(NamedTuple):
    """A part of an evaluation: `run` measures (slow, to JSON), `section` writes it down (from JSON alone).

    An optional step that the model or SAE does not allow is reported as skipped, with the reason.
    """

    name: str
    title: tuple[str, str]
    run: Callable[[Job, Results], dict[str, Any]]
    section: Callable[[dict[str, Any], Results], Section]
    optional: bool = False


def run_steps(job: Job, steps: Sequence[Step]) -> tuple[Results, dict[str, float]]:
    """Return the results by step and the seconds each took; steps that are done are read from `out/steps`.

    A step that was skipped is tried again. Raises: UsageError as the steps do, unless they are optional.
    """
    results: Results = {}
    seconds: dict[str, float] = {}
    bar = tqdm(steps, desc=job.paper.name, unit="step", disable=None)
    for i, step in enumerate(bar):
        bar.set_postfix_str(step.name)
        file = job.out / "steps" / f"{i:02}-{step.name}.json"
        kept = read_json(file) if file.is_file() else None
        if kept is None or SKIPPED in kept["result"]:
            started = time.monotonic()
            try:
                result = step.run(job, results)
            except UsageError as error:
                if not step.optional:
                    raise
                result = {SKIPPED: " ".join(str(error).split())}
            kept = {"step": step.name, "created": utc_now(), "seconds": time.monotonic() - started, "result": result}
            write_json(file, kept)
            kept = read_json(file)  # the same types as in a run that is resumed
        results[step.name], seconds[step.name] = kept["result"], kept["seconds"]
    return results, seconds
