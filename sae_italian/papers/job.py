"""The papers as data, and one reproduction: a model and a text, its steps one after the other, each kept as a file."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_italian.base.errors import UsageError, check_known
from sae_italian.base.labels import kinds_of, read_words
from sae_italian.base.pace import Pace, time_bound
from sae_italian.base.storage import read_json, read_yaml, utc_now, write_json
from sae_italian.corpora.stream import MICRO_ITALIANO
from sae_italian.models import load_model, parse_hook_name
from sae_italian.models.activations import check_context
from sae_italian.papers.report import lookup, shown
from sae_italian.saes import load_sae, model_of
from sae_italian.training import read_values, train, train_suite

MINI = "sae-italian-mini"
MINI_WIDTH = 128  # d_in of the model that the recipes in configs/mini are for
SKIPPED = "skipped"  # key of the result of a step that could not be done, with the reason
NOT_BEGUN = "not begun when the minutes were over; the same command with --resume goes on"
RATIO = 2  # d_sae / d_in in figure 2 of Cunningham et al. 2023
Results = dict[str, Any]


class Subject(NamedTuple):
    """A loaded model (backend `hf`) with the text it is studied on."""

    model: Any
    name: str
    corpus: str
    text_column: str
    context_size: int  # tokens

    @property
    def n_layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def d_in(self) -> int:
        return self.model.config.hidden_size

    @property
    def reading(self) -> dict[str, Any]:
        """Return how its text is read, as the functions that read it take it."""
        return {"context_size": self.context_size, "text_column": self.text_column}


def open_subject(
    name: str | None,
    *,
    sae: Any = None,
    corpus: str | None = None,
    text_column: str = "text",
    context_size: int | None = None,
) -> Subject:
    """Load a model (its SAE's, else the mini one) and settle its text: given, the SAE's own, or the mini model's.

    Raises: UsageError when no model or text is known, or the context exceeds the model's.
    """
    metadata = sae.cfg.metadata if sae is not None else None
    model = load_model(name or MINI) if sae is None else model_of(sae, name)
    saved = model.loaded_from["name"]
    corpus = corpus or getattr(metadata, "dataset_path", None) or (MICRO_ITALIANO if saved == MINI else None)
    if corpus is None:
        raise UsageError(f"which text should {saved} read? Give --corpus, a local file or a name of `corpora list`.")
    context = int(context_size or getattr(metadata, "context_size", None) or 128)
    return Subject(model, saved, str(corpus), text_column, check_context(context, model.config))


def facts_of(folder: str | Path) -> dict[str, Any]:
    """Return what a report says of an SAE in a folder, or release:sae_id; `expansion` is latents per dimension."""
    cfg = load_sae(folder).cfg
    hook = parse_hook_name(cfg.metadata.hook_name)
    place = {"folder": str(folder), "layer": hook.layer, "site": hook.site or "R", "hook_name": cfg.metadata.hook_name}
    sizes = {"d_in": cfg.d_in, "d_sae": cfg.d_sae, "expansion": cfg.d_sae / cfg.d_in}
    return {**place, "architecture": cfg.architecture(), **sizes}


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """Return what a JSON file holds, made and written first where it is not there."""
    if not file.is_file():
        write_json(file, make())
    return read_json(file)  # the same types whether it was there or not


class Reproduction(NamedTuple):
    """What a reproduction works on; `sae` is an SAE that was given, which is then not trained."""

    paper: Paper
    subject: Subject
    budget: dict[str, Any]
    out: Path
    sae: str | None = None

    @property
    def scale(self) -> float:
        """By what k and L1 coefficients of the mini recipes are multiplied for this model's width."""
        return (self.subject.d_in / MINI_WIDTH) ** 0.5

    def values(self, n_tokens: int, *overrides: str) -> dict[str, Any]:
        """Return the recipe's settings for this model and so many tokens.

        The mini recipes are scaled to the width of the model: k and the L1 coefficient by the square root of d_in / 128
        (k then passes near the papers' 32 of 2,048 and 50 of 4,096), lr by its inverse; warm-up and decay keep their
        shares of the steps.
        """
        values, scale = read_values(self.paper.recipe, *overrides), self.scale
        sae, share = values["sae"], n_tokens / values["training_tokens"]
        if "k" in sae:
            sae["k"] = max(1, round(sae["k"] * scale))
        if "l1_coefficient" in sae:
            sae["l1_coefficient"] *= scale
        if self.budget.get("start"):
            sae["start"] = self.budget["start"]
        for key in ("lr_warm_up_steps", "lr_decay_steps"):
            values[key] = int(values.get(key, 0) * share)
        return values | {
            "model": self.subject.name,
            "corpus": self.subject.corpus,
            "repeat_corpus": True,
            **self.subject.reading,
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
        return train(values, folder, resume=folder.is_dir())

    def train_suite(self, layers: list[int]) -> list[Path]:
        """Train the budget's sites and widths on one pass of the model; return the folders, e.g. `L1R-8x`."""
        values = self.values(self.budget["train_tokens"])
        del values["hook_name"]
        for key in ("d_sae", "decoder_init_norm"):
            values["sae"].pop(key, None)
        values |= {"layers": layers, **{key: self.budget[key] for key in ("sites", "expansions", "memory_gb")}}
        folder = self.out / "saes" / "suite"
        return train_suite(values, folder, resume=folder.is_dir())

    def layers(self, at_most: int) -> list[int]:
        """Return the budget's layers, or so many spread evenly over the model, first and last among them.

        One is the middle layer.
        """
        if self.budget["layers"]:
            return list(self.budget["layers"])
        last = self.subject.n_layers - 1
        spread = np.linspace(0, last, min(at_most, last + 1)).round().astype(int).tolist()
        return [last // 2] if at_most == 1 else spread


Step = Callable[[Reproduction, Results], dict[str, Any]]
"""A part of an evaluation: what it returns, of the results so far, goes to JSON; `svg` in it is the part's picture.

Its words and tables stand in the paper's YAML. One that is `optional` there, and that the model or SAE does not allow, is
reported as skipped, with the reason; so is one that `trains` other SAEs where an SAE was given.
"""


def run_steps(job: Reproduction, steps: dict[str, Step]) -> tuple[Results, dict[str, float]]:
    """Return the results by step and the seconds each took; steps that are done are read from `out/steps`.

    Skipped ones are tried again; when the time is over, the rest is skipped. Raises: UsageError of one that must not be.
    """
    results: Results = {}
    seconds: dict[str, float] = {}
    pace, over = Pace(job.paper.name, len(steps), "step"), False
    with pace.bar:
        for i, (name, step) in enumerate(steps.items()):
            done = {"result": {SKIPPED: NOT_BEGUN}, "seconds": 0.0}
            if not over:
                pace.bar.set_postfix_str(name)
                file = job.out / "steps" / f"{i:02}-{name}.json"
                if not file.is_file() or SKIPPED in read_json(file)["result"]:
                    with time_bound():  # a step is done whole; the time ends the work between steps
                        write_json(file, _done(name, step, job, results))
                done, over = read_json(file), pace.step()
            results[name], seconds[name] = done["result"], done["seconds"]
    return results, seconds


def _done(name: str, step: Step, job: Reproduction, results: Results) -> dict[str, Any]:
    started, words = time.monotonic(), job.paper.steps[name]
    try:
        if job.sae is not None and words.get("trains"):
            raise UsageError("an SAE was given; this part trains others beside it. Leave out --sae to have it.")
        result = step(job, results)
    except UsageError as error:
        if not words.get("optional"):
            raise
        result = {SKIPPED: " ".join(str(error).split())}
    return {"step": name, "created": utc_now(), "seconds": time.monotonic() - started, "result": result}


# --- the papers ------------------------------------------------------------------------------------------------------


# types of the budget's keys that are null
_NO_DEFAULT = {"layer": int | None, "layers": list[int] | None, "start": str | None}
Words = dict[str, str]  # en, it


class Paper(NamedTuple):
    """One YAML of `data`."""

    name: str
    title: str
    authors: str
    link: str
    setting: Words
    recipe: str
    """The shipped config of the mini model that is scaled to the model given."""
    budget: dict[str, Any]
    figures: list[dict[str, Any]]
    """What it says and where; `ours` is the path of the same in the results by step, `*` for each of a list."""
    steps: dict[str, dict[str, Any]]
    """In order: title, text and tables of each step's section, as `report.section_of` reads them; whether it is
    `optional` and `trains` SAEs beside the first."""

    def with_budget(self, *overrides: str) -> dict[str, Any]:
        """Return the budget with `key=value` overrides. Raises: UsageError as `read_words`."""
        kinds = {key: _NO_DEFAULT.get(key, kind) for key, kind in kinds_of(self.budget).items()}
        return self.budget | read_words(overrides, kinds)

    def beside(self, results: dict[str, Any]) -> list[dict[str, str]]:
        """Return the paper's figures with ours beside them, as text; a dash where there is none."""
        rows = []
        for figure in self.figures:
            ours, percent = lookup(results, figure["ours"]), figure.get("percent", False)
            each = [shown(value, percent=percent) for value in (ours if isinstance(ours, list) else [ours])]
            what = {"what": figure["what"]["en"], "what_it": figure["what"]["it"], "where": figure["where"]}
            rows.append(what | {"paper": str(figure["value"]), "ours": "; ".join(each) or "-"})
        return rows


PAPERS = {
    file.stem: Paper(name=file.stem, **read_yaml(file))
    for file in sorted(Path(__file__).with_name("data").glob("*.yaml"))
}


def paper(name: str) -> Paper:
    """Return one paper. Raises: UsageError for an unknown one, naming the nearest."""
    check_known("paper", PAPERS, name)
    return PAPERS[name]
