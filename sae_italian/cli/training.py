"""The commands that train and judge SAEs: `train`, `evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import write_text
from sae_italian.cli.base import (
    Commands,
    Result,
    engine_options,
    folder_options,
    load_sources,
    positive,
    source_options,
    unit_map,
)


def add_commands(root: Commands) -> None:
    sub = root.add("train", _train, "train one SAE, or a suite of them")
    sub.add_argument("config", help="a YAML file, or a shipped one such as mini/topk; a suite has `layers`")
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    sub.add_argument("--out", type=Path, help="output folder (default: runs/<config's name>)")
    sub.add_argument("--dry-run", action="store_true", help="print groups, tokens, memory and time; train nothing")
    folder_options(sub)
    engine_options(sub, "groups of a suite trained at the same time (default 1)")

    sub = root.add("evaluate", _evaluate, "the evaluation card of an SAE, on held-out text")
    sub.add_argument("sae", help="an SAE's folder, or release:sae_id")
    source_options(sub)
    sub.add_argument("--tokens", type=int, default=100_000, help="held-out tokens, special ones not counted")
    sub.add_argument("--loss-tokens", type=int, help="measure losses and KL on the first so many only (default: all)")

    sub = root.add("curves", _curves, "a run's loss, L0, explained variance and dead latents beside a healthy run's")
    sub.add_argument("run", nargs="?", help="a training's folder")
    sub.add_argument("--reference", help="a recipe with a recorded curve (default: the one nearest to the run)")
    sub.add_argument("--out", type=Path, help="the picture (default: curves.svg in the run's folder)")
    text = "train recipes anew, in full and shortened, and record their curves (all of configs/mini when none is named)"
    sub.add_argument("--short-only", action="store_true", help="with --record: leave the full curves as they are")
    sub.add_argument("--record", nargs="*", metavar="RECIPE", help=text)


def _train(options: argparse.Namespace) -> Result:
    from sae_italian.training import spec_from_dict, train
    from sae_italian.training.config import SUITE_KEY, read_values
    from sae_italian.training.logging import sweep_folder
    from sae_italian.training.suite import suite_from_dict, train_suite

    values = read_values(options.config, *options.overrides)
    suite = suite_from_dict(values) if SUITE_KEY in values else None
    if options.dry_run:
        return _dry_run(suite or spec_from_dict(values))
    out = options.out or sweep_folder(Path("runs") / Path(options.config).name.removesuffix(".yaml"))
    if suite is None:
        if options.engine != "local" or options.workers:
            raise UsageError("--engine and --workers are for suites, whose groups are independent; this is one SAE.")
        train(spec_from_dict(values), out, resume=options.resume, overwrite=options.overwrite)
        return {"sae": str(out)}, f"SAE: {out}"
    out = out.resolve()  # a worker may have another working directory
    elsewhere = options.engine != "local" or (options.workers or 1) > 1
    run_units = {"run_units": unit_map(options, out, gpus=float(suite.on_gpu))} if elsewhere else {}
    folders = train_suite(suite, out, resume=options.resume, overwrite=options.overwrite, **run_units)
    return {"saes": [str(folder) for folder in folders]}, "\n".join(f"SAE: {folder}" for folder in folders)


def _dry_run(spec: Any) -> Result:
    from sae_italian.training.plan import plan_run, plan_suite
    from sae_italian.training.suite import SuiteSpec

    plan = plan_suite(spec) if isinstance(spec, SuiteSpec) else plan_run(spec)
    return plan.as_dict(), plan.text()


def _evaluate(options: argparse.Namespace) -> Result:
    from sae_italian.evaluation import evaluate

    positive("--loss-tokens", options.loss_tokens)
    sae, model, corpus = load_sources(options)
    card = evaluate(
        sae,
        model,
        corpus,
        n_tokens=options.tokens,
        loss_tokens=options.loss_tokens,
        context_size=options.context_size,
        text_column=options.text_column,
        name=options.sae,
    )
    if Path(options.sae).is_dir():
        card.save(Path(options.sae))
    return card.as_dict(), card.markdown()


def _curves(options: argparse.Namespace) -> Result:
    from sae_italian.training import curves

    if options.record is not None:
        if options.run:
            raise UsageError("give a run to look at, or --record; not both.")
        files = [curves.record(name, full=not options.short_only) for name in options.record or curves.recipes()]
        return [str(file) for file in files], "\n".join(str(file) for file in files)
    if not options.run:
        raise UsageError("give a training's folder, or --record.")
    report = curves.compare(Path(options.run), options.reference)
    out = options.out or Path(options.run) / "curves.svg"
    write_text(out, report.svg())
    return {**report.as_dict(), "picture": str(out)}, report.text() + f"\npicture: {out}"
