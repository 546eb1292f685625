"""A rule's text read back: what it states, and where that holds, from the text and the cache's own words alone."""

from __future__ import annotations

import re
from itertools import product
from typing import NamedTuple

import numpy as np

from sae_italian.autointerp.places import View
from sae_italian.autointerp.rules import LatentRule, TreeRule
from sae_italian.autointerp.wording import quoted
from sae_italian.base.labels import Language, label, labels

QUOTED = re.compile(r"«(?:[^»]|»»)*»(?!»)")
PLURAL = ("word", "clitic", "bigram")  # whose one key and whose several are told apart
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
    kinds = {
        one.kind: frozenset[str]().union(*(other.keys for other in said if other.kind == one.kind)) for one in said
    }
    return {(frozenset([Condition(*one)]), frozenset()) for one in kinds.items() if one[1]}  # sequences are one list


def same(one: set[Alternative], other: set[Alternative]) -> bool:
    """Whether two statements hold of the same tokens, whatever their conditions do."""
    known = list({condition for side in (one, other) for pair in side for each in pair for condition in each})
    for row in product((False, True), repeat=len(known)):
        true = {condition for condition, holding in zip(known, row, strict=True) if holding}
        said = [any(held <= true and not failed & true for held, failed in side) for side in (one, other)]
        if said[0] != said[1]:
            return False
    return True


def read(text: str, language: Language) -> set[Alternative]:
    """What a rule's text says; where the latent often stands besides is left out."""
    names: list[str] = []

    def hide(match: re.Match[str]) -> str:
        names.append(match[0])
        return f"\0{len(names) - 1}\0"

    def condition(part: str) -> Condition:
        known = labels("rule", language)
        starts = {
            name: known[name].removesuffix("{}") for kind in KINDS for name in (kind, f"{kind}s") if name in known
        }
        fitting = [kind for kind in starts if part.startswith(starts[kind])]
        fitting = [kind for kind in fitting if (kind == "shape") != (part[len(starts[kind])] in "\0-")] or fitting
        name = max(fitting, key=lambda kind: len(starts[kind]))
        keys = re.split(f", | {known['or one']} ", part[len(starts[name]) :])
        kind = name if name in KINDS else name.removesuffix("s")
        if kind in PLURAL:  # agreement: of one key the singular, of several the plural
            assert (len(keys) > 1) == (name != kind), text
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


def faults(text: str, language: Language) -> list[str]:
    """What is wrong with a rule's text as a sentence.

    Agreement, a list without its last "or", two lists of sequences where one would do, a straight apostrophe, its length.
    """
    body, found = QUOTED.sub("«»", text), []
    ends = {"it": ("la parola", "le parole", "lla sequenza", "lle sequenze", "il pronome", "i pronomi"),
            "en": ("the word", "the words", "the sequence", "the sequences", "the pronoun", "the pronouns")}[language]  # fmt: skip
    key, last = r"(?:«»|-\w+|\w+-)", label("rule.or one", language)
    for one, several in zip(ends[::2], ends[1::2], strict=True):
        found += re.findall(rf"{one} {key}(?:,| {last}) {key}", body)
        found += re.findall(rf"{several} {key}(?:$|; |, (?!{key}|…))", body)
    a_list = rf"(?:nell[ae] sequenz[ae]|in the sequences?) {key}(?:(?:,| {last}) {key})*"
    found += [part for part in body.split(label("rule.or", language)) if re.fullmatch(a_list, part)][1:]
    found += re.findall(rf"{key}, {key}(?:$|;)", body)  # a list without its last "or"
    return found + ["'"] * ("'" in body) + ["long"] * (len(text) > 120)


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
