"""The table of fields (`fields.yaml`): what fills each field of a row, and the check that rows fit: keys, types, lengths,
order, ranges, unique keys.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import yaml

from sae_italian.base.errors import DataError

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


class FieldCheck:
    """One export under check: call it with each row and where that stands; `n_rows` are the rows of each table that fit.

    Raises: DataError naming table, row and field of the first thing that does not fit.
    """

    def __init__(self) -> None:
        self.n_rows: Counter[str] = Counter()
        self.seen: set[tuple[Any, ...]] = set()

    def __call__(self, name: str, row: dict[str, Any], where: str = "") -> None:
        table, here = tables()[name], f"{name} {where}"
        if list(row) != list(table["fields"]):
            wrong = sorted(set(row) ^ set(table["fields"])) or ["their order"]
            raise DataError(f"{here}: the keys differ from the table of fields in {', '.join(map(repr, wrong))}.")
        for key, one in table["fields"].items():
            _check_value(f"{here}, field {key!r}", one.kind, row[key])
        _check_rules(here, table, row)
        key = (name, *(row[part] for part in table.get("key", ())))
        if len(key) > 1 and key in self.seen:
            raise DataError(f"{here}: {', '.join(table['key'])} = {key[1:]} is there twice; it must be unique.")
        self.seen.add(key)
        self.n_rows[name] += 1
        for key, inner in table.get("rows", {}).items():
            for index, value in enumerate(row[key]):
                self(inner, value, f"{where}.{key}.{index}")


def _check_value(here: str, kind: str, value: Any) -> None:
    """Raise DataError for a value of another type than a field's."""
    if value is None and kind.endswith("?"):
        return
    plain = kind.removesuffix("?")
    values = value if plain.endswith("[]") else [value]
    if not isinstance(values, list) or not all(map(_TYPES[plain.removesuffix("[]")], values)):
        raise DataError(f"{here}: {kind} was expected, found {repr(value)[:80]}.")
    if any(isinstance(item, str) and _UNSTORABLE.search(item) for item in values):
        raise DataError(f"{here}: a NUL or half a surrogate pair, which a database refuses.")


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
