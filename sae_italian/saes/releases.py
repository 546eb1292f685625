"""Published SAEs: those we add to SAELens' tables, the loaders they need, and the list of all that concern Italian.

A repository `owner/name@revision` pins a revision; the commit that was loaded is recorded as `metadata.revision`.
What SAELens knows is read from its own YAML, release by release: importing it and parsing the whole takes 8 s.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_italian.base.errors import UsageError, check_known, nearest
from sae_italian.base.hub import explain
from sae_italian.base.storage import packaged_yaml
from sae_italian.models.catalogue import catalogue

if TYPE_CHECKING:
    from sae_italian.saes.foreign import Format

LLAMA_SCOPE_MODEL = "meta-llama/Llama-3.1-8B"
# Of a release: `repo_id`, `model`, `saes` (by id, the folder of the repository it lies in), and these; None is not known.
UNSAID = {"d_sae": None, "k": None, "site": None, "licence": "see its page", "note": "as SAELens loads it"}


@cache
def _published() -> dict[str, dict[str, Any]]:
    return packaged_yaml(Path(__file__).with_name("releases.yaml").read_text("utf-8"))


@cache
def releases() -> dict[str, dict[str, Any]]:
    """Return the releases of releases.yaml by name."""
    found = {}
    for name, entry in _published()["ours"].items():
        layers = range(entry["layers"])
        saes = {entry["id"].format(layer=layer): entry["path"].format(layer=layer) for layer in layers}
        found[name] = {**UNSAID, **entry, "name": name, "saes": saes}
    return found


@cache
def _of_saelens() -> dict[str, str]:
    """Return the YAML of each of SAELens' own releases by name."""
    spec = find_spec("sae_lens")
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).with_name("pretrained_saes.yaml").read_text(encoding="utf-8")
    parts = re.split(r"^(?=[^\s#])", text, flags=re.MULTILINE)
    return {part.partition(":")[0]: part for part in parts if part.strip()}


def find_release(name: str) -> dict[str, Any]:
    """Return a release of ours or of SAELens. Raises: UsageError, with the nearest name, for another."""
    if name in releases():
        return releases()[name]
    check_known("SAE release", [*releases(), *_of_saelens()], name)
    fields = packaged_yaml(_of_saelens()[name])[name]
    saes = {sae["id"]: str(sae["path"]) for sae in fields["saes"]}
    return {**UNSAID, **fields, "name": name, "saes": saes, **_published()["theirs"].get(name, {})}


def known_releases() -> list[dict[str, Any]]:
    """Return one row per release for `saes list`: ours, and SAELens' own for a model that we know or Llama Scope's."""
    models = {entry.name for entry in catalogue().values()} | {LLAMA_SCOPE_MODEL}
    theirs = [name for name, text in _of_saelens().items() if any(f"model: {model}\n" in text for model in models)]
    rows = []
    for name in (*theirs, *releases()):
        found = find_release(name)
        ids = list(found["saes"])
        row = {"release": name, "model": found["model"], "repo": found["repo_id"], "saes": len(ids), "ids": ids}
        rows.append(row | {key: found[key] for key in UNSAID})
    return rows


def find_sae(name: str) -> tuple[dict[str, Any], str, str | None]:
    """Return the release, the SAE's id in it and the revision that `release:sae_id[@revision]` names.

    A release may be any repository, owner/name: it has no `name`, and SAEs are known by their folders.
    Raises: UsageError for what names no SAE, with the nearest that does.
    """
    release, colon, sae_id = name.partition(":")
    if not colon:
        raise UsageError(f"SAE {name!r} is neither a folder nor of the form release:sae_id.")
    sae_id, _, revision = sae_id.partition("@")
    if "/" in release and release not in {*releases(), *_of_saelens()}:
        found = {"name": None, "repo_id": release, "model": None, "saes": {sae_id: sae_id}}
    else:
        found = find_release(release)
    if sae_id not in found["saes"]:
        raise UsageError(f"release {release!r} has no SAE {sae_id!r}. {nearest(sae_id, found['saes'])}")
    return found, sae_id, revision or None


def snapshot(repo_id: str, path: str, revision: str | None = None, *, only: str = "", **how: Any) -> tuple[Path, str]:
    """Return the local folder of a published SAE, with all its files or `only` one, and the commit it is of.

    What is not there is downloaded. Raises: UsageError that says what to do.
    """
    from huggingface_hub import snapshot_download

    wanted = [f"{path}/{only or '*'}", "config.json"]  # the run's own config; not every repository has one
    try:
        whole = Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted, **how))
    except (OSError, ValueError) as error:
        raise explain(error, f"{repo_id}/{path}", revision, repo_id=repo_id) from error
    if not (whole / path / only).exists():
        raise UsageError(f"{repo_id} has no folder {path!r}; see https://huggingface.co/{repo_id}/tree/main.")
    return whole / path, whole.name  # the hub's cache names its folders so


# --- loaders, as SAELens calls them -------------------------------------------------------------------------------------


@cache
def loaders() -> list[dict[str, Callable[..., Any]]]:
    """Return the loaders that releases.yaml names, and what reads only the configuration, by name."""
    from sae_italian.saes.foreign import LLAMA_SCOPE, SPARSIFY

    formats = {"sae_italian_sparsify": SPARSIFY, "sae_italian_llama_scope": LLAMA_SCOPE}
    return [{name: partial(_load, form, whole) for name, form in formats.items()} for whole in (True, False)]


def _load(
    form: Format,
    whole: bool,
    repo_id: str,
    folder_name: str,
    device: str,
    force_download: bool,
    cfg_overrides: dict[str, Any] | None,
) -> Any:
    """Return (config, state dict, None), or the config alone where not the `whole` is asked for."""
    repo_id, _, revision = repo_id.partition("@")
    only, read = ("", form.read) if whole else (form.files[0], form.config_of)
    folder, commit = snapshot(repo_id, folder_name, revision or None, only=only, force_download=force_download)
    found: Any = read(folder, device, cfg_overrides or {})
    metadata = (found[0] if whole else found)["metadata"]
    metadata |= {"repo_id": repo_id, "revision": commit}
    if not metadata.get("model_name"):
        metadata["model_name"] = next((r["model"] for r in releases().values() if r["repo_id"] == repo_id), None)
    return (*found, None) if whole else found
