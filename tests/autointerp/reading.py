"""A rule's text read back: what it states, and where that holds, from the text and the cache's own words alone."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from sae_italian.autointerp.explainers.rules import LatentRule, TreeRule
from sae_italian.autointerp.explainers.text import quoted
from sae_italian.autointerp.places import View
from sae_italian.base.labels import Language, label

QUOTED = re.compile(r"«(?:[^»]|»»)*»(?!»)")
KINDS = ("token", "word", "shape", "clitic", "previous", "previous-word", "next", "bigram", "suffix", "prefix")


class Condition(NamedTuple):
    """That what stands at a token is one of these keys; `kind` is a family, without the length of its keys."""

    kind: str
    keys: frozenset[str]


Alternative = tuple[frozenset[Condition], frozenset[Condition]]  # what holds, and what does not


def kind_of(family: str) -> str:
    return "bigram" if family == "trigram" else family.rstrip("2345")  # both are sequences


def meaning(rule: LatentRule, language: Language) -> set[Alternative]:
    """What a displayed rule executes: on any of the alternatives."""
    said = [
        Condition(kind_of(table.family), frozenset(quoted(table.family, name, language) for name in table.names))
        for table in rule.tables
    ]
    if isinstance(rule, TreeRule):
        return {(frozenset(said[i] for i in p.holds), frozenset(said[i] for i in p.fails)) for p in rule.paths}
    return {(frozenset([one]), frozenset()) for one in said if one.keys}


def read(text: str, language: Language) -> set[Alternative]:
    """What a rule's text says; where the latent often stands besides is left out."""
    names: list[str] = []

    def hide(match: re.Match[str]) -> str:
        names.append(match[0])
        return f"\0{len(names) - 1}\0"

    def condition(part: str) -> Condition:
        starts = {kind: label(f"rule.{kind}", language).removesuffix("{}") for kind in KINDS}
        fitting = [kind for kind in KINDS if part.startswith(starts[kind])]
        fitting = [kind for kind in fitting if (kind == "shape") != (part[len(starts[kind])] in "\0-")] or fitting
        kind = max(fitting, key=lambda kind: len(starts[kind]))
        keys = part[len(starts[kind]) :].split(", ")
        return Condition(kind, frozenset(re.sub("\0(.*)\0", lambda m: names[int(m[1])], key) for key in keys))

    body = re.split(", (?:spesso|often) ", QUOTED.sub(hide, text))[0]
    found = set()
    if body == label("rule.token", language).format(""):  # a lookup without any token
        return found
    for part in body.split(label("rule.or", language)):
        held, *failed = part.split(", " + label("rule.not", language).format(""))
        both = held.split(f" {label('rule.and', language)} "), failed
        found.add(tuple(frozenset(map(condition, each)) for each in both))
    return found


def holds(condition: Condition, view: View, language: Language) -> np.ndarray:
    """Where the key of a view's tokens reads as one of a condition's."""
    places = view.places
    if condition.kind == "bigram":
        tokens, strings = places.source.tokens, places.strings
        met = np.zeros(view.grid.shape, dtype=bool)
        for length, family in ((2, "bigram"), (3, "trigram")):
            for place in np.argwhere(view.keys(family) >= 0).tolist():
                last = int(view.grid[tuple(place)])
                name = "".join(strings[token] for token in tokens[last - length + 1 : last + 1].tolist())
                met[tuple(place)] |= quoted(family, name, language) in condition.keys
        return met
    met = np.zeros(view.grid.shape, dtype=bool)
    for family in (family for family in places.tables if kind_of(family) == condition.kind):
        known = range(len(places.totals[family]))
        keys = [key for key in known if quoted(family, places.name(family, key), language) in condition.keys]
        met |= np.isin(view.keys(family), keys)
    return met


def fires(stated: set[Alternative], view: View, language: Language) -> np.ndarray:
    """Where what a text states holds."""
    found = np.zeros(view.grid.shape, dtype=bool)
    for held, failed in stated:
        here = view.grid >= 0
        for condition in held:
            here &= holds(condition, view, language)
        for condition in failed:
            here &= ~holds(condition, view, language)
        found |= here
    return found
