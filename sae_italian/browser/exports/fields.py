"""The table of fields, and the check that rows fit it: keys, types, lengths, order, ranges, unique keys, whole letters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from sae_italian.autointerp.tokens import byte_letters
from sae_italian.base.errors import DataError

MOJIBAKE_ALLOWED = 0.02  # of an export's token strings: text from the web holds some of its own
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_INT = 2**31
_TYPES: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool) and -_INT <= value < _INT,
    "float": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
    "bool": lambda value: isinstance(value, bool),
    "time": lambda value: isinstance(value, str) and _TIME.fullmatch(value) is not None,
    "json": lambda value: isinstance(value, dict | list),
}


@cache
def tables() -> dict[str, dict[str, Any]]:
    """Return the table of fields, table by table."""
    import yaml

    text = resources.files("sae_italian.browser.exports").joinpath("fields.yaml").read_text(encoding="utf-8")
    found = yaml.safe_load(text)
    for table in found.values():  # an alias inside a list is one item of it: a list of groups
        groups = table.get("same_length", [])
        table["same_length"] = [g for group in groups for g in (group if isinstance(group[0], list) else [group])]
    return found


def is_mojibake(text: str) -> bool:
    """Return whether a text is UTF-8 that was read as Windows-1252, or bytes shown as byte-level BPE's letters."""
    if text.isascii():
        return False
    letters = byte_letters()
    for read in (lambda: text.encode("cp1252"), lambda: bytes(letters[letter] for letter in text)):
        try:
            decoded = read().decode("utf-8")
        except (UnicodeError, KeyError):
            continue
        if decoded != text and all(letter.isprintable() or letter.isspace() for letter in decoded):
            return True
    return False


@dataclass
class Check:
    """One export under check. Call it with each row; ask `finish` in the end.

    Raises: DataError naming table, row and field of the first thing that does not fit.
    """

    seen: dict[str, set[tuple[Any, ...]]] = field(default_factory=dict)
    n_rows: dict[str, int] = field(default_factory=dict)
    n_strings: int = 0
    n_mojibake: int = 0
    example: str = ""

    def __call__(self, name: str, row: dict[str, Any], where: str = "") -> None:
        table = tables()[name]
        here = f"{name} {where or self.n_rows.get(name, 0)}"
        fields = table["fields"]
        if list(row) != list(fields):
            wrong = sorted(set(row) ^ set(fields)) or ["their order"]
            raise DataError(f"{here}: the keys differ from the table of fields in {', '.join(map(repr, wrong))}.")
        for key, kind in fields.items():
            self._value(here, key, kind, row[key])
        self._rules(here, table, row)
        self._unique(here, name, table, row)
        self.n_rows[name] = self.n_rows.get(name, 0) + 1
        for key, inner in table.get("rows", {}).items():
            for index, value in enumerate(row[key]):
                self(inner, value, f"{where or self.n_rows[name] - 1}.{key}.{index}")

    def _value(self, here: str, key: str, kind: str, value: Any) -> None:
        if value is None and kind.endswith("?"):
            return
        plain = kind.removesuffix("?")
        test = _TYPES[plain.removesuffix("[]")]
        values = value if plain.endswith("[]") else [value]
        if not isinstance(values, list) or not all(map(test, values)):
            raise DataError(f"{here}, field {key!r}: {kind} was expected, found {repr(value)[:80]}.")
        for text in (item for item in values if isinstance(item, str)):
            if "\x00" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
                raise DataError(f"{here}, field {key!r}: a NUL or half a surrogate pair, which a database refuses.")
            self.n_strings += 1
            if is_mojibake(text):
                self.n_mojibake += 1
                self.example = text

    def _rules(self, here: str, table: dict[str, Any], row: dict[str, Any]) -> None:
        for group in table["same_length"]:
            lengths = [len(row[key]) for key in group]
            if len(set(lengths)) > 1:
                raise DataError(f"{here}: {', '.join(group)} have the lengths {lengths}; equal ones were expected.")
        for rule, sign in (("ascending", 1), ("descending", -1)):
            for key in table.get(rule, ()):
                if any(sign * (b - a) < 0 for a, b in zip(row[key], row[key][1:], strict=False)):
                    raise DataError(f"{here}, field {key!r} is not {rule}: {row[key][:6]}.")
        for key, (low, high) in table.get("range", {}).items():
            if row[key] is not None and not low <= row[key] <= high:
                raise DataError(f"{here}, field {key!r} is {row[key]}; {low} to {high} was expected.")
        for key, pattern in table.get("pattern", {}).items():
            if not re.fullmatch(pattern, row[key]):
                raise DataError(f"{here}, field {key!r} is {row[key]!r}, which does not match {pattern}.")
        for key, allowed in table.get("one_of", {}).items():
            if row[key] not in allowed:
                raise DataError(f"{here}, field {key!r} is {row[key]!r}; one of {', '.join(allowed)} was expected.")

    def _unique(self, here: str, name: str, table: dict[str, Any], row: dict[str, Any]) -> None:
        if "key" not in table:
            return
        key = tuple(row[part] for part in table["key"])
        known = self.seen.setdefault(name, set())
        if key in known:
            raise DataError(f"{here}: {', '.join(table['key'])} = {key} is there twice; it must be unique.")
        known.add(key)

    def finish(self) -> dict[str, int]:
        """Return how many rows of each table fit. Raises: DataError when the strings are mangled."""
        if self.n_mojibake > MOJIBAKE_ALLOWED * self.n_strings:
            raise DataError(
                f"{self.n_mojibake} of {self.n_strings} strings are mangled, such as {self.example!r}: bytes were taken "
                "for letters. Text has to come from character offsets, not from the vocabulary."
            )
        return dict(self.n_rows)


def columns(name: str) -> list[str]:
    """Return the names of a table's fields, in order."""
    return list(tables()[name]["fields"])


def in_order(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with its keys in the table's order: every line of a file then has the same keys in the same place."""
    return {key: row[key] for key in tables()[name]["fields"]}
