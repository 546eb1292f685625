"""The text of a rule, in Italian and in English. It says what the rule does; it does not name a concept."""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
from jaxtyping import Float

from sae_italian.autointerp.explainers.keys import KeyRule
from sae_italian.autointerp.explainers.tree import Path, TreeRule
from sae_italian.autointerp.explainers.trie import TrieRule
from sae_italian.autointerp.places import Family

Language = Literal["it", "en"]
Rule = KeyRule | TrieRule | TreeRule
SHOWN = 6  # keys named in the text
_PATHS = 3  # paths of a tree named in the text

_FAMILY: dict[Language, dict[str, str]] = {
    "it": {
        "token": "su {}",
        "word": "sulla parola {}",
        "shape": "su {}",
        "clitic": "alla fine di verbi con il pronome {}",
        "previous": "subito dopo {}",
        "previous-word": "sulla parola dopo {}",
        "next": "subito prima di {}",
        "bigram": "nella sequenza {}",
        "trigram": "nella sequenza {}",
    }
    | {f"suffix{n}": "alla fine di parole in {}" for n in (2, 3, 4, 5)}
    | {f"prefix{n}": "in parole che cominciano per {}" for n in (3, 4)},
    "en": {
        "token": "on {}",
        "word": "on the word {}",
        "shape": "on {}",
        "clitic": "at the end of verbs with the pronoun {}",
        "previous": "right after {}",
        "previous-word": "on the word after {}",
        "next": "right before {}",
        "bigram": "in the sequence {}",
        "trigram": "in the sequence {}",
    }
    | {f"suffix{n}": "at the end of words in {}" for n in (2, 3, 4, 5)}
    | {f"prefix{n}": "in words that begin with {}" for n in (3, 4)},
}
_SHAPES_IT = {
    "number": "numeri",
    "all capitals": "parole in maiuscolo",
    "capital": "parole con l'iniziale maiuscola",
    "elided": "parole elise",
    "accented ending": "parole con l'ultima vocale accentata",
    "punctuation": "segni di punteggiatura",
    "inside a word": "pezzi interni di parola",
    "lower case": "parole in minuscolo",
}
_SHAPES_EN = {
    "number": "numbers",
    "all capitals": "words in capitals",
    "capital": "capitalised words",
    "elided": "elided words",
    "accented ending": "words with an accented last vowel",
    "punctuation": "punctuation marks",
    "inside a word": "pieces inside a word",
    "lower case": "words in lower case",
}
_SAY: dict[Language, dict[str, str]] = {
    "it": {
        "more": "e altri {}",
        "one more": "e un altro",
        "ending": "spesso in -{}",
        "after": "spesso dopo «{}»",
        "before": "spesso prima di «{}»",
        "and": "e ",
        "not": "ma non {}",
        "or": "; oppure ",
        "context": "in particolare «{}»",
        "tail": "({mass} % dell'attivazione, precisione {precision}, lift {lift})",
        "examples": "({mass} % dell'attivazione negli esempi, precisione {precision})",
    },
    "en": {
        "more": "and others: {}",
        "one more": "and one more",
        "ending": "often ending in -{}",
        "after": "often after «{}»",
        "before": "often before «{}»",
        "and": "and ",
        "not": "but not {}",
        "or": "; or ",
        "context": "notably «{}»",
        "tail": "({mass} % of the activation, precision {precision}, lift {lift})",
        "examples": "({mass} % of the activation in the examples, precision {precision})",
    },
}


def describe(rule: Rule, language: Language, shown: int = SHOWN) -> str:
    """Return the rule in one sentence of Italian or English, with its figures in brackets."""
    mass = float(rule.mass[rule.firing].sum()) if isinstance(rule, KeyRule) else rule.mass
    tail = "examples" if isinstance(rule, TreeRule) else "tail"
    precision, lift = f"{rule.precision:.2f}", f"{rule.lift:.0f}" if rule.lift >= 10 else f"{rule.lift:.1f}"
    if language == "it":
        precision, lift = precision.replace(".", ","), lift.replace(".", ",")
    figures = _SAY[language][tail].format(mass=f"{100 * mass:.0f}", precision=precision, lift=lift)
    return f"{statement(rule, language, shown)} {figures}"


def statement(rule: Rule, language: Language, shown: int = SHOWN) -> str:
    """Return what the rule says, without its figures: for readers that are language models, or other people's scores."""
    if isinstance(rule, TreeRule):
        return _tree(rule, language, shown)
    return _trie(rule, language, shown) if isinstance(rule, TrieRule) else _keys(rule, language, shown)


