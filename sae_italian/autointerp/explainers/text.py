"""The text of a rule, in Italian and in English. It says what the rule does; it does not name a concept."""

from __future__ import annotations

import os

import numpy as np
from jaxtyping import Float

from sae_italian.autointerp.explainers.rules import Figures, KeyRule, LatentRule, Path, TreeRule, TrieRule, rule_of
from sae_italian.autointerp.places import Family
from sae_italian.autointerp.store import Explanation
from sae_italian.base.labels import Language, label
from sae_italian.base.report import plain

SHOWN = 6  # keys named in the text, if they fit
MOST_LETTERS = 120  # of a text without its figures
LISTED = 20  # keys kept for a reader beside the text


def explanation_of(latent: int, explainer: str, rule: LatentRule) -> Explanation:
    """Return a rule as the store keeps it: itself, its two texts and their figures, and its heaviest keys."""
    text = displayed(rule)
    figures = text.figures()
    numbers = {"precision": figures.precision, "recall": figures.recall, "lift": figures.lift}
    stored = {**plain(rule), **numbers, "shown": shown_keys(rule)}
    return Explanation(latent, explainer, "ok", describe(text, "it", figures), describe(text, "en", figures), stored)


def displayed(rule: LatentRule) -> LatentRule:
    """Return as much of a rule as its text names: a score is of this, as the whole rule often knows far more."""
    for n in range(SHOWN, 0, -1):
        rule = rule.cut(n)
        if len(statement(rule, "it")) <= MOST_LETTERS:
            break
    return rule


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
    """Return what the rule says, without its figures."""
    if isinstance(rule, KeyRule):
        text = _on(rule, rule.firing(rule), language, shown, always=True)
        if rule.family in ("token", "word") and (ending := _common_ending(*_heaviest(rule, rule.firing(rule)))):
            text += f", {label('rule.ending', language).format(ending)}"
        beside = [
            label(f"rule.{where}", language).format(rule.notes[where])
            for where in ("after", "before")
            if where in rule.notes
        ]
        return ", ".join([text, *beside])
    if isinstance(rule, TreeRule):
        parts = [_path(rule, path, language, max(shown // 2, 1)) for path in rule.heaviest()]
    else:  # a trie: the tokens that suffice, then the longest contexts
        assert isinstance(rule, TrieRule)
        parts = [_on(level, rule.firing(level), language, shown) for level in rule.levels]
    return label("rule.or", language).join(part for part in parts if part)


def _path(rule: TreeRule, path: Path, language: Language, shown: int) -> str:
    def said(number: int) -> str:
        condition = rule.conditions[number]
        return _on(condition, np.ones(len(condition.keys), dtype=bool), language, shown)

    held = f" {label('rule.and', language)} ".join(said(i) for i in path.holds)
    return ", ".join([held, *(label("rule.not", language).format(said(i)) for i in path.fails)])


def _on(rule: KeyRule, firing: np.ndarray, language: Language, shown: int, *, always: bool = False) -> str:
    """Return where a table of keys fires, its heaviest keys named; "" when it has none, unless `always`."""
    names = _heaviest(rule, firing)[0]
    if not names and not always:
        return ""
    distinct = list(dict.fromkeys(quoted(rule.family, name, language) for name in names))
    text = ", ".join(distinct[:shown])
    if rest := len(distinct[shown:]):
        text += " " + label("rule.one more" if rest == 1 else "rule.more", language).format(rest)
    return label(f"rule.{rule.family.rstrip('2345')}", language).format(text)


def _heaviest(rule: KeyRule, firing: np.ndarray) -> tuple[list[str], Float[np.ndarray, " n"]]:
    """Return the keys that fire and their shares of the activation, the largest first."""
    there = np.flatnonzero(firing)
    there = there[np.argsort(-rule.mass[there], kind="stable")]
    return [rule.names[i] for i in there.tolist()], rule.mass[there]


def quoted(family: Family, name: str, language: Language) -> str:
    """Return a key as it stands in a text: «parola», -mente, ri-, or the name of a shape."""
    if family == "shape":
        return label(f"shape.{name}", language)
    if family.startswith("suffix") or family == "clitic":
        return f"-{name}"
    if family.startswith("prefix"):
        return f"{name}-"
    return f"«{name.strip() or name}»"


def _common_ending(words: list[str], mass: Float[np.ndarray, " k"], least: float = 0.8) -> str:
    """Return the longest ending of 2 to 5 letters that words with 80 % of the mass share; "" for fewer than 4 words."""
    cleaned = [word.strip().lower() for word in words]
    if len(set(cleaned)) < 4:
        return ""
    for length in (5, 4, 3, 2):
        endings: dict[str, float] = {}
        for word, share in zip(cleaned, mass.tolist(), strict=True):
            if len(word) > length and word[-length:].isalpha():
                endings[word[-length:]] = endings.get(word[-length:], 0.0) + share
        best = max(endings, key=lambda ending: endings[ending], default="")
        if best and endings[best] >= least * float(mass.sum()):
            return "" if len(os.path.commonprefix(cleaned)) >= length else best
    return ""


def shown_keys(rule: LatentRule) -> list[dict[str, object]]:
    """Return the heaviest keys of a rule for a reader: their text, their weight and their share of the activation."""
    keys = [
        (round(share, 4), round(weight, 4), table, i)
        for table in rule.tables
        for i, (weight, share) in enumerate(zip(table.weights.tolist(), table.mass.tolist(), strict=True))
    ]
    return [
        {"tokens": quoted(table.family, table.names[i], "en"), "weight": weight, "mass": share}
        for share, weight, table, i in sorted(keys, key=lambda key: -key[0])[:LISTED]
    ]
