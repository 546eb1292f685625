"""The words that people read, from one bilingual table (`labels.yaml`): labels, metric names, names of controls.

A key is `heading.name`, as in `card.l0`. To add words, write them into the YAML under your room's heading.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Literal

Language = Literal["it", "en"]


@cache
def _table() -> dict[str, dict[str, dict[Language, str]]]:
    import yaml

    text = resources.files("sae_italian.base").joinpath("labels.yaml").read_text(encoding="utf-8")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def labels(heading: str, language: Language = "en") -> dict[str, str]:
    """Return all labels under a heading by name, in the order of the table. Raises: KeyError when there is no such heading."""
    return {str(name): words[language] for name, words in _table()[heading].items()}


def label(key: str, language: Language = "en") -> str:
    """Return the label of `heading.name`. Raises: KeyError for a key that is not in the table."""
    heading, _, name = key.partition(".")
    return _table()[heading][name][language]


def page_labels() -> dict[str, list[str]]:
    """Return every label by its whole key as [Italian, English]: how the page of the browser keeps its words."""
    table = _table().items()
    return {f"{heading}.{name}": [both["it"], both["en"]] for heading, words in table for name, both in words.items()}