def _keys(rule: KeyRule, language: Language, shown: int) -> str:
    say = _SAY[language]
    mass, names = rule.mass[rule.firing], np.array(rule.names, dtype=object)[rule.firing]
    order = np.argsort(-mass, kind="stable")
    heaviest = [str(name) for name in names[order]]
    text = _FAMILY[language][rule.family].format(_listed(rule.family, heaviest, language, shown))
    if rule.family in ("token", "word") and (ending := _common_ending(heaviest, mass[order])):
        text += f", {say['ending'].format(ending)}"
    for where in ("after", "before"):
        if where in rule.notes:
            text += f", {say[where].format(rule.notes[where])}"
    return text


def _listed(family: Family, names: list[str], language: Language, shown: int) -> str:
    say = _SAY[language]
    distinct = list(dict.fromkeys(quoted(family, name, language) for name in names))
    text = ", ".join(distinct[:shown])
    if len(distinct) > shown:
        rest = len(distinct) - shown
        text += f" {say['one more']}" if rest == 1 else f" {say['more'].format(rest)}"
    return text


def quoted(family: Family, name: str, language: Language) -> str:
    """Return a key as it stands in a text: «parola», -mente, ri-, or the name of a shape."""
    if family == "shape":
        return (_SHAPES_IT if language == "it" else _SHAPES_EN)[name]
    if family.startswith("suffix") or family == "clitic":
        return f"-{name}"
    if family.startswith("prefix"):
        return f"{name}-"
    return f"«{name.strip() or name}»"


def _trie(rule: TrieRule, language: Language, shown: int) -> str:
    """Say the tokens that suffice, then the longest contexts."""
    parts = []
    for level in rule.levels:
        firing = level.rates >= rule.threshold
        names = [level.names[i] for i in np.argsort(-level.mass, kind="stable") if firing[i]]
        if names:
            parts.append(_FAMILY[language][level.family].format(_listed(level.family, names, language, shown)))
    return _SAY[language]["or"].join(parts)


def _tree(rule: TreeRule, language: Language, shown: int) -> str:
    paths = sorted(rule.firing, key=lambda path: -path.mass)[:_PATHS]
    return _SAY[language]["or"].join(_path(rule, path, language, max(shown // 2, 1)) for path in paths)


def _path(rule: TreeRule, path: Path, language: Language, shown: int) -> str:
    def said(i: int) -> str:
        condition = rule.conditions[i]
        names = [condition.names[j] for j in np.argsort(-condition.mass, kind="stable")]
        return _FAMILY[language][condition.family].format(_listed(condition.family, names, language, shown))

    say = _SAY[language]
    held = f" {say['and']}".join(said(i) for i in path.holds)
    return ", ".join([held, *(say["not"].format(said(i)) for i in path.fails)])


def _common_ending(words: list[str], mass: Float[np.ndarray, " k"], least: float = 0.8) -> str:
    """Return the longest ending of 2 to 5 letters that words with 80 % of the mass share; "" for fewer than 4 words."""
    cleaned = [word.strip().lower() for word in words]
    if len(set(cleaned)) < 4:
        return ""
    for length in (5, 4, 3, 2):
        endings: dict[str, float] = {}
        for word, share in zip(cleaned, mass, strict=True):
            if len(word) > length and word[-length:].isalpha():
                endings[word[-length:]] = endings.get(word[-length:], 0.0) + float(share)
        best = max(endings, key=lambda ending: endings[ending], default="")
        if best and endings[best] >= least * float(mass.sum()):
            prefix = os.path.commonprefix(cleaned)
            return "" if len(prefix) >= length else best
    return ""


def shown_keys(rule: Rule, shown: int = 20) -> list[dict[str, object]]:
    """Return the heaviest keys of a rule for a reader: their text, their weight and their share of the activation."""
    tables = (rule,) if isinstance(rule, KeyRule) else rule.levels if isinstance(rule, TrieRule) else rule.conditions
    keys = [
        (round(share, 4), round(weight, 4), table, i)
        for table in tables
        for i, (weight, share) in enumerate(zip(table.weights.tolist(), table.mass.tolist(), strict=True))
    ]
    return [
        {"tokens": quoted(table.family, table.names[i], "en"), "weight": weight, "mass": share}
        for share, weight, table, i in sorted(keys, key=lambda key: -key[0])[:shown]
    ]
