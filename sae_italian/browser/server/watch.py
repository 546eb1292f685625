"""Whether the cache that is being served is still the one that was opened."""

from __future__ import annotations

from pathlib import Path

from sae_italian.browser.server.guard import Refused
from sae_italian.cache.layout import MANIFEST

Stamp = tuple[int, int, int] | None


def stamp(file: Path) -> Stamp:
    """Return what tells one version of a file from another without reading it; None when it is not there."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class Watch:
    """Compares a cache's manifest with the one that was opened. A file that was only touched counts as the same."""

    def __init__(self, folder: Path):
        self.file = folder / MANIFEST
        self._stamp, self._bytes = stamp(self.file), self.file.read_bytes()

    def check(self) -> None:
        """Raises: Refused (409) when the cache was replaced or removed."""
        now = stamp(self.file)
        if now == self._stamp:
            return
        try:
            same = now is not None and self.file.read_bytes() == self._bytes
        except OSError:
            same = False
        if not same:
            raise Refused(
                409,
                "La cache è stata sostituita o tolta mentre era aperta: ferma `sae-italian browse --serve` e riavvialo.",
                "The cache was replaced or removed while it was open: stop `sae-italian browse --serve` and start it again.",
            )
        self._stamp = now
