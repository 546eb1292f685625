"""The command `shift`: the evaluation card's numbers by context, genre, language or model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.cli.base import Commands, Result, load_sources, positive, sae_name, source_options


def add_commands(root: Commands) -> None:
    text = "L0, explained variance and loss beyond the training's context, on other texts, languages or models"
    sub = root.add("shift", _shift, text)
    sub.add_argument("sae", help="an SAE's folder, or release:sae_id")
    sub.add_argument("--by", required=True, choices=("context", "genre", "language", "model"))
    source_options(sub)
    sub.add_argument("--out", type=Path, required=True, help="folder for shift.json, shift.md and shift.svg")
    sub.add_argument(
        "--tokens", type=int, default=20_000, help="at most, per bucket; by context in all (default 20000)"
    )
    sub.add_argument("--split", default="heldout", choices=("train", "heldout", "all"))
    text = "genre and language: the buckets, the first one the reference (genre: default, each file of the corpus)"
    sub.add_argument("--corpora", nargs="+", default=[], metavar="NAME=CORPUS", help=text)
    text = "model: those compared with the SAE's own, of the same width, e.g. a fine-tuned one"
    sub.add_argument("--models", nargs="+", default=[], metavar="NAME=MODEL", help=text)
    sub.add_argument("--edges", help="context: the buckets' bounds in tokens, e.g. 0,128,256,512")
    sub.add_argument("--packed", action="store_true", help="context: fill windows with short documents")


def _shift(options: argparse.Namespace) -> Result:
    from sae_italian.analysis.shift import Condition, context_shift, shift
    from sae_italian.models import load_model

    _check(options)
    sae, model, corpus = load_sources(options)
    name, column = sae_name(options.sae), options.text_column
    if options.by == "context":
        result = context_shift(
            sae,
            model,
            corpus,
            edges=_edges(options.edges),
            n_tokens=options.tokens,
            split=options.split,
            packed=options.packed,
            text_column=column,
            name=name,
        )
    else:
        if options.by == "model":
            models = {"base": model} | {key: load_model(value) for key, value in named(options.models).items()}
            conditions = [Condition(key, value, corpus, options.split, column) for key, value in models.items()]
        else:
            parts = named(options.corpora) if options.corpora else _files(corpus)
            conditions = [Condition(key, model, value, options.split, column) for key, value in parts.items()]
        result = shift(
            sae, conditions, by=options.by, n_tokens=options.tokens, context_size=options.context_size, name=name
        )
    result.save(options.out)
    text = [*result.table(), "", f"changes against {result.reference}", "", *result.changes(), *result.notes()]
    return result.as_dict(), "\n".join([*text, f"picture: {options.out / 'shift.svg'}"])


def _check(options: argparse.Namespace) -> None:
    """Refuse options that the kind of shift does not use, and ask for those it needs. Raises: UsageError."""
    used = {"context": {"edges", "packed"}, "genre": {"corpora"}, "language": {"corpora"}, "model": {"models"}}
    for key in ("edges", "packed", "corpora", "models"):
        if getattr(options, key) and key not in used[options.by]:
            fitting = " or ".join(by for by, keys in used.items() if key in keys)
            raise UsageError(f"--{key} is for --by {fitting}, not for --by {options.by}. Leave it out.")
    if options.by == "context" and options.context_size:
        raise UsageError("--context-size is for whole windows; by context give --edges, the buckets' bounds.")
    if options.by == "language" and len(options.corpora) < 2:
        raise UsageError(
            "--by language needs --corpora NAME=CORPUS two times or more, e.g. it=notizie.jsonl en=news.jsonl."
        )
    if options.by == "model" and not options.models:
        raise UsageError("--by model needs --models NAME=MODEL, e.g. instruct=./tuned-model.")
    positive("--tokens", options.tokens)


def named(pairs: list[str]) -> dict[str, str]:
    """Return name and value of each NAME=VALUE. Raises: UsageError for another form, or a name given twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value) or name in found:
            raise UsageError(f"{pair!r}: NAME=VALUE was expected, each name once.")
        found[name] = value
    return found


def _edges(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--edges is {text!r}; numbers with commas were expected, e.g. 0,128,256,512.") from error


def _files(corpus: str) -> dict[str, Any]:
    """Return each file of a corpus folder by its name without endings. Raises: UsageError when it is no such folder."""
    from sae_italian.corpora.locate import local_shards

    folder = Path(corpus)
    if not folder.is_dir():
        raise UsageError(f"the corpus {corpus} is no folder of files, one per genre; give --corpora NAME=CORPUS ...")
    files = [folder / shard.name for shard in local_shards(folder)]
    return {file.relative_to(folder).as_posix().split(".")[0]: str(file) for file in files}
