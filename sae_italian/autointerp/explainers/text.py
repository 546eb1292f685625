"""The text of a rule, in Italian and in English. It says what the rule does; it does not name a concept.

It can be read back: no two keys of a kind look alike in it, so a score of the keys it names is a score of the text.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from typing import get_args

import numpy as np

from sae_italian.autointerp.explainers.rules import Figures, KeyRule, LatentRule, Path, TableRule, TreeRule, rule_of
from sae_italian.autointerp.places import Family
from sae_italian.autointerp.store import Explanation
from sae_italian.base.labels import Language, label
from sae_italian.base.report import plain

SHOWN = 6  # keys that are named of a rule that does not say which
MOST_LETTERS = 120  # of a text without its figures
LISTED = 20  # keys kept for a reader beside the text
INSIDE = "…"  # stands before a token that begins with a letter and no space
PIECES = ("token", "previous", "next", "bigram", "trigram")  # families whose keys are tokens


def explanation_of(latent: int, explainer: str, rule: LatentRule) -> Explanation:
    """Return a rule as the store keeps it: itself, its two texts and their figures, and its heaviest keys."""
    text = displayed(rule)
    figures = text.figures()
    numbers = {"precision": figures.precision, "recall": figures.recall, "lift": figures.lift}
    stored = {**plain(rule), **numbers, "shown": shown_keys(rule)}
    return Explanation(latent, explainer, "ok", describe(text, "it", figures), describe(text, "en", figures), stored)


def displayed(rule: LatentRule) -> LatentRule:
    """Return as much of a rule as its text names: a score is of this, as the whole rule often knows far more."""
    return rule.take(rule.told) if rule.told else rule


def fits(rule: LatentRule) -> bool:
    """Return whether a rule's text is short enough to be shown, in both languages."""
    return len(statement(rule, "it")) <= MOST_LETTERS >= len(statement(rule, "en"))


def room_for(rule: TableRule, told: Sequence[int]) -> int:
    """Return how many of these keys, told in this order, the text has room for in both languages: `fits` without writing."""
    first = np.cumsum([0, *(len(table.keys) for table in rule.tables)]).tolist()
    keys = [(rule.tables[i], number - first[i]) for number in told for i in [bisect_right(first, number) - 1]]
    room = len(told)
    for language in get_args(Language):
        begun, letters = set[Family](), -len(label("rule.or", language))
        for n, (table, key) in enumerate(keys[:room]):
            letters += len(quoted(table.family, table.names[key], language)) + 2
            if table.family not in begun:
                begun.add(table.family)
                letters += len(_family(table, language, "")) + len(label("rule.or", language)) - 2
            if letters > MOST_LETTERS:
                room = n
                break
    return room


def plain_text(explanation: Explanation, language: Language) -> str:
    """Return what an explanation says, of a rule without its figures: for readers that are language models."""
    if explanation.rule is None:
        return explanation.text(language)
    return statement(displayed(rule_of(explanation.rule)), language)


def describe(rule: LatentRule, language: Language, figures: Figures | None = None) -> str:
    """Return the rule in one sentence of Italian or English, with its figures in brackets."""
    found = figures or rule.figures()
    precision, lift = f"{found.precision:.2f}", f"{found.lift:.0f}" if found.lift >= 10 else f"{found.lift:.1f}"
    if language == "it":
        precision, lift = precision.replace(".", ","), lift.replace(".", ",")
    say = label("rule.examples" if isinstance(rule, TreeRule) else "rule.figures", language)
    return f"{statement(rule, language)} {say.format(mass=f'{100 * found.mass:.0f}', precision=precision, lift=lift)}"


