"""The Italian corpora known by name: data of catalogue.yaml, typed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from sae_italian.base.errors import UsageError, nearest


@dataclass(frozen=True)
class Route:
    """One way to a corpus' files: a listing of the hub repository, narrowed to the shards of one split."""

    files: tuple[str, ...]  # patterns of fnmatch on the path inside the repository; `*` also matches `/`
    hub: str = ""
    revision: str = "main"
    exclude: tuple[str, ...] = ()
    first: int | None = None  # this many shards, in the order of their names
    heldout_files: tuple[str, ...] = ()  # a split of the corpus' own, never mixed with ours
    note: str = ""


@dataclass(frozen=True)
class CorpusEntry:
    """One corpus of the catalogue. Sizes are as published, None where nobody says."""

    name: str
    hub: str
    routes: dict[str, Route]  # the first is the default
    text_columns: tuple[str, ...]  # the first that a shard has is read; `a.b` reads inside a struct
    languages: tuple[str, ...]
    licence: str
    gated: bool
    note: str
    split: str = "train"
    aliases: tuple[str, ...] = ()
    documents: int | None = None
    words: int | None = None
    bytes: int | None = None
    traps: tuple[str, ...] = ()
    shuffle_shards: bool = True
    shuffle_buffer: int = 1000  # documents; small where a row is a whole book
    min_chars: int = 0
    max_chars: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Located:
    """A name made definite: the entry and the route to take."""

    entry: CorpusEntry
    route: Route
    route_name: str = field(default="")


def _route(hub: str, fields: dict[str, Any]) -> Route:
    lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    return Route(**{"hub": hub, **fields, **lists})


@cache
def catalogue() -> dict[str, CorpusEntry]:
    """Return the catalogue by name, in the order of catalogue.yaml."""
    import yaml

    text = resources.files("sae_italian.corpora").joinpath("catalogue.yaml").read_text(encoding="utf-8")
    entries = {}
    for name, fields in yaml.safe_load(text).items():
        routes = {key: _route(fields["hub"], route) for key, route in fields.pop("routes").items()}
        lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        entries[name] = CorpusEntry(name=name, routes=routes, **{**fields, **lists})
    return entries


def find(name: str) -> Located | None:
    """Return the entry and route of `name` or `name@route` (any case, alias or hub id), None when it is not known.

    Raises: UsageError for an unknown route of a known corpus.
    """
    wanted, _, route = name.strip().partition("@")
    for entry in catalogue().values():
        if wanted.lower() in {entry.name, *entry.aliases}:
            chosen = route or next(iter(entry.routes))
            if chosen not in entry.routes:
                raise UsageError(f"corpus {entry.name!r} has no route {chosen!r}. {nearest(chosen, entry.routes)}")
            return Located(entry, entry.routes[chosen], chosen)
    return None


def names() -> list[str]:
    return list(catalogue())


def free_names() -> list[str]:
    """Return the corpora that need neither a token nor an agreement."""
    return [entry.name for entry in catalogue().values() if not entry.gated]
