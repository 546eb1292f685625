"""The words that people read, from one bilingual table (`labels.yaml`): labels, metric names, names of controls.

A key is `heading.name`, as in `card.l0`. To add words, write them into the YAML under your room's heading.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from sae_italian.base.storage import packaged_yaml

Language = Literal["it", "en"]


@cache
def _table() -> dict[str, dict[str, dict[Language, str]]]:
    return packaged_yaml(Path(__file__).with_name("labels.yaml").read_text("utf-8"))


def labels(heading: str, language: Language = "en") -> dict[str, str]:
    """Return all labels under a heading by name, in the order of the table. Raises: KeyError when there is no such heading."""
    return {str(name): words[language] for name, words in _table()[heading].items()}


def label(key: str, language: Language = "en") -> str:
    """Return the label of `heading.name`. Raises: KeyError for a key that is not in the table."""
    heading, _, name = key.partition(".")
    return _table()[heading][name][language]


class _Filler(Formatter):
    """Puts numbers into a text as its language writes them: 1.234,5 in Italian, and 12,3 % with its space."""

    def __init__(self, language: Language):
        self.language = language

    def format_field(self, value: Any, format_spec: str) -> str:
        text = super().format_field(value, format_spec)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return text
        text = text.replace("%", " %")
        return text.translate(str.maketrans(".,", ",.")) if self.language == "it" else text


def filled(text: str, values: Mapping[str, Any], language: Language) -> str:
    """Return a text whose fields `{name:form}` are filled, its numbers as its language writes them."""
    return _Filler(language).vformat(text, (), values)


def page_labels() -> dict[str, list[str]]:
    """Return every label by its whole key as [Italian, English]: how the page of the browser keeps its words."""
    table = _table().items()
    return {f"{heading}.{name}": [both["it"], both["en"]] for heading, words in table for name, both in words.items()}
