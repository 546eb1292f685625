"""The papers as data: what each trained, what it reports, how much of that is done here, and the words of its report."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from sae_italian.base.errors import UsageError, nearest
from sae_italian.papers.report import Section, lookup, shown, tables_of

SKIPPED = "skipped"


class Figure(NamedTuple):
    """One statement of a paper, and where the same is in the results here."""

    what: tuple[str, str]  # English, Italian
    where: str  # table, figure or section
    value: str
    ours: str  # a path into the results by step, `*` for each of a list
    percent: bool = False  # ours is a share

    def beside(self, results: dict[str, Any]) -> dict[str, str]:
        """Return the statement with ours beside it, as text; a dash where there is none."""
        ours = lookup(results, self.ours)
        each = [shown(value, percent=self.percent) for value in (ours if isinstance(ours, list) else [ours])]
        english, italian = self.what
        texts = {"paper": self.value, "ours": "; ".join(each) or "-"}
        return {"what": english, "what_it": italian, "where": self.where, **texts}


@dataclass(frozen=True)
class Paper:
    name: str
    title: str
    authors: str
    link: str
    setting: tuple[str, str]
    recipe: str
    """The shipped config of the mini model that is scaled to the model given."""
    budget: dict[str, Any]
    figures: tuple[Figure, ...]
    steps: dict[str, dict[str, Any]]
    """Title, text and tables of each step's section."""

    def with_budget(self, *overrides: str) -> dict[str, Any]:
        """Return the budget with `key=value` overrides. Raises: UsageError for an unknown key or a wrong value."""
        import yaml

        budget = dict(self.budget)
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals or key not in budget:
                raise UsageError(f"unknown key {key!r} in {self.name}'s budget. {nearest(key, budget)}")
            value = yaml.safe_load(text)
            default = budget[key]
            if default is not None and isinstance(value, list) != isinstance(default, list):
                raise UsageError(f"{override!r}: {key} is {'a list' if isinstance(default, list) else 'a number'}.")
            if isinstance(default, int) and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{override!r}: {key} must be a whole number of 1 or more.")
            budget[key] = value
        return budget

    def section(self, step: str, result: dict[str, Any], pictures: dict[str, str]) -> Section:
        """Return what a step measured with the words for it; `text_given` are those where an SAE was given."""
        words = self.steps[step]
        if SKIPPED in result:
            return Section(_both(words["title"]), skipped=result[SKIPPED])
        text = words["text_given"] if result.get("given") and "text_given" in words else words["text"]
        tables = [table for described in words.get("tables", ()) for table in tables_of(described, result)]
        english, italian = (part.format_map(result) for part in _both(text))
        return Section(_both(words["title"]), (english, italian), tables, list(pictures.items()))


def _both(words: dict[str, str]) -> tuple[str, str]:
    return words["en"], words["it"]


@cache
def papers() -> dict[str, Paper]:
    """Return the papers by name."""
    import yaml

    found = {}
    for file in sorted(resources.files("sae_italian.papers").joinpath("data").iterdir(), key=lambda file: file.name):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        rows = [row | {"what": _both(row["what"]), "value": str(row["value"])} for row in values["figures"]]
        values |= {"setting": _both(values["setting"]), "figures": tuple(Figure(**row) for row in rows)}
        name = file.name.removesuffix(".yaml")
        found[name] = Paper(name=name, **values)
    return found


def paper(name: str) -> Paper:
    """Return one paper. Raises: UsageError for an unknown one, naming the nearest."""
    if name not in papers():
        raise UsageError(f"paper {name!r} is unknown. {nearest(name, papers())}")
    return papers()[name]
