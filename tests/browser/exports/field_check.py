"""Every row of an export against the table of fields (`browser/exports/fields.yaml`): its keys, types and rules."""

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_italian.browser.exports import FORMS, Export
from sae_italian.browser.exports.latents import tables

# The table of each format that has a row for each latent.
LATENTS = {"neuronpedia": "batch_feature", "neuronpedia-bulk": "neuron", "circuit-tracer": "circuit_feature"}
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


def checked(done: Export) -> Export:
    """Return an export, all of whose rows fit."""
    check_folder(done.folder, done.to, done.n_latents)
    return done


def check_folder(folder: Path, to: str, n_latents: int) -> dict[str, int]:
    """Check every row of an export; return the rows of each table. Raises: AssertionError, also when a latent is missing."""
    form, check = FORMS[to], FieldCheck()
    for pattern, table in (form.once | {file: table for file, (table, _) in form.batches.items()}).items():
        for file in sorted(folder.glob(pattern.format("[0-9]*"))):
            for number, row in enumerate(read_rows(file), 1):
                check(table, row, f"{file.relative_to(folder)}, line {number}")
    n_rows = check.n_rows[LATENTS[to]]
    assert n_rows == n_latents, f"{folder} holds {n_rows} of {n_latents} latents"
    return dict(check.n_rows)


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file."""
    if file.suffix == ".json":
        yield json.loads(file.read_text(encoding="utf-8"))
        return
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as handle:
        yield from map(json.loads, handle)


def groups_of(table: dict[str, Any]) -> list[list[str]]:
    """Return the fields of equal length; an alias inside a list is one item of it: a list of groups."""
    groups = table.get("same_length", [])
    return [g for group in groups for g in (group if isinstance(group[0], list) else [group])]


class FieldCheck:
    """One export under check: call it with each row and where that stands; `n_rows` are the rows of each table that fit.

    Raises: AssertionError naming table, row and field of the first thing that does not fit.
    """

    def __init__(self) -> None:
        self.n_rows: Counter[str] = Counter()
        self.seen: set[tuple[Any, ...]] = set()

    def __call__(self, name: str, row: dict[str, Any], where: str = "") -> None:
        table, here = tables()[name], f"{name} {where}"
        if list(row) != list(table["fields"]):
            wrong = sorted(set(row) ^ set(table["fields"])) or ["their order"]
            raise AssertionError(f"{here}: the keys differ from the table of fields in {', '.join(map(repr, wrong))}.")
        for key, one in table["fields"].items():
            _check_value(f"{here}, field {key!r}", one.kind, row[key])
        _check_rules(here, table, row)
        key = (name, *(row[part] for part in table.get("key", ())))
        if len(key) > 1 and key in self.seen:
            raise AssertionError(f"{here}: {', '.join(table['key'])} = {key[1:]} is there twice; it must be unique.")
        self.seen.add(key)
        self.n_rows[name] += 1
        for key, inner in table.get("rows", {}).items():
            for index, value in enumerate(row[key]):
                self(inner, value, f"{where}.{key}.{index}")


def _check_value(here: str, kind: str, value: Any) -> None:
    """Raise AssertionError for a value of another type than a field's."""
    if value is None and kind.endswith("?"):
        return
    plain = kind.removesuffix("?")
    values = value if plain.endswith("[]") else [value]
    if not isinstance(values, list) or not all(map(_TYPES[plain.removesuffix("[]")], values)):
        raise AssertionError(f"{here}: {kind} was expected, found {repr(value)[:80]}.")
    if any(isinstance(item, str) and _UNSTORABLE.search(item) for item in values):
        raise AssertionError(f"{here}: a NUL or half a surrogate pair, which a database refuses.")


def _check_rules(here: str, table: dict[str, Any], row: dict[str, Any]) -> None:
    """Raise AssertionError for a row that breaks a rule of its table."""
    for group in groups_of(table):
        if len({len(row[key]) for key in group}) > 1:
            raise AssertionError(f"{here}: {', '.join(group)} differ in length; equal lengths were expected.")
    for rule, reverse in (("ascending", False), ("descending", True)):
        for key in table.get(rule, ()):
            if row[key] != sorted(row[key], reverse=reverse):
                raise AssertionError(f"{here}, field {key!r} is not {rule}: {row[key][:6]}.")
    for key, (low, high) in table.get("range", {}).items():
        if row[key] is not None and not low <= row[key] <= high:
            raise AssertionError(f"{here}, field {key!r} is {row[key]}; {low} to {high} was expected.")
    for key, pattern in table.get("pattern", {}).items():
        if not re.fullmatch(pattern, row[key]):
            raise AssertionError(f"{here}, field {key!r} is {row[key]!r}, which does not match {pattern}.")
    for key, allowed in table.get("one_of", {}).items():
        if row[key] not in allowed:
            raise AssertionError(f"{here}, field {key!r} is {row[key]!r}; one of {', '.join(allowed)} was expected.")
