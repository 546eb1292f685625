"""The commands that train and judge SAEs: `train`, `evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sae_italian.cli.base import Commands, Result, folder_options, load_sources, source_options


def add_commands(root: Commands) -> None:
    sub = root.add("train", _train, "train one SAE, or a suite of them")
    sub.add_argument("config", help="a YAML file, or a shipped one such as mini/topk; a suite has `layers`")
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    sub.add_argument("--out", type=Path, help="output folder (default: runs/<config's name>)")
    sub.add_argument("--dry-run", action="store_true", help="print groups, tokens, memory and time; train nothing")
    folder_options(sub)

    sub = root.add("evaluate", _evaluate, "the evaluation card of an SAE, on held-out text")
    sub.add_argument("sae", help="an SAE's folder, or release:sae_id")
    source_options(sub)
    sub.add_argument("--tokens", type=int, default=50_000)


def _train(options: argparse.Namespace) -> Result:
    from sae_italian.training import spec_from_dict, train
    from sae_italian.training.config import SUITE_KEY, read_values
    from sae_italian.training.suite import suite_from_dict, train_suite

    values = read_values(options.config, *options.overrides)
    suite = suite_from_dict(values) if SUITE_KEY in values else None
    if options.dry_run:
        return _dry_run(suite or spec_from_dict(values))
    out = options.out or Path("runs") / Path(options.config).name.removesuffix(".yaml")
    if suite is None:
        train(spec_from_dict(values), out, resume=options.resume, overwrite=options.overwrite)
        return {"sae": str(out)}, f"SAE: {out}"
    folders = train_suite(suite, out, resume=options.resume, overwrite=options.overwrite)
    return {"saes": [str(folder) for folder in folders]}, "\n".join(f"SAE: {folder}" for folder in folders)


def _dry_run(spec: Any) -> Result:
    from sae_italian.training.plan import plan_run, plan_suite
    from sae_italian.training.suite import SuiteSpec

    plan = plan_suite(spec) if isinstance(spec, SuiteSpec) else plan_run(spec)
    return plan.as_dict(), plan.text()


def _evaluate(options: argparse.Namespace) -> Result:
    from sae_italian.training import evaluate

    sae, model, corpus = load_sources(options)
    card = evaluate(
        sae,
        model,
        corpus,
        n_tokens=options.tokens,
        context_size=options.context_size,
        text_column=options.text_column,
        name=options.sae,
    )
    if Path(options.sae).is_dir():
        card.save(Path(options.sae))
    return card.as_dict(), card.markdown()
