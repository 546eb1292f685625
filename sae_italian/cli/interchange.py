"""The commands that exchange feature caches with other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_italian.base.errors import UsageError
from sae_italian.cli.base import Commands, Result, folder_options, sae_name

FORMATS = ("delphi", "datasets")


def add_commands(root: Commands) -> None:
    cache = root.group("cache")
    sub = cache.add("import", _import, "make a cache of one that Delphi wrote, or of exported datasets")
    sub.add_argument("source", type=Path, help="delphi: the folder of one hookpoint; datasets: the export's folder")
    sub.add_argument("--from", required=True, choices=FORMATS, dest="format")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--model", help="delphi: the model, whose tokenizer decodes the windows")
    sub.add_argument("--sae", help="delphi: the SAE's folder or release:sae_id, to name it; for decoder statistics")
    folder_options(sub)


def _import(options: argparse.Namespace) -> Result:
    from sae_italian.cache.delphi_import import import_delphi
    from sae_italian.cache.rows import import_rows

    again = {"resume": options.resume, "overwrite": options.overwrite}
    if options.format == "datasets":
        _only_delphi(options.format, {"--model": options.model, "--sae": options.sae})
        folder = import_rows(options.source, options.out, **again)
        return {"cache": str(folder), "lost": []}, f"cache: {folder}"
    from sae_italian.models import load_model, load_tokenizer
    from sae_italian.saes import load_sae

    if options.sae and not options.model:
        raise UsageError("--sae is given without --model: decoder statistics need both. Add --model, or leave it out.")
    sae = load_sae(options.sae) if options.sae else None
    model = load_model(options.model) if sae is not None else None
    tokenizer = load_tokenizer(options.model) if options.model and model is None else None
    name = sae_name(options.sae) if options.sae else ""
    arguments = {"tokenizer": tokenizer, "model": model, "sae": sae, "sae_name": name}
    folder, lost = import_delphi(options.source, options.out, **arguments, **again)
    text = "\n".join([f"cache: {folder}", "not in it:", *(f"  {line}" for line in lost)])
    return {"cache": str(folder), "lost": lost}, text


def _only_delphi(other: str, options: dict[str, object]) -> None:
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name} is an option of Delphi's format; leave it out for {other}.")
