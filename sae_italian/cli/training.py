"""The commands that train and judge SAEs: `train`, `evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_italian.cli.base import Commands, Result, folder_options, load_sources, source_options


def add_commands(root: Commands) -> None:
    sub = root.add("train", _train, "train one SAE")
    sub.add_argument("config")
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    sub.add_argument("--out", type=Path, help="output folder (default: runs/<config's name>)")
    folder_options(sub)

    sub = root.add("evaluate", _evaluate, "the evaluation card of an SAE, on held-out text")
    sub.add_argument("sae", help="an SAE's folder, or release:sae_id")
    source_options(sub)
    sub.add_argument("--tokens", type=int, default=50_000)


def _train(options: argparse.Namespace) -> Result:
    from sae_italian.training import load_spec, train

    spec = load_spec(options.config, *options.overrides)
    out = options.out or Path("runs") / Path(options.config).with_suffix("").name
    train(spec, out, resume=options.resume, overwrite=options.overwrite)
    return {"sae": str(out)}, f"SAE: {out}"


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
