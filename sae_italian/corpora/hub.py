"""Files of the Hugging Face hub, listed once and read by byte ranges that survive a bad network.

A repository is pinned to the commit it has when it is listed, so a position in a file keeps its meaning. A file is read
in blocks; a block that breaks off is continued at the byte where it broke, after a wait that doubles, or that the
server asks for (Retry-After).
"""

from __future__ import annotations

import io
import random
import sys
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

from sae_italian.base.errors import DataError, UsageError, nearest
from sae_italian.corpora.catalogue import CorpusEntry, Route, free_names

BLOCK_BYTES = 8 * 2**20
T = TypeVar("T")


class RetryPolicy(NamedTuple):
    """How long to insist: `tries` in a row without one new byte, waits of base * 2**n seconds, at most `longest`."""

    tries: int = 8
    base_seconds: float = 1.0
    longest_seconds: float = 120.0
    timeout_seconds: float = 30.0


RETRY = RetryPolicy()


class ShardGone(DataError):
    """A file that was listed is not there any more."""


class _Again(Exception):
    """A failure worth another try; `wait` is what the server asks for, in seconds."""

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


class RemoteFile(NamedTuple):
    """One file of a dataset repository at a fixed commit; `size` in bytes."""

    hub: str
    commit: str
    path: str
    size: int
    gate: str  # what to say when the hub refuses

    def open(self) -> io.BufferedReader:
        return io.BufferedReader(RangeReader(self), buffer_size=2**16)  # pyright: ignore[reportArgumentType]


def list_files(route: Route, name: str, gate: str, split_files: tuple[str, ...] | None = None) -> list[RemoteFile]:
    """Return the files of a route in the order of their names.

    Raises: UsageError when the hub cannot be reached, refuses, or holds no such file; the message says what to do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    commit = _asked(lambda: api.dataset_info(route.hub, revision=route.revision).sha, name, route, gate)
    assert isinstance(commit, str)
    tree = _asked(
        lambda: list(api.list_repo_tree(route.hub, repo_type="dataset", revision=commit, recursive=True)),
        name,
        route,
        gate,
    )
    files = {item.path: item.size for item in tree if isinstance(item, RepoFile)}
    patterns = route.files if split_files is None else split_files
    exclude = route.exclude if split_files is None else ()
    chosen = [
        path
        for path in sorted(files)
        if any(fnmatchcase(path, pattern) for pattern in patterns)
        and not any(fnmatchcase(path, pattern) for pattern in exclude)
    ]
    if not chosen:
        raise UsageError(
            f"corpus {name!r}: {route.hub}@{route.revision} holds {len(files)} files, none of them {' or '.join(patterns)}. "
            "Its layout has changed: give the files yourself, as hf://datasets/owner/name/pattern."
        )
    return [RemoteFile(route.hub, commit, path, files[path], gate) for path in chosen[: route.first]]


def gate_of(name: str, hub: str) -> str:
    free = [other for other in free_names() if other != name]
    return (
        f"corpus {name!r} is gated: agree to its terms at https://huggingface.co/datasets/{hub}, then run `hf auth login` "
        f"(or set HF_TOKEN). Corpora without a gate: {', '.join(free[:3])}."
    )


def route_of_entry(entry: CorpusEntry, route: Route) -> list[RemoteFile]:
    return list_files(route, entry.name, gate_of(entry.name, route.hub))


def route_of_url(url: str) -> Route:
    """Return the route that `hf://datasets/owner/name[@revision]/pattern` names."""
    parts = url.removeprefix("hf://datasets/").split("/", 2)
    if not url.startswith("hf://datasets/") or len(parts) < 3 or not parts[2]:
        raise UsageError(f"{url!r} is not of the form hf://datasets/owner/name[@revision]/pattern, e.g. .../*.parquet.")
    name, _, revision = parts[1].partition("@")
    return Route((parts[2],), hub=f"{parts[0]}/{name}", revision=revision.replace("%2F", "/") or "main")


def _asked(call: Callable[[], T], name: str, route: Route, gate: str) -> T:
    """Ask the hub's API, again if need be, and turn its errors into ours."""
    from huggingface_hub import errors

    def once() -> T:
        try:
            return call()
        except errors.OfflineModeIsEnabled as error:
            raise UsageError(
                f"corpus {name!r} is on the hub, and HF_HUB_OFFLINE is set. Unset it, or use a local file or folder."
            ) from error
        except errors.GatedRepoError as error:
            raise UsageError(gate) from error
        except errors.RevisionNotFoundError as error:
            raise UsageError(
                f"{route.hub} has no revision {route.revision!r}. Take another route of {name!r}."
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise UsageError(
                f"the hub has no dataset {route.hub!r}, or it is private and you are not logged in. "
                f"{nearest(name, free_names())}"
            ) from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403):
                raise UsageError(gate) from error
            raise _again(status, error.response) from error
        except _transport_errors() as error:
            raise _Again(_brief(error)) from error

    return _insist(once, f"{route.hub} on the hub")


