"""The Italian corpora known by name, the entries of catalogue.yaml, and their files on the Hugging Face hub.

Files are listed once at a fixed commit, so that a position in a file keeps its meaning. They are opened as `datasets` opens
them when it streams: byte ranges, read ahead in blocks, each request repeated after a growing wait (or the one the server
asks for) when the network fails.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError, check_known
from sae_italian.base.hub import explain
from sae_italian.base.storage import read_yaml

PREFIX = "hf://datasets/"


# What catalogue.yaml says of a corpus and of a way to its files, in this order, and what it means where it says nothing.
Entry = dict[str, Any]
Route = dict[str, Any]
ENTRY: Entry = {
    **dict.fromkeys(("name", "hub", "routes", "text_columns", "languages", "licence", "gated", "note")),
    "split": "train",
    "aliases": [],
    **dict.fromkeys(("documents", "words", "bytes")),
    "traps": [],
    "shuffle_shards": True,
    "min_chars": 0,
    "max_chars": None,
}
ROUTE: Route = {
    "files": [],
    "hub": None,
    "revision": "main",
    "exclude": [],
    "first": None,
    "text_columns": [],
    "note": "",
}


@cache
def catalogue() -> dict[str, Entry]:
    """Return the catalogue by name, in the order of catalogue.yaml; a route's repository is the entry's by default."""
    entries = read_yaml(Path(__file__).with_name("catalogue.yaml"))
    for name, entry in entries.items():
        routes = {key: ROUTE | {"hub": entry["hub"]} | route for key, route in entry["routes"].items()}
        entries[name] = ENTRY | entry | {"name": name, "routes": routes}
    return entries


def find(name: str) -> tuple[Entry, Route] | None:
    """Return the entry and route of `name` or `name@route` (any case, alias or hub id), None when it is not known.

    Raises: UsageError for an unknown route of a known corpus.
    """
    wanted, _, route = name.strip().partition("@")
    for entry in catalogue().values():
        if wanted.lower() in {entry["name"], *entry["aliases"]}:
            routes, chosen = entry["routes"], route or next(iter(entry["routes"]))
            check_known(f"corpus {wanted!r}: route", routes, chosen)
            return entry, routes[chosen]
    return None


# --- on the hub -----------------------------------------------------------------------------------------------------------


def list_files(route: Route, name: str) -> tuple[str, dict[str, int]]:
    """Return a commit, and the files of a route of the corpus `name` there, by name with their sizes in bytes.

    Raises: UsageError when the hub cannot be reached, refuses, or holds no such file; the message says what to do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api, route = HfApi(), ROUTE | route
    hub, revision = route["hub"], route["revision"]
    with explained(name, hub, revision):
        commit = api.dataset_info(hub, revision=revision).sha or revision
        tree = list(api.list_repo_tree(hub, repo_type="dataset", revision=commit, recursive=True))
    files = {item.path: item.size for item in tree if isinstance(item, RepoFile)}
    chosen = sorted({path for pattern in route["files"] for path in files if fnmatchcase(path, pattern)})
    chosen = [path for path in chosen if not any(fnmatchcase(path, pattern) for pattern in route["exclude"])]
    if not chosen:
        raise UsageError(
            f"corpus {name!r}: {hub}@{revision} holds {len(files)} files, none of them {' or '.join(route['files'])}. "
            f"Its layout has changed: give the files, as {PREFIX}owner/name/pattern."
        )
    return commit, {path: files[path] for path in chosen[: route["first"]]}


def route_of_url(url: str) -> Route:
    """Return the route that `hf://datasets/owner/name[@revision]/pattern` names."""
    if (match := re.fullmatch(f"{PREFIX}([^/]+/[^/@]+)(?:@([^/]*))?/(.+)", url)) is None:
        raise UsageError(f"{url!r} is not of the form {PREFIX}owner/name[@revision]/pattern, e.g. .../*.parquet.")
    hub, revision, pattern = match.groups()
    return {"files": [pattern], "hub": hub, "revision": (revision or "main").replace("%2F", "/")}


def open_file(url: str) -> Any:
    """Open `hf://datasets/owner/name@commit/path` for reading bytes, seekable."""
    from datasets.utils.file_utils import xopen

    return xopen(url, "rb")


@contextmanager
def explained(name: str, hub: str, revision: str = "main") -> Iterator[None]:
    """Turn what the hub and the network raise into a UsageError that says what to do about the corpus `name`.

    A file that is not there any more becomes a FileNotFoundError.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise UsageError(f"{hub} is on the hub, and HF_HUB_OFFLINE is set. Unset it, or use a local file.") from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(str(error)) from error
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
            free = [entry["name"] for entry in catalogue().values() if not entry["gated"]]
            why = explain(error, f"corpus {name!r}", revision, repo_id=f"datasets/{hub}")
            raise UsageError(f"{why} Corpora without a gate: {', '.join(free[:3])}.") from error
        # httpx in one version of the hub's client, httpx2 in the next: told by the module's name, so neither is needed
        network = type(error).__module__.partition(".")[0] in ("httpx", "httpx2")
        if not (network or status or isinstance(error, ConnectionError | TimeoutError)):
            raise
        raise UsageError(
            f"{hub} on the hub cannot be read, after several tries ({' '.join(str(error).split()):.200}). "
            "Check the network and start again; a resumed run goes on from here."
        ) from error
