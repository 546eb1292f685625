"""The table of fields (`fields.yaml`): what fills each field of a row, and the check that rows fit: keys, types, lengths,
order, ranges, unique keys, whole letters.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import yaml

from sae_italian.autointerp.pieces import byte_letters
from sae_italian.base.errors import DataError

MOJIBAKE_ALLOWED = 0.02  # of an export's token strings: text from the web holds some of its own
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_TYPES: dict[str, Any] = {
    "text": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int and -(2**31) <= value < 2**31,
    "float": lambda value: type(value) in (int, float) and math.isfinite(value),
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


class FieldCheck:
    """One export under check. Call it with each row and where that stands; ask `finish` in the end.

    Raises: DataError naming table, row and field of the first thing that does not fit.
    """

    def __init__(self) -> None:
        self.n_rows: Counter[str] = Counter()
        self.seen: set[tuple[Any, ...]] = set()
        self.n_strings = self.n_mangled = 0
        self.mangled = ""  # an example

    def __call__(self, name: str, row: dict[str, Any], where: str = "") -> None:
        table, here = tables()[name], f"{name} {where}"
        if list(row) != list(table["fields"]):
            wrong = sorted(set(row) ^ set(table["fields"])) or ["their order"]
            raise DataError(f"{here}: the keys differ from the table of fields in {', '.join(map(repr, wrong))}.")
        for key, one in table["fields"].items():
            self._value(f"{here}, field {key!r}", one.kind, row[key])
        _check_rules(here, table, row)
        key = (name, *(row[part] for part in table.get("key", ())))
        if len(key) > 1 and key in self.seen:
            raise DataError(f"{here}: {', '.join(table['key'])} = {key[1:]} is there twice; it must be unique.")
        self.seen.add(key)
        self.n_rows[name] += 1
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
            if _UNSTORABLE.search(text):
                raise DataError(f"{here}: a NUL or half a surrogate pair, which a database refuses.")
            self.n_strings += 1
            if is_mojibake(text):
                self.n_mangled, self.mangled = self.n_mangled + 1, text

    def finish(self) -> dict[str, int]:
        """Return how many rows of each table fit. Raises: DataError when the strings are mangled."""
        if self.n_mangled > MOJIBAKE_ALLOWED * self.n_strings:
            raise DataError(
                f"{self.n_mangled} of {self.n_strings} strings are mangled, such as {self.mangled!r}: "
                "bytes were taken for letters. Text has to come from character offsets, not from the vocabulary."
            )
        return dict(self.n_rows)


def _check_rules(here: str, table: dict[str, Any], row: dict[str, Any]) -> None:
    """Raise DataError for a row that breaks a rule of its table."""
    for group in table["same_length"]:
        if len({len(row[key]) for key in group}) > 1:
            raise DataError(f"{here}: {', '.join(group)} differ in length; equal lengths were expected.")
    for rule, reverse in (("ascending", False), ("descending", True)):
        for key in table.get(rule, ()):
            if row[key] != sorted(row[key], reverse=reverse):
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