def _transport_errors() -> tuple[type[BaseException], ...]:
    """Return what the hub's HTTP client raises when the network fails; the client is httpx or httpx2."""
    from huggingface_hub.utils import get_session

    module = sys.modules[type(get_session()).__module__.split(".")[0]]
    return (module.TransportError, ConnectionError, TimeoutError)


def _brief(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _again(status: int, response: Any) -> Exception:
    """Return the error of a response that is no success: another try for 408, 429 and 5xx, the end for the rest."""
    if status in (408, 429) or status >= 500:
        return _Again(f"HTTP {status}", _retry_after(response))
    return UsageError(f"the hub answered HTTP {status}, which no retry mends.")


def _retry_after(response: Any) -> float | None:
    """Return the seconds of a Retry-After header, which holds a number or a date."""
    value = response.headers.get("Retry-After", "") if response is not None else ""
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


def _insist(call: Callable[[], T], what: str, progress: Callable[[], Any] = lambda: None) -> T:
    """Call until it works; give up after `RETRY.tries` failures in a row between which `progress` did not move."""
    failures, before, started = 0, progress(), time.monotonic()
    while True:
        try:
            return call()
        except _Again as error:
            now = progress()
            failures = 1 if now != before else failures + 1
            before = now
            if failures >= RETRY.tries:
                seconds = time.monotonic() - started
                raise UsageError(
                    f"{what} cannot be read: {failures} tries in {seconds:.0f} s failed, the last with {error}. "
                    "Check the network and start again; a resumed run goes on from here."
                ) from error
            wait = min(RETRY.base_seconds * 2 ** (failures - 1), RETRY.longest_seconds) * random.uniform(0.75, 1.25)
            time.sleep(min(wait if error.wait is None else error.wait, 10 * RETRY.longest_seconds))


class RangeReader(io.RawIOBase):
    """A seekable file of bytes over HTTP; holds one block of at most BLOCK_BYTES, and no connection between reads."""

    def __init__(self, file: RemoteFile):
        self.file, self.position = file, 0
        self.block, self.block_start = b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def size(self) -> int:
        return self.file.size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size}[whence]
        self.position = max(base + offset, 0)
        return self.position

    def readinto(self, buffer: Any) -> int:
        if self.position >= self.file.size or not len(buffer):
            return 0
        if not self.block_start <= self.position < self.block_start + len(self.block):
            end = min(self.position + BLOCK_BYTES, self.file.size)
            self.block_start, self.block = self.position, self._fetch(self.position, end)
        at = self.position - self.block_start
        part = self.block[at : at + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)

    def _fetch(self, start: int, end: int) -> bytes:
        """Return the bytes [start, end), however many requests that takes."""
        received = bytearray()
        what = f"{self.file.hub}/{self.file.path}"
        _insist(lambda: self._request(start, end, received), what, lambda: len(received))
        return bytes(received)

    def _request(self, start: int, end: int, received: bytearray) -> None:
        """Append to `received` what is still missing; what arrives before a fault stays."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import OfflineModeIsEnabled
        from huggingface_hub.utils import build_hf_headers, get_session

        url = hf_hub_url(self.file.hub, self.file.path, repo_type="dataset", revision=self.file.commit)
        first = start + len(received)
        headers = {**build_hf_headers(), "Range": f"bytes={first}-{end - 1}", "Accept-Encoding": "identity"}
        options = {"headers": headers, "follow_redirects": True, "timeout": RETRY.timeout_seconds}
        try:
            with get_session().stream("GET", url, **options) as response:
                skip = self._check(response, first)
                for chunk in response.iter_bytes():  # as it arrives, so that nothing is lost when it breaks off
                    part = chunk[skip:]
                    skip = max(skip - len(chunk), 0)
                    received += part[: end - start - len(received)]
                    if len(received) >= end - start:
                        return
        except OfflineModeIsEnabled as error:
            raise UsageError(f"{self.file.path} is on the hub, and HF_HUB_OFFLINE is set. Unset it.") from error
        except _transport_errors() as error:
            raise _Again(_brief(error)) from error
        raise _Again(f"the connection closed after {len(received):,} of {end - start:,} bytes")

    def _check(self, response: Any, first: int) -> int:
        """Return how many bytes to skip (a server may ignore the range); raise for anything but the bytes asked for."""
        status, what = response.status_code, f"{self.file.hub}/{self.file.path}"
        if status in (401, 403):
            raise UsageError(self.file.gate)
        if status in (404, 410):
            raise ShardGone(f"{what} disappeared from the hub (HTTP {status})")
        if status not in (200, 206):
            raise _again(status, response)
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if status == 206 and total.isdigit() and int(total) != self.file.size:
            raise DataError(
                f"{what} has {int(total):,} bytes, {self.file.size:,} were listed. List it again: start anew."
            )
        return first if status == 200 else 0
