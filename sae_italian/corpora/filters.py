"""What a document must be to be kept: long enough, Italian, not seen before. Every refusal has a name in counts.DROPPED."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.corpora import dedup

LANGUAGE_CHARS = 2000  # of a document's beginning, enough to tell its language
MIN_ITALIAN_CHARS = 20  # below, no detector knows; kept


@dataclass(frozen=True)
class Filters:
    """What to drop. The default drops nothing but documents without text."""

    min_chars: int = 0
    italian: bool = False
    duplicates: bool = False
    near_duplicates: bool = False
    capacity: int = 1_000_000
    """Documents that duplicate removal remembers, at the least."""

    def __post_init__(self) -> None:
        for name in ("min_chars", "capacity"):
            if getattr(self, name) < (name == "capacity"):
                raise UsageError(f"{name} is {getattr(self, name)}; it must be {int(name == 'capacity')} or more.")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Sieve:
    """Filters at work; remembers what it has seen."""

    def __init__(self, filters: Filters):
        self.filters = filters
        self.exact = dedup.ExactDuplicates(filters.capacity) if filters.duplicates else None
        self.near = dedup.NearDuplicates(filters.capacity) if filters.near_duplicates else None
        if filters.italian:
            _identifier()

    def reason_against(self, text: str) -> str | None:
        """Return why a document is dropped, None when it is kept. The cheap questions come first."""
        if len(text) < self.filters.min_chars:
            return "too_short"
        if self.filters.italian and not is_italian(text):
            return "not_italian"
        if self.exact is not None and self.exact.seen(text):
            return "duplicate"
        if self.near is not None and self.near.seen(text):
            return "near_duplicate"
        return None

    def _blooms(self) -> dict[str, dedup.BloomFilter]:
        parts = {"exact": self.exact, "near": self.near}
        return {name: part.bloom for name, part in parts.items() if part is not None}

    @property
    def remembers(self) -> bool:
        return bool(self._blooms())

    def save(self, path: Path) -> None:
        dedup.save(self._blooms(), path)

    def load(self, path: Path) -> None:
        dedup.load(self._blooms(), path)


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier  # the model is in the package
    except ImportError as error:
        raise UsageError("the language filter needs py3langid. Install it: pip install py3langid.") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE)


def language_of(text: str) -> str:
    """Return the language of a text's beginning, two letters (py3langid, 97 languages)."""
    return _identifier().classify(text[:LANGUAGE_CHARS])[0]


def is_italian(text: str) -> bool:
    """Return whether a document is Italian; one too short to tell is."""
    return len(text) < MIN_ITALIAN_CHARS or language_of(text) == "it"
