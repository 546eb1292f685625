"""The papers as data: what each trained, what it reports, how much of that is done here, and the words of its report."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.storage import read_yaml
from sae_italian.base.words import kinds_of, read_words
from sae_italian.papers.report import lookup, shown

_NO_DEFAULT = {"layer": int | None, "layers": list[int] | None}  # types of the budget's keys that are null
Words = dict[str, str]  # en, it


@dataclass(frozen=True)
class Paper:
    """One YAML of `data`."""

    name: str
    title: str
    authors: str
    link: str
    setting: Words
    recipe: str
    """The shipped config of the mini model that is scaled to the model given."""
    budget: dict[str, Any]
    figures: list[dict[str, Any]]
    """What it says and where; `ours` is the path of the same in the results by step, `*` for each of a list."""
    steps: dict[str, dict[str, Any]]
    """Title, text and tables of each step's section, as `report.section_of` reads them."""

    def with_budget(self, *overrides: str) -> dict[str, Any]:
        """Return the budget with `key=value` overrides. Raises: UsageError as `read_words`."""
        kinds = {key: _NO_DEFAULT.get(key, kind) for key, kind in kinds_of(self.budget).items()}
        return self.budget | read_words(overrides, kinds)

    def beside(self, results: dict[str, Any]) -> list[dict[str, str]]:
        """Return the paper's figures with ours beside them, as text; a dash where there is none."""
        rows = []
        for figure in self.figures:
            ours, percent = lookup(results, figure["ours"]), figure.get("percent", False)
            each = [shown(value, percent=percent) for value in (ours if isinstance(ours, list) else [ours])]
            what = {"what": figure["what"]["en"], "what_it": figure["what"]["it"], "where": figure["where"]}
            rows.append(what | {"paper": str(figure["value"]), "ours": "; ".join(each) or "-"})
        return rows


@cache
def papers() -> dict[str, Paper]:
    """Return the papers by name."""
    files = sorted(Path(__file__).with_name("data").glob("*.yaml"))
    return {file.stem: Paper(name=file.stem, **read_yaml(file)) for file in files}


def paper(name: str) -> Paper:
    """Return one paper. Raises: UsageError for an unknown one, naming the nearest."""
    if name not in papers():
        raise UsageError(f"paper {name!r} is unknown. {nearest(name, papers())}")
    return papers()[name]
