"""The records that the page is made from: `records.yaml` says what they hold, `columns.py` what a row of the list does."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, FiniteFloat, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from sae_italian.base.errors import DataError
from sae_italian.browser.columns import COLUMNS

Record = dict[str, Any]
_STRICT = ConfigDict(extra="forbid")
_TYPES: dict[str, Any] = {
    "text": str,
    "int": int,
    "float": FiniteFloat,
    "json": dict[str, Any],
    "segment": tuple[str, FiniteFloat],
    "unit": Literal["", "%", "nats"],
}


@cache
def fields() -> dict[str, dict[str, str]]:
    """Return the fields of every record of `records.yaml` with their types, as written there."""
    text = resources.files("sae_italian.browser").joinpath("records.yaml").read_text(encoding="utf-8")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _typed(name: str, types: dict[str, Any]) -> Any:
    return with_config(_STRICT)(TypedDict(name, types))  # pyright: ignore


@cache
def _type(told: str) -> Any:
    """Return the Python type of a type as `records.yaml` writes it."""
    if told.endswith("?"):
        return _type(told[:-1]) | None
    if told.startswith("["):
        return list[_type(told[1:-1])]
    if told in ("row", "rows"):
        kinds = {name: column.type for name, column in COLUMNS.items()}
        return _typed(told, kinds if told == "row" else {name: list[kind] for name, kind in kinds.items()})
    return _TYPES.get(told) or _typed(told, {name: _type(kind) for name, kind in fields()[told].items()})


@cache
def _adapter(told: str) -> TypeAdapter[Any]:
    return TypeAdapter(_type(told))


def check(told: str, value: Any, where: str = "") -> Any:
    """Return a record as plain JSON values; `told` is its type as in `records.yaml` (`run`, `[group]`), `row` or `rows`.

    Raises: DataError, naming the first field that does not fit; `where` is what it calls the record.
    """
    try:
        return _adapter(told).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        found = repr(first["input"])[:80]
        raise DataError(f"{where or told}, field {place!r}: {first['msg']}; found {found}.") from None


def check_rows(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the columns of all rows as plain JSON values; row i is latent i. Raises: DataError, naming the place."""
    where = "rows of latents"
    checked = check("rows", columns, where)
    if len(set(map(len, checked.values()))) != 1:
        raise DataError(f"{where}: the columns differ in length.")
    if checked["latent"] != list(range(len(checked["latent"]))):
        raise DataError(f"{where}: give every latent once, in order.")
    return checked


def check_card(card: Record) -> Record:
    """Return a card as plain JSON values. Raises: DataError, naming the latent and the field."""
    where = f"card of latent {card.get('latent')}"
    checked = check("card", card, where)
    for name in ("histogram", "logits"):
        n_edges, n_counts = len(checked[name]["edges"]), len(checked[name]["counts"])
        if n_edges != (n_counts + 1 if n_counts else 0):
            raise DataError(
                f"{where}, field {name!r}: {n_edges} edges for {n_counts} counts; "
                "edges is one longer than counts, or both are empty."
            )
    return checked