def statement(rule: LatentRule, language: Language, shown: int = SHOWN) -> str:
    """Return what the rule says, without its figures: the keys that it tells, else the heaviest ones of each table."""
    named = rule.split(rule.told) if rule.told else tuple(_heaviest(rule, table) for table in rule.tables)
    shown = len(rule.told) or (max(shown // 2, 1) if isinstance(rule, TreeRule) else shown)
    said = [_on(table, own, language, shown) for table, own in zip(rule.tables, named, strict=True)]
    if isinstance(rule, KeyRule):
        text = said[0] or _family(rule, language, "")
        for note in _notes(rule, named[0], language):  # these give way to keys
            text += f", {note}" if len(text) + len(note) + 2 <= MOST_LETTERS else ""
        return text
    if isinstance(rule, TreeRule):
        said = [_path(path, said, language) for path in rule.heaviest()]
    # of a trie: the tokens that suffice, then the longest contexts
    return label("rule.or", language).join(part for part in said if part)


def _path(path: Path, said: Sequence[str], language: Language) -> str:
    """Return what holds on a path and what does not; "" where something of it is not said."""
    if not all(said[i] for i in path.holds + path.fails):
        return ""
    held = f" {label('rule.and', language)} ".join(said[i] for i in path.holds)
    return ", ".join([held, *(label("rule.not", language).format(said[i]) for i in path.fails)])


def _notes(rule: KeyRule, named: Sequence[int], language: Language) -> list[str]:
    """Return what is often true where these keys are, for a reader only."""
    beside = {where: quoted("word", name, language) for where, name in rule.notes.items()}
    notes = [label(f"rule.{where}", language).format(beside[where]) for where in ("after", "before") if where in beside]
    if rule.family in ("token", "word") and (ending := _common_ending(rule, named)):
        notes.insert(0, label("rule.ending", language).format(ending))
    return notes


def _on(table: KeyRule, keys: Sequence[int], language: Language, shown: int) -> str:
    """Return where a table of keys fires, the first of these keys named; "" without any."""
    if not keys:
        return ""
    text = ", ".join(quoted(table.family, table.names[i], language) for i in keys[:shown])
    if rest := len(keys[shown:]):
        text += " " + label("rule.one more" if rest == 1 else "rule.more", language).format(rest)
    return _family(table, language, text)


def _family(table: KeyRule, language: Language, text: str) -> str:
    return label(f"rule.{table.family.rstrip('2345')}", language).format(text)


def _heaviest(rule: LatentRule, table: KeyRule) -> tuple[int, ...]:
    """Return the keys of a table that fire, the one with the largest share of the activation first."""
    there = np.flatnonzero(rule.firing(table))
    return tuple(there[np.argsort(-table.mass[there], kind="stable")].tolist())


def quoted(family: Family, name: str, language: Language) -> str:
    """Return a key as it stands in a text: «parola», «…pezzo» of one, -mente, ri-, or the name of a shape.

    No two keys of a family look alike: a token's space shows where no letter follows it, and » is doubled.
    """
    if family == "shape":
        return label(f"shape.{name}", language)
    if family.startswith("suffix") or family == "clitic":
        return f"-{name}"
    if family.startswith("prefix"):
        return f"{name}-"
    if family in PIECES:
        if name[:1] == " " and name[1:2].isalnum():
            name = name[1:]
        elif name[:1].isalnum() or name[:1] == INSIDE:
            name = INSIDE + name
    return "«" + name.replace("»", "»»") + "»"


def _common_ending(rule: KeyRule, named: Sequence[int], least: float = 0.8) -> str:
    """Return the longest ending of 2 to 5 letters that words with 80 % of the mass share; "" for fewer than 4 words."""
    words = [rule.names[i].strip().lower() for i in named]
    if len(set(words)) < 4:
        return ""
    mass = rule.mass[list(named)]
    for length in (5, 4, 3, 2):
        endings: dict[str, float] = {}
        for word, share in zip(words, mass.tolist(), strict=True):
            if len(word) > length and word[-length:].isalpha():
                endings[word[-length:]] = endings.get(word[-length:], 0.0) + share
        best = max(endings, key=lambda ending: endings[ending], default="")
        if best and endings[best] >= least * float(mass.sum()):
            return "" if len(os.path.commonprefix(words)) >= length else best
    return ""


def shown_keys(rule: LatentRule) -> list[dict[str, object]]:
    """Return the heaviest keys of a rule for a reader: their text, their weight and their share of the activation."""
    mass = np.concatenate([table.mass for table in rule.tables])
    keys = [(table, i) for table in rule.tables for i in range(len(table.keys))]
    heaviest = [keys[number] for number in np.argsort(-mass.round(4), kind="stable")[:LISTED].tolist()]
    return [
        {
            "tokens": quoted(table.family, table.names[i], "en"),
            "weight": round(float(table.weights[i]), 4),
            "mass": round(float(table.mass[i]), 4),
        }
        for table, i in heaviest
    ]
