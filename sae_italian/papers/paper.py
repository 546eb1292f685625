"""The papers as data: what each trained, what it reports, and how much of that is done here by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from sae_italian.base.errors import UsageError, nearest
from sae_italian.papers.document import shown


class Figure(NamedTuple):
    """One statement of a paper, and where the same is in the results here."""

    what: tuple[str, str]  # English, Italian
    where: str  # table, figure or section
    value: str
    ours: str  # a path into the results by step, `*` for each of a list
    percent: bool = False  # ours is a share


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

    def with_budget(self, *overrides: str) -> dict[str, Any]:
        """Return the budget with `key=value` overrides. Raises: UsageError for an unknown key or a wrong value."""
        import yaml

        budget = dict(self.budget)
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals or key not in budget:
                raise UsageError(f"unknown key {key!r} in the budget of {self.name}. {nearest(key, budget)}")
            value = yaml.safe_load(text)
            default = budget[key]
            if default is not None and isinstance(value, list) != isinstance(default, list):
                raise UsageError(f"{override!r}: {key} is {'a list' if isinstance(default, list) else 'a number'}.")
            if isinstance(default, int) and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{override!r}: {key} must be a whole number of 1 or more.")
            budget[key] = value
        return budget


@cache
def papers() -> dict[str, Paper]:
    """Return the papers by name."""
    import yaml

    found = {}
    for file in sorted(resources.files("sae_italian.papers").joinpath("data").iterdir(), key=lambda file: file.name):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        setting = values.pop("setting")
        figures = tuple(
            Figure((what["en"], what["it"]), value=str(value), **rest)
            for row in values.pop("figures")
            for what, value, rest in [(row.pop("what"), row.pop("value"), row)]
        )
        name = file.name.removesuffix(".yaml")
        found[name] = Paper(name=name, setting=(setting["en"], setting["it"]), figures=figures, **values)
    return found


def paper(name: str) -> Paper:
    """Return one paper. Raises: UsageError for an unknown one, naming the nearest."""
    if name not in papers():
        raise UsageError(f"paper {name!r} is unknown. {nearest(name, papers())}")
    return papers()[name]


def lookup(results: Any, path: str) -> Any:
    """Return what lies at a dotted path of dicts and lists; None where it is not there. `*` gives a list of all."""
    for i, key in enumerate(parts := path.split(".")):
        if key == "*":
            rest = ".".join(parts[i + 1 :])
            return [lookup(item, rest) if rest else item for item in results or ()]
        try:
            results = results[int(key)] if isinstance(results, list) else results[key]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return results


def beside(figures: Sequence[Figure], results: dict[str, Any]) -> list[dict[str, str]]:
    """Return each figure of a paper with ours beside it, as text; a dash where there is none."""
    rows = []
    for figure in figures:
        ours = lookup(results, figure.ours)
        if isinstance(ours, list):
            text = "; ".join(shown(value, percent=figure.percent) for value in ours) or "-"
        else:
            text = shown(ours, percent=figure.percent)
        rows.append(
            {
                "what": figure.what[0],
                "what_it": figure.what[1],
                "where": figure.where,
                "paper": figure.value,
                "ours": text,
            }
        )
    return rows
