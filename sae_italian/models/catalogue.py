"""The Italian models known by name, and the resolution of any name or folder to what the libraries load."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from sae_italian.errors import UsageError, nearest


@dataclass(frozen=True)
class ModelEntry:
    """One model of the catalogue; dimensions are None where only the loaded config knows them."""

    name: str  # hub id, or the model's own name when it lives in this package
    aliases: tuple[str, ...]
    architecture: str
    licence: str
    gated: bool | str
    note: str
    package: str | None = None  # folder beside this file
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
    """A name made definite: `saved_name` goes into metadata, `load_from` to the loaders."""

    saved_name: str
    load_from: str
    entry: ModelEntry | None


@cache
def catalogue() -> dict[str, ModelEntry]:
    """Return the catalogue by name, in the order of catalogue.yaml."""
    import yaml

    text = resources.files("sae_italian.models").joinpath("catalogue.yaml").read_text(encoding="utf-8")
    entries = {}
    for name, fields in yaml.safe_load(text).items():
        entries[name] = ModelEntry(name=name, **{**fields, "aliases": tuple(fields["aliases"])})
    return entries


def resolve(name: str) -> ResolvedModel:
    """Resolve an alias (any case), a hub id `owner/name`, or a local folder that holds a config.json.

    Raises: UsageError for anything else, with the nearest known name.
    """
    wanted = name.strip()
    for entry in catalogue().values():
        if wanted.lower() in {entry.name.lower(), *entry.aliases} or wanted == entry.official:
            return ResolvedModel(entry.name, entry.official, entry)
    folder = Path(wanted).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"model folder {wanted!r} holds no config.json; a folder saved by transformers is expected."
            )
        return ResolvedModel(str(folder.resolve()), str(folder.resolve()), None)
    if wanted.count("/") == 1 and not wanted.startswith((".", "/", "~")):
        return ResolvedModel(wanted, wanted, None)
    known = [alias for entry in catalogue().values() for alias in (entry.name, *entry.aliases)]
    raise UsageError(f"model {name!r} is neither a known name, a hub id nor a folder. {nearest(wanted, known)}")
