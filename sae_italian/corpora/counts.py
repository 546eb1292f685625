"""What was read, kept, mended and dropped, each drop under a named reason."""

from __future__ import annotations

from collections import Counter
from typing import Any

DROPPED = {
    "empty": "no text, or white space only",
    "not_text": "the text column holds no string",
    "broken_json": "a line is not a JSON object",
    "broken_csv": "a line is not CSV",
    "too_long": "longer than the limit for one document",
    "other_schema": "a shard without the text column, or with another type in it",
    "truncated_shard": "a shard ends in the middle of its compression; the rows before are kept",
    "broken_shard": "a shard cannot be read; the rows before are kept",
    "shard_gone": "a shard disappeared while it was read; the rows before are kept",
    "too_short": "shorter than the minimum",
    "not_italian": "another language",
    "duplicate": "the same text came before",
    "near_duplicate": "nearly the same text came before",
    "other_split": "belongs to the other split (training or held out)",
}
MENDED = {
    "broken_utf8": "bytes that are not UTF-8, replaced by U+FFFD",
    "nul_bytes": "NUL characters, removed",
}
WHOLE_SHARDS = ("other_schema", "truncated_shard", "broken_shard", "shard_gone")


class Counts:
    """Documents read and kept, characters kept; documents (or shards) dropped by reason; documents mended."""

    def __init__(self) -> None:
        self.read = self.kept = self.characters = 0
        self.dropped: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()

    def drop(self, reason: str, read: int = 1) -> None:
        assert reason in DROPPED, reason
        self.read += 0 if reason in WHOLE_SHARDS else read
        self.dropped[reason] += 1

    def keep(self, text: str) -> None:
        self.read += 1
        self.kept += 1
        self.characters += len(text)

    def mend(self, what: str) -> None:
        assert what in MENDED, what
        self.mended[what] += 1

    def as_dict(self) -> dict[str, Any]:
        totals = {"read": self.read, "kept": self.kept, "characters": self.characters}
        return {**totals, "dropped": dict(sorted(self.dropped.items())), "mended": dict(sorted(self.mended.items()))}

    def load(self, state: dict[str, Any]) -> None:
        self.read, self.kept, self.characters = state["read"], state["kept"], state["characters"]
        self.dropped, self.mended = Counter(state["dropped"]), Counter(state["mended"])

    def lines(self) -> str:
        """Return one line a count, with what each reason means."""
        lines = [f"{'read':18} {self.read:>12,}", f"{'kept':18} {self.kept:>12,}  {self.characters:,} characters"]
        for names, counter in ((DROPPED, self.dropped), (MENDED, self.mended)):
            kind = "dropped" if names is DROPPED else "mended"
            lines += [
                f"{name:18} {counter[name]:>12,}  {kind}: {text}" for name, text in names.items() if counter[name]
            ]
        return "\n".join(lines)
