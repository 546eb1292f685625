"""The table of fields (`fields.yaml`): what fills each field of a row, and the check that rows fit: keys, types, lengths,
order, ranges, unique keys, whole letters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import yaml

from sae_italian.autointerp.pieces import byte_letters
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


class Field(NamedTuple):
    """One field of a table: its type, and the fact or the constant that fills it."""

    kind: str
    fact: str | None
    constant: Any = None


@cache
def tables() -> dict[str, dict[str, Any]]:
    """Return the table of fields, table by table."""
    text = resources.files("sae_italian.browser.exports").joinpath("fields.yaml").read_text(encoding="utf-8")
    found = yaml.safe_load(text)
    for table in found.values():
        table["fields"] = {name: _field(name, told) for name, told in table["fields"].items()}
        groups = table.get("same_length", [])  # an alias inside a list is one item of it: a list of groups
        table["same_length"] = [g for group in groups for g in (group if isinstance(group[0], list) else [group])]
    return found


def _field(name: str, told: str) -> Field:
    kind, equals, constant = told.partition(" = ")
    if equals:
        return Field(kind, None, yaml.safe_load(constant))
    kind, _, fact = told.partition(" $")
    return Field(kind, fact or name)


def make_row(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a table, its fields in order, each filled from the facts or with its constant."""
    columns = tables()[name]["fields"].items()
    return {key: one.constant if one.fact is None else facts[one.fact] for key, one in columns}


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
class FieldCheck:
    """One export under check. Call it with each row; ask `finish` in the end.

    Raises: DataError naming table, row and field of the first thing that does not fit.
    """

    seen: set[tuple[Any, ...]] = field(default_factory=set)
    n_rows: dict[str, int] = field(default_factory=dict)
    n_strings: int = 0
    n_mojibake: int = 0
    example: str = ""

    def __call__(self, name: str, row: dict[str, Any], where: str = "") -> None:
        table = tables()[name]
        where = where or str(self.n_rows.get(name, 0))
        here = f"{name} {where}"
        if list(row) != list(table["fields"]):
            wrong = sorted(set(row) ^ set(table["fields"])) or ["their order"]
            raise DataError(f"{here}: the keys differ from the table of fields in {', '.join(map(repr, wrong))}.")
        for key, one in table["fields"].items():
            self._value(f"{here}, field {key!r}", one.kind, row[key])
        _check_rules(here, table, row)
        if "key" in table:
            self._unique(here, name, table["key"], row)
        self.n_rows[name] = self.n_rows.get(name, 0) + 1
        for key, inner in table.get("rows", {}).items():
            for index, value in enumerate(row[key]):
                self(inner, value, f"{where}.{key}.{index}")

    def _value(self, here: str, kind: str, value: Any) -> None:
        if value is None and kind.endswith("?"):
            return
        plain = kind.removesuffix("?")
        values = value if plain.endswith("[]") else [value]
        if not isinstance(values, list) or not all(map(_TYPES[plain.removesuffix("[]")], values)):
            raise DataError(f"{here}: {kind} was expected, found {repr(value)[:80]}.")
        for text in (item for item in values if isinstance(item, str)):
            if "\x00" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
                raise DataError(f"{here}: a NUL or half a surrogate pair, which a database refuses.")
            self.n_strings += 1
            if is_mojibake(text):
                self.n_mojibake += 1
                self.example = text

    def _unique(self, here: str, name: str, key: list[str], row: dict[str, Any]) -> None:
        found = (name, *(row[part] for part in key))
        if found in self.seen:
            raise DataError(f"{here}: {', '.join(key)} = {found[1:]} is there twice; it must be unique.")
        self.seen.add(found)

    def finish(self) -> dict[str, int]:
        """Return how many rows of each table fit. Raises: DataError when the strings are mangled."""
        if self.n_mojibake > MOJIBAKE_ALLOWED * self.n_strings:
            raise DataError(
                f"{self.n_mojibake} of {self.n_strings} strings are mangled, such as {self.example!r}: bytes were taken "
                "for letters. Text has to come from character offsets, not from the vocabulary."
            )
        return dict(self.n_rows)


def _check_rules(here: str, table: dict[str, Any], row: dict[str, Any]) -> None:
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
