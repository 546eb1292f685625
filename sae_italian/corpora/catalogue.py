"""The Italian corpora known by name: the entries of catalogue.yaml."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import BaseModel

from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.storage import read_yaml


class Route(BaseModel, extra="forbid", frozen=True):
    """One way to a corpus' files: a listing of the hub repository, narrowed to the shards of one split."""

    files: tuple[str, ...]
    """Patterns of fnmatch on the path inside the repository; `*` also matches `/`."""
    hub: str
    revision: str = "main"
    exclude: tuple[str, ...] = ()
    first: int | None = None
    """This many shards, in the order of their names; None: all."""
    text_columns: tuple[str, ...] = ()
    """Read instead of the entry's own."""
    note: str = ""


class CorpusEntry(BaseModel, extra="forbid", frozen=True):
    """One corpus of the catalogue. Sizes are as published, None where nobody says."""

    name: str
    hub: str
    routes: dict[str, Route]
    """The first is the default."""
    text_columns: tuple[str, ...]
    """The first that a shard has is read; `a.b` reads inside a struct."""
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
    min_chars: int = 0
    max_chars: int | None = None


@cache
def catalogue() -> dict[str, CorpusEntry]:
    """Return the catalogue by name, in the order of catalogue.yaml; a route's repository is the entry's by default."""
    entries = read_yaml(Path(__file__).with_name("catalogue.yaml"))
    for name, entry in entries.items():
        routes = {key: {"hub": entry["hub"], **route} for key, route in entry["routes"].items()}
        entries[name] = CorpusEntry(name=name, **{**entry, "routes": routes})
    return entries


def find(name: str) -> tuple[CorpusEntry, Route] | None:
    """Return the entry and route of `name` or `name@route` (any case, alias or hub id), None when it is not known.

    Raises: UsageError for an unknown route of a known corpus.
    """
    wanted, _, route = name.strip().partition("@")
    for entry in catalogue().values():
        if wanted.lower() in {entry.name, *entry.aliases}:
            chosen = route or next(iter(entry.routes))
            if chosen not in entry.routes:
                raise UsageError(f"corpus {entry.name!r} has no route {chosen!r}. {nearest(chosen, entry.routes)}")
            return entry, entry.routes[chosen]
    return None
