"""The records that the page is made from: `records.yaml` says what they hold, `page.py` what a row of the list does."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, FiniteFloat, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from sae_italian.base.storage import read_yaml
from sae_italian.browser.page import COLUMNS

_TYPES: dict[str, Any] = {
    "text": str,
    "int": int,
    "float": FiniteFloat,
    "json": dict[str, Any],
    "segment": tuple[str, FiniteFloat],
    "unit": Literal["", "%", "nats"],
    "cell": str | int | FiniteFloat | list[str] | None,
}


@cache
def fields() -> dict[str, dict[str, str]]:
    """Return the fields of every record of `records.yaml` with their types, as written there."""
    return read_yaml(Path(__file__).with_name("records.yaml")) | {"row": dict.fromkeys(COLUMNS, "cell")}


@cache
def _type(told: str) -> Any:
    """Return the Python type of a type as `records.yaml` writes it."""
    if told.endswith("?"):
        return _type(told[:-1]) | None
    if told.startswith("["):
        return list[_type(told[1:-1])]
    if told in _TYPES:
        return _TYPES[told]
    record = TypedDict(told, {name: _type(kind) for name, kind in fields()[told].items()})  # pyright: ignore
    return with_config(ConfigDict(extra="forbid", strict=True))(record)


@cache
def _adapter(told: str) -> TypeAdapter[Any]:
    return TypeAdapter(_type(told))


def check(told: str, value: Any) -> Any:
    """Return a record that fits its type as in `records.yaml` (`run`, `[group]`), or `row`; any other raises."""
    _adapter(told).validate_python(value, strict=False)
    return value


def check_rows(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the columns of all rows, every latent once and in order."""
    for values in zip(*columns.values(), strict=True):
        check("row", dict(zip(columns, values, strict=True)))
    assert columns["latent"] == list(range(len(columns["latent"])))
    return columns


def check_card(card: dict[str, Any]) -> dict[str, Any]:
    check("card", card)
    for name in ("histogram", "logits"):
        n_edges, n_counts = len(card[name]["edges"]), len(card[name]["counts"])
        assert n_edges == (n_counts + 1 if n_counts else 0)
    return card
