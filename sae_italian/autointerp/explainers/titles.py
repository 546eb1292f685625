"""A latent's title: a few words a reader remembers, such as «forme di "venire"» or "verbi al passato remoto".

It is a kind of word (morphology.py) on which the latent fires, or after which it does, or else the first keys of its
rule. The kinds that fit the training tokens best compete with the keys on the same validation examples as rules do, by
the same score; the title is judged on the test examples like a text, and its score stands beside the text's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_italian.autointerp.explainers.counts import Counts
from sae_italian.autointerp.explainers.rules import KeyRule, LatentRule, TreeRule, rule_of
from sae_italian.autointerp.explainers.text import listed, quoted
from sae_italian.autointerp.places import Family, Places
from sae_italian.base.labels import Language, label, labels
from sae_italian.base.report import plain

if TYPE_CHECKING:
    from sae_italian.autointerp.explainers.choose import Validation

LONGEST = 60  # characters
SLOTS: tuple[Family, ...] = ("word", "previous-word")  # whose kinds are tried
TRIED = 4  # kinds of each slot, those with the best F1 over the training tokens


def title_of(counts: Counts, validation: Validation, rule: LatentRule) -> dict[str, Any]:
    """Return the title as the store keeps it: `it`, `en`, its score on the validation examples, and what it executes."""
    best: tuple[float, dict[str, Any]] = (-1.0, {})
    for family in SLOTS:
        for kind in fitting_kinds(counts, family):
            tuned = validation.judged(kind_rule(counts.places, family, kind), 1)
            if tuned.worth > best[0]:
                told = {language: title_of_kind(family, kind, language) for language in ("it", "en")}
                best = tuned.worth, {**told, "accuracy": tuned.accuracy, "family": family, "kind": kind}
    for short in shortened(rule):
        n_keys = sum(len(table.names) for table in short.tables)
        tuned = validation.judged(short, n_keys)
        if tuned.worth > best[0]:
            told = {language: title_of_keys(short, language) for language in ("it", "en")}
            best = tuned.worth, {**told, "accuracy": tuned.accuracy, "rule": plain(short)}
    return best[1]


def rule_of_title(title: dict[str, Any], places: Places) -> LatentRule:
    """Return what a title executes on the cache it was made from."""
    return rule_of(title["rule"]) if "rule" in title else kind_rule(places, title["family"], title["kind"])


# --- kinds of word -----------------------------------------------------------------------------------------------------


def fitting_kinds(counts: Counts, family: Family) -> list[str]:
    """Return the kinds whose words at a slot are those of the latent's activations best, by F1 over training tokens."""
    names, of_word = counts.places.kinds
    if not names:
        return []
    tally, total = counts.keys(family), counts.places.totals[family]
    on_words = np.zeros(len(total))
    on_words[tally.keys] = tally.active
    active, total = of_word.T @ on_words, of_word.T @ total
    f1 = 2 * active / (total + counts.n)
    order = np.argsort(-f1, kind="stable")[: 4 * TRIED].tolist()
    return [names[i] for i in order if active[i] and title_of_kind(family, names[i], "it")][:TRIED]


def kind_rule(places: Places, family: Family, kind: str) -> KeyRule:
    """Return the rule that a slot's word is of a kind."""
    keys = places.kinds.words(kind)
    ones, words = np.ones(len(keys)), places.tables["word"].names
    return KeyRule(
        keys=keys, rates=ones, weights=ones, mass=ones, active=ones, total=ones, family=family,
        names=[words[key] for key in keys.tolist()], n_active=0, base=0.0,
    )  # fmt: skip


def title_of_kind(family: Family, kind: str, language: Language) -> str:
    """Return a kind's name, as what the latent fires on or after; "" for a kind that has none."""
    known, (name, _, rest) = labels("title", language), kind.partition(" ")
    after = family != "word"
    if name in ("lemma", "with"):
        text = known["after with" if after and name == "with" else name].format(rest)
        return label("title.previous", language).format(text) if after and name == "lemma" else text
    if kind in known:
        text = known[kind]
    elif rest in known and name in known:
        text = known["order"].format(kind=known[name], feature=known[rest])
    else:  # one word of a closed class: after it, the rule's own keys say the same
        return "" if after else known.get(f"one {name}", "").format(rest)
    return label("title.previous", language).format(text) if after else text


# --- keys of the rule --------------------------------------------------------------------------------------------------


def shortened(rule: LatentRule) -> list[LatentRule]:
    """Return the rule on its first keys that a title has room for; of a tree each condition of its heaviest path."""
    if isinstance(rule, TreeRule):
        told = rule.split(rule.told)
        held = rule.heaviest()[0].holds if rule.firing_paths else ()
        parts: list[LatentRule] = [replace(rule.conditions[i], told=told[i]) for i in held if told[i]]
        return [short for part in parts for short in shortened(part)]
    for n in range(len(rule.told), 0, -1):
        short = rule.take(rule.told[:n])
        if n == 1 or all(len(_keys(short, language)) <= LONGEST for language in ("it", "en")):
            return [short]
    return []


def title_of_keys(rule: LatentRule, language: Language) -> str:
    """Return the keys of a short rule as a title, cut where even one key is too long."""
    text = _keys(rule, language)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _keys(rule: LatentRule, language: Language) -> str:
    named: dict[str, list[str]] = {}  # by how they are put
    for table in rule.tables:
        names = [quoted(table.family, name, language) for name in table.names]
        named.setdefault(label(f"title.{table.family.rstrip('2345')}", language), []).extend(names)
    return listed([form.format(listed(names, language)) for form, names in named.items() if names], language)
