"""Published SAEs: those we add to SAELens' tables, the loaders they need, and the list of all that concern Italian.

A repository `owner/name@revision` pins a revision; the commit that was loaded is recorded as `metadata.revision`.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_italian.base.hub import explain
from sae_italian.models.catalogue import catalogue
from sae_italian.saes.foreign import LLAMA_SCOPE, SPARSIFY, Format

LLAMA_SCOPE_MODEL = "meta-llama/Llama-3.1-8B"


@dataclass(frozen=True)
class Release:
    """One published release: its SAEs by id, each with the folder of the repository it lies in."""

    name: str
    repo_id: str
    model: str
    loader: str
    saes: dict[str, str]
    d_sae: int
    k: int | None
    site: str
    licence: str
    note: str


@cache
def releases() -> dict[str, Release]:
    """Return the releases of releases.yaml by name."""
    import yaml

    text = resources.files("sae_italian.saes").joinpath("releases.yaml").read_text(encoding="utf-8")
    found = {}
    for name, fields in yaml.safe_load(text).items():
        id_, path = fields.pop("id"), fields.pop("path")
        saes = {id_.format(layer=layer): path.format(layer=layer) for layer in range(fields.pop("layers"))}
        found[name] = Release(name=name, saes=saes, **fields)
    return found


def known_releases() -> list[dict[str, Any]]:
    """Return one row per release for `saes list`: ours, and SAELens' own for a model that we know or Llama Scope's."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    models = {entry.name for entry in catalogue().values()} | {LLAMA_SCOPE_MODEL}
    rows = []
    for name, lookup in get_pretrained_saes_directory().items():
        if lookup.model in models:
            ids = list(lookup.saes_map)
            row = {"release": name, "model": lookup.model, "repo": lookup.repo_id, "saes": len(ids), "ids": ids}
            mine = releases().get(name)
            keys = ("d_sae", "k", "site", "licence", "note")
            rows.append(row | ({key: getattr(mine, key) for key in keys} if mine else _facts_of_saelens(name)))
    return rows


def _facts_of_saelens(name: str) -> dict[str, Any]:
    """Return width, k, site and licence of SAELens' Llama Scope releases, named `llama_scope_lx{r,a,m}_{8,32}x`."""
    site, _, width = name.removeprefix("llama_scope_lx").partition("_")
    if width not in ("8x", "32x"):
        return {"d_sae": None, "k": None, "site": None, "licence": "see its page", "note": "as SAELens loads it"}
    bad = (site, width) == ("a", "32x")
    note = "not recommended by its authors: many inactive latents" if bad else "as SAELens loads it"
    d_sae = 4096 * int(width.removesuffix("x"))
    return {"d_sae": d_sae, "k": 50, "site": site.upper(), "licence": "Apache-2.0", "note": note}


def sae_facts(name: str | Path) -> dict[str, Any]:
    """Return the configuration and metadata of an SAE in one level, what matters most first.

    Of a release of `sae-italian saes list` or of SAELens only the configuration is fetched. Raises: as `load_sae`.
    """
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    from sae_italian.saes.loading import load_sae

    release, _, sae_id = str(name).partition(":")
    known = get_pretrained_saes_directory().get(release)
    if Path(name).expanduser().is_dir() or known is None or sae_id not in known.saes_map:
        config = load_sae(name).cfg.to_dict()
    else:
        try:
            config = dict(load_sae_config_from_huggingface(release, sae_id))
        except (OSError, ValueError) as error:
            raise explain(error, str(name), None, repo_id=known.repo_id) from error
    metadata = config.pop("metadata", {})
    facts = config | {key: value for key, value in metadata.items() if key not in config}
    first = ("architecture", "d_in", "d_sae", "d_out", "k", "hook_name", "hook_name_out", "model_name", "dataset_path")
    return {key: facts[key] for key in (*(key for key in first if key in facts), *(k for k in facts if k not in first))}


# --- loaders, as SAELens calls them -------------------------------------------------------------------------------------


def _load(
    form: Format,
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    folder = _fetch(repo_id, folder_name, (form.config, form.weights), force_download)
    config, state = form.read(folder, device, cfg_overrides)
    return _described(config, repo_id, folder), state, None


def _load_config(
    form: Format,
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    folder = _fetch(repo_id, folder_name, (form.config,), force_download)
    return _described(form.read_config(folder, device, cfg_overrides), repo_id, folder)


def _fetch(repo_id: str, folder_name: str, files: tuple[str, ...], force_download: bool) -> Path:
    """Return the local folder of one SAE, downloading its files where needed. Raises UsageError that says what to do."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repo_id, _, revision = repo_id.partition("@")
    fetch = partial(hf_hub_download, repo_id, revision=revision or None, force_download=force_download)
    try:
        paths = [fetch(f"{folder_name}/{file}") for file in files]
        with suppress(EntryNotFoundError):  # the run's own config; not every repository has one
            fetch("config.json")
    except (OSError, ValueError) as error:
        raise explain(error, f"{repo_id}/{folder_name}", revision or None, repo_id=repo_id) from error
    return Path(paths[0]).parent


def _described(config: dict[str, Any], repo_id: str, folder: Path) -> dict[str, Any]:
    """Write into the metadata where the SAE came from, and its model where the files do not say."""
    metadata, repo_id = config["metadata"], repo_id.partition("@")[0]
    metadata["repo_id"] = repo_id
    if "snapshots" in folder.parts:
        metadata["revision"] = folder.parts[folder.parts.index("snapshots") + 1]
    if not metadata.get("model_name"):
        metadata["model_name"] = next((r.model for r in releases().values() if r.repo_id == repo_id), None)
    return config


_FORMATS = {"sae_italian_sparsify": SPARSIFY, "sae_italian_llama_scope": LLAMA_SCOPE}
LOADERS = {name: partial(_load, form) for name, form in _FORMATS.items()}
CONFIG_GETTERS = {name: partial(_load_config, form) for name, form in _FORMATS.items()}
