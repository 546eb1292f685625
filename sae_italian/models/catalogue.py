"""The Italian models known by name, and the resolution of any name or folder to what the libraries load."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.storage import read_yaml
from sae_italian.models.gguf import folder_of, imported

# The catalogue's name of a dimension, and where transformers' configs keep it (the first that is there).
CONFIG_KEYS = {
    "d_model": ("hidden_size", "n_embd"),
    "n_layers": ("num_hidden_layers", "n_layer"),
    "n_heads": ("num_attention_heads", "n_head"),
    "n_kv_heads": ("num_key_value_heads", "num_attention_heads", "n_head"),
    "d_head": ("head_dim",),
    "d_mlp": ("intermediate_size", "n_inner"),
    "vocab": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions"),
    "window": ("sliding_window",),
}


@dataclass(frozen=True)
class ModelEntry:
    """One model of the catalogue; dimensions are None where only the loaded config knows them."""

    name: str  # hub id, or the model's own name when it lives in this package
    aliases: Sequence[str]
    architecture: str
    licence: str
    gated: bool | str
    note: str
    tokenizer: str  # family: models of one family have the same token ids
    note_it: str = ""
    package: str | None = None  # folder beside this file
    wheels: dict[str, str] | None = None  # of Python's package registry: package, module, sha256, terms
    bos: bool | None = None  # None: read at load
    d_model: int | None = None
    n_layers: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    d_head: int | None = None
    d_mlp: int | None = None
    vocab: int | None = None
    context: int | None = None
    window: int | None = None

    @property
    def official(self) -> str:
        """What transformers and TransformerLens load: the hub id, or the folder inside this package."""
        return str(Path(__file__).parent / self.package) if self.package else self.name


@dataclass(frozen=True)
class ResolvedModel:
    """A name made definite: `saved_name` goes into metadata, `load_from` and `revision` to the loaders."""

    saved_name: str
    load_from: str
    entry: ModelEntry | None
    revision: str | None = None  # branch, tag or commit of the hub's repository; None: its main branch


@cache
def catalogue() -> dict[str, ModelEntry]:
    """Return the catalogue by name, in the order of catalogue.yaml."""
    entries = read_yaml(Path(__file__).with_name("catalogue.yaml"))
    return {name: ModelEntry(name=name, **fields) for name, fields in entries.items()}


def resolve(name: str) -> ResolvedModel:
    """Resolve an alias (any case), a hub id `owner/name`, or a local folder that holds a config.json.

    `name@revision` pins a branch, tag or commit of a hub repository. A `.gguf` file is converted at its first use; what
    was imported under a name is found by it.
    Raises: UsageError for anything else, with the nearest known name; as `import_gguf` for a GGUF file.
    """
    wanted = name.strip()
    folder = Path(wanted).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"model folder {wanted!r} holds no config.json; a folder saved by transformers is expected."
            )
        for entry in catalogue().values():
            if folder.resolve() == Path(entry.official).resolve():
                return ResolvedModel(entry.name, entry.official, entry)
        return ResolvedModel(str(folder.resolve()), str(folder.resolve()), None)
    if folder.suffix == ".gguf":
        return ResolvedModel(str(folder.resolve()), str(imported(folder)), None)
    if wanted and not wanted.startswith((".", "/", "~")) and folder_of(wanted).is_dir():
        return ResolvedModel(wanted, str(folder_of(wanted)), catalogue().get(wanted))
    wanted, _, revision = wanted.partition("@")
    for entry in catalogue().values():
        if wanted.lower() in {entry.name.lower(), *entry.aliases}:
            if revision and entry.package:
                raise UsageError(f"{entry.name} is part of this package and has no revisions; remove '@{revision}'.")
            fetched = folder_of(entry.name)
            return ResolvedModel(
                entry.name, str(fetched) if fetched.is_dir() else entry.official, entry, revision or None
            )
    if wanted.count("/") == 1 and not wanted.startswith((".", "/", "~")):
        return ResolvedModel(wanted, wanted, None, revision or None)
    known = [alias for entry in catalogue().values() for alias in (entry.name, *entry.aliases)]
    raise UsageError(f"model {name!r} is neither a known name, a hub id nor a folder. {nearest(wanted, known)}")


def resolved_here(name: str) -> ResolvedModel | None:
    """Return what `resolve` does, None where a name means nothing here, such as that of a folder on another machine."""
    try:
        return resolve(name)
    except UsageError:
        return None


def config_facts(config: Any) -> dict[str, Any]:
    """Return the catalogue's dimensions as a loaded transformers config states them; None where it does not."""
    facts = {}
    for ours, theirs in CONFIG_KEYS.items():
        facts[ours] = next((value for key in theirs if (value := getattr(config, key, None)) is not None), None)
    facts["d_head"] = facts["d_head"] or facts["d_model"] // facts["n_heads"]
    if facts["d_mlp"] is None and config.model_type == "gpt2":
        facts["d_mlp"] = 4 * facts["d_model"]  # transformers' own default when n_inner is null
    facts["architecture"] = (config.architectures or [None])[0]
    return facts


