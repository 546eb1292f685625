"""Published SAEs: those we add to SAELens' tables, the loaders they need, and the list of all that concern Italian.

A repository `owner/name@revision` pins a revision; the commit that was loaded is recorded as `metadata.revision`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_italian.base.hub import explain
from sae_italian.models.catalogue import catalogue
from sae_italian.saes import llama_scope, sparsify

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
        layers = range(fields.pop("layers"))
        saes = {id_.format(layer=layer): path.format(layer=layer) for layer in layers}
        found[name] = Release(name=name, saes=saes, **fields)
    return found


def known_releases() -> list[dict[str, Any]]:
    """Return one row per release for `saes list`: ours, and SAELens' own for a model that we know or Llama Scope's."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    ours = releases()
    models = {entry.name for entry in catalogue().values()} | {LLAMA_SCOPE_MODEL}
    rows = []
    for name, lookup in get_pretrained_saes_directory().items():
        if lookup.model not in models:
            continue
        row: dict[str, Any] = {
            "release": name,
            "model": lookup.model,
            "repo": lookup.repo_id,
            "saes": len(lookup.saes_map),
        }
        row["ids"] = list(lookup.saes_map)
        mine = ours.get(name)
        if mine is not None:
            row |= {"d_sae": mine.d_sae, "k": mine.k, "site": mine.site, "licence": mine.licence, "note": mine.note}
        else:
            row |= _facts_of_llama_scope(name)
        rows.append(row)
    return rows


def _facts_of_llama_scope(name: str) -> dict[str, Any]:
    """Return width, k, site and licence of SAELens' Llama Scope releases, named `llama_scope_lx{r,a,m}_{8,32}x`."""
    parts = name.removeprefix("llama_scope_lx").split("_")
    if len(parts) != 2 or parts[1] not in ("8x", "32x"):
        return {"d_sae": None, "k": None, "site": None, "licence": "see its page", "note": "as SAELens loads it"}
    note = "not recommended by its authors: many inactive latents" if parts == ["a", "32x"] else "as SAELens loads it"
    width = 4096 * int(parts[1].removesuffix("x"))
    return {"d_sae": width, "k": 50, "site": parts[0].upper(), "licence": "Apache-2.0", "note": note}


def _hub_loader(config_file: str, weights: str, disk_loader: Callable[..., Any]) -> Callable[..., Any]:
    def load(
        repo_id: str,
        folder_name: str,
        device: str = "cpu",
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Tensor], None]:
        folder = _fetch(repo_id, folder_name, (config_file, weights), force_download)
        config, state = disk_loader(folder, device=device, cfg_overrides=cfg_overrides)
        _describe(config["metadata"], repo_id, folder)
        return config, state, None

    return load


def _hub_config(config_file: str, from_disk: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def read(
        repo_id: str,
        folder_name: str,
        device: str = "cpu",
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        folder = _fetch(repo_id, folder_name, (config_file,), force_download)
        config = from_disk(folder, device=device, cfg_overrides=cfg_overrides)
        _describe(config["metadata"], repo_id, folder)
        return config

    return read


def _fetch(repo_id: str, folder_name: str, files: tuple[str, ...], force_download: bool) -> Path:
    """Return the local folder of one SAE, downloading its files where needed. Raises UsageError that says what to do."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repo_id, _, revision = repo_id.partition("@")
    paths = []
    for file in (*files, "../config.json"):
        name = f"{folder_name}/{file}" if not file.startswith("../") else file.removeprefix("../")
        try:
            paths.append(hf_hub_download(repo_id, name, revision=revision or None, force_download=force_download))
        except (OSError, ValueError) as error:
            if name == "config.json" and isinstance(error, EntryNotFoundError):
                continue  # the run's own config; not every repository has one
            raise explain(error, f"{repo_id}/{folder_name}", revision or None, repo_id=repo_id) from error
    return Path(paths[0]).parent


def _describe(metadata: dict[str, Any], repo_id: str, folder: Path) -> None:
    """Write where the SAE came from, and the model where the files do not say."""
    repo_id = repo_id.partition("@")[0]
    metadata["repo_id"] = repo_id
    parts = folder.parts
    if "snapshots" in parts:
        metadata["revision"] = parts[parts.index("snapshots") + 1]
    if not metadata.get("model_name"):
        metadata["model_name"] = next((r.model for r in releases().values() if r.repo_id == repo_id), None)


LOADERS = {
    "sae_italian_sparsify": _hub_loader(sparsify.CONFIG, sparsify.WEIGHTS, sparsify.sparsify_disk_loader),
    "sae_italian_llama_scope": _hub_loader(
        llama_scope.CONFIG, llama_scope.WEIGHTS, llama_scope.llama_scope_disk_loader
    ),
}
CONFIG_GETTERS = {
    "sae_italian_sparsify": _hub_config(sparsify.CONFIG, sparsify.config_from_disk),
    "sae_italian_llama_scope": _hub_config(llama_scope.CONFIG, llama_scope.config_from_disk),
}