def config_differences(entry: ModelEntry | None, config: Any) -> list[str]:
    """Return one sentence per dimension in which the loaded config differs from the catalogue; the config wins."""
    if entry is None:
        return []
    facts = config_facts(config)
    known = {key: getattr(entry, key) for key in (*CONFIG_KEYS, "architecture")}
    return [
        f"{key} is {facts[key]} in the loaded config, {expected} in the catalogue"
        for key, expected in known.items()
        if facts[key] != expected and (expected is not None or (key == "window" and entry.d_model is not None))
    ]


# --- TransformerLens' tables of names -------------------------------------------------------------------------------

_TABLES = "transformer_lens.supported_models"


class _Aliases(list):
    """A list of aliases that is asked `in` without regard to case: TransformerBridge compares them as typed."""

    def __contains__(self, name: object) -> bool:
        return any(str(name).lower() == alias.lower() for alias in self)


def _not_about_ours(record: logging.LogRecord) -> bool:
    """Keep back that an alias of ours is deprecated: TransformerLens says it of every alias, and names a folder."""
    tables = sys.modules.get(_TABLES)
    ours = [its for its in getattr(tables, "MODEL_ALIASES", {}).values() if isinstance(its, _Aliases)]
    found = re.search(r"deprecated, model_name alias '(.*?)'", str(record.msg))
    return not (found and any(found[1] in its for its in ours))


def register_model(official: str, aliases: Sequence[str]) -> None:
    """Add one model name and its aliases to TransformerLens' tables; calling it again changes nothing.

    Raises: ValueError when an alias already means another model there.
    """
    tables = import_module(_TABLES)
    names: list[str] = tables.OFFICIAL_MODEL_NAMES
    known: dict[str, list[str]] = tables.MODEL_ALIASES
    owners = {name.lower(): name for name in names}
    owners |= {alias.lower(): name for name, its in known.items() for alias in its}
    for alias in aliases:
        owner = owners.get(alias.lower(), official)
        if owner != official:
            raise ValueError(f"alias {alias!r} already means {owner!r} in TransformerLens; it was not taken over")
    logging.getLogger().addFilter(_not_about_ours)
    if official not in names:
        names.append(official)
    current = known.setdefault(official, _Aliases())
    current += [alias for alias in aliases if alias not in current]


def unregister_model(official: str) -> None:
    """Take back a name that `register_model` added; aliases of a name TransformerLens ships are left alone."""
    tables = import_module(_TABLES)
    if isinstance(tables.MODEL_ALIASES.get(official), _Aliases):
        del tables.MODEL_ALIASES[official]
        tables.OFFICIAL_MODEL_NAMES.remove(official)
