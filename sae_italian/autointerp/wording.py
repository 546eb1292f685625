"""The text of a rule, in Italian and in English, and the title of its latent.

The text says what the rule does; it does not name a concept. It can be read back: no two keys of a kind look alike in it,
so a score of the keys it names is a score of the text.

The title is a few words a reader remembers, such as «forme di "venire"» or "verbi al passato remoto": a kind of word
(morphology.py) on which the latent fires, or after which it does, or else the first keys of its rule. The kinds that fit
the training tokens best compete with the keys on the same validation examples as rules do, by the same score; the title is
judged on the test examples like a text, and its score stands beside the text's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from sae_italian.autointerp.places import Family, Places
from sae_italian.autointerp.rules import Counts, KeyRule, LatentRule, Numbers, TreeRule, rule_of
from sae_italian.autointerp.store import Explanation
from sae_italian.base.labels import Language, label, labels
from sae_italian.base.report import plain

if TYPE_CHECKING:
    from sae_italian.autointerp.choose import Validation

SHOWN = 6  # keys that are named of a rule that does not say which
MOST_LETTERS = 120  # of a text
LISTED = 20  # keys kept for a reader beside the text
INSIDE = "…"  # stands before a token that begins with a letter and no space
LINE_ENDS = str.maketrans("\n\r\t", "⏎␍⇥")  # tokens of their own in many models: a text is one line
Term = tuple[Numbers, Numbers]  # conditions by number: those that hold, and those that do not
PARTS = {"suffix": "-{}", "clitic": "-{}", "prefix": "{}-"}  # families whose keys are parts of words
PIECES = ("token", "previous", "next", "bigram", "trigram")  # families whose keys are tokens


def explanation_of(latent: int, explainer: str, rule: LatentRule, **others: Any) -> Explanation:
    """Return a rule as the store keeps it: itself, its two texts, its text's figures, its heaviest keys, and others."""
    text = displayed(rule)
    stored = {**plain(rule), **text.figures(), "shown": shown_keys(rule), **others}
    return Explanation(latent, explainer, "ok", statement(text, "it"), statement(text, "en"), stored)


def displayed(rule: LatentRule) -> LatentRule:
    """Return as much of a rule as its text names: a score is of this, as the whole rule often knows far more."""
    return rule.take(rule.told) if rule.told else rule


def fits(rule: LatentRule) -> bool:
    """Return whether a rule's text is short enough to be shown, in both languages."""
    return len(statement(rule, "it")) <= MOST_LETTERS >= len(statement(rule, "en"))


def room_for(rule: LatentRule, told: Sequence[int]) -> int:
    """Return how many of these keys, in this order, `fits` would take in both languages, without writing."""
    keys = [(table, name) for table in rule.tables for name in table.names]
    tables, room = [keys[number][0] for number in told], len(told)
    families = [table.family for table in tables]
    for language in get_args(Language):
        joint = len(label("rule.or", language))
        letters = [len(quoted(table.family, keys[n][1], language)) + 2 for table, n in zip(tables, told, strict=True)]
        for place in map(families.index, set(families)):
            # the last key comes after a word instead of a comma
            letters[place] += max(len(_family(tables[place], language, "", many)) for many in (False, True)) + joint
            letters[place] += len(label("rule.or one", language)) - 2
        room = min(room, int((np.cumsum(letters) - joint <= MOST_LETTERS).sum()))
    return room


def statement(rule: LatentRule, language: Language) -> str:
    """Return what the rule says in one sentence: the keys that it tells, else the heaviest ones of each table."""
    named = rule.split(rule.told) if rule.told else tuple(_heaviest(rule, table) for table in rule.tables)
    shown = len(rule.told) or (SHOWN // 2 if isinstance(rule, TreeRule) else SHOWN)
    tables = list(zip(rule.tables, named, strict=True))
    if isinstance(rule, KeyRule):
        text = _on(tables, language, shown) or _family(rule, language, "")
        for note in _notes(rule, named[0], language):  # these give way to keys
            text += f", {note}" if len(text) + len(note) + 2 <= MOST_LETTERS else ""
        return text
    if isinstance(rule, TreeRule):
        each = [_on([table], language, shown) for table in tables]
        said = [_term(term, each, language) for term in simplified([(p.holds, p.fails) for p in rule.heaviest()])]
    else:  # of a trie: the tokens that suffice, then the contexts; those of two and of three are sequences
        alike = groupby(tables, lambda one: _family(one[0], language, ""))
        said = [_on(list(group), language, shown) for _, group in alike]
    return label("rule.or", language).join(part for part in said if part)


def simplified(paths: Sequence[Term]) -> list[Term]:
    """Return fewer and shorter terms (what holds, what does not) that are true together where the given ones are.

    What is true of a term with a condition turned round is no part of it: "A, or B but not A" is "A or B". A term that
    another one includes goes.
    """
    terms = list(paths)
    for i in range(len(terms)):
        for condition in terms[i][0] + terms[i][1]:
            held, failed = (tuple(each for each in side if each != condition) for side in terms[i])
            turned = (held, (*failed, condition)) if condition in terms[i][0] else ((*held, condition), failed)
            if held and any(_includes(term, turned) for term in terms[:i] + terms[i + 1 :]):
                terms[i] = held, failed
    known: list[Term] = []
    for term in sorted(terms, key=lambda term: len(term[0] + term[1])):  # the general ones first
        if not any(_includes(other, term) for other in known):
            known.append(term)
    return [term for term in dict.fromkeys(terms) if term in known]


def _includes(general: Term, special: Term) -> bool:
    return all(set(few) <= set(many) for few, many in zip(general, special, strict=True))


def _term(term: Term, said: Sequence[str], language: Language) -> str:
    """Return what holds and what does not; "" where something of it is not said."""
    held, failed = term
    if not all(said[i] for i in held + failed):
        return ""
    together = f" {label('rule.and', language)} ".join(said[i] for i in held)
    return ", ".join([together, *(label("rule.not", language).format(said[i]) for i in failed)])


def _notes(rule: KeyRule, named: Sequence[int], language: Language) -> list[str]:
    """Return what is often true where these keys are, for a reader only."""
    beside = {where: quoted("word", name, language) for where, name in rule.notes.items()}
    notes = [label(f"rule.{where}", language).format(beside[where]) for where in ("after", "before") if where in beside]
    if rule.family in ("token", "word") and (ending := _common_ending(rule, named)):
        notes.insert(0, label("rule.ending", language).format(ending))
    return notes


def _on(tables: Sequence[tuple[KeyRule, Numbers]], language: Language, shown: int) -> str:
    """Return where tables of keys fire that are put alike, the first keys named; "" without any."""
    every = [quoted(table.family, table.names[i], language) for table, keys in tables for i in keys]
    if not (names := list(dict.fromkeys(every))):
        return ""
    text = ", ".join([*names[:shown], "…"]) if len(names) > shown else listed(names, language)
    return _family(tables[0][0], language, text, len(names) > 1)


def listed(names: Sequence[str], language: Language) -> str:
    """Return names with commas between them, the last one after "or"."""
    *first, last = names
    return f"{', '.join(first)} {label('rule.or one', language)} {last}" if first else last


def _family(table: KeyRule, language: Language, text: str, many: bool = False) -> str:
    name, known = table.family.rstrip("2345"), labels("rule", language)
    return known[f"{name}s" if many and f"{name}s" in known else name].format(text)


def _heaviest(rule: LatentRule, table: KeyRule) -> tuple[int, ...]:
    """Return the keys of a table that fire, the one with the largest share of the activation first."""
    there = np.flatnonzero(rule.firing(table))
    return tuple(there[np.argsort(-table.mass[there], kind="stable")].tolist())


def quoted(family: Family, name: str, language: Language) -> str:
    """Return a key as it stands in a text: «parola», «…pezzo» of one, -mente, ri-, or the name of a shape.

    No two keys of a family look alike: a token's space shows where no letter follows it, a line's end as ⏎, » is doubled.
    """
    if family == "shape":
        return label(f"shape.{name}", language)
    if form := PARTS.get(family.rstrip("2345")):
        return form.format(name)
    if family in PIECES:
        if name[:1] == " " and name[1:2].isalnum():
            name = name[1:]
        elif name[:1].isalnum() or name[:1] == INSIDE:
            name = INSIDE + name
        name = name.translate(LINE_ENDS)
    return "«" + name.replace("»", "»»") + "»"


def _common_ending(rule: KeyRule, named: Sequence[int], least: float = 0.8) -> str:
    """Return the longest ending of 2 to 5 letters that words with 80 % of the mass share; "" for fewer than 4 words."""
    words = [rule.names[i].strip().lower() for i in named]
    if len(set(words)) < 4:
        return ""
    mass = rule.mass[list(named)]
    for length in (5, 4, 3, 2):
        ends = [word[-length:] if len(word) > length and word[-length:].isalpha() else "" for word in words]
        found, index = np.unique(ends, return_inverse=True)
        shares = np.bincount(index, mass) * (found != "")
        if shares.max() >= least * mass.sum():
            return "" if len(os.path.commonprefix(words)) >= length else str(found[shares.argmax()])
    return ""


def shown_keys(rule: LatentRule) -> list[dict[str, object]]:
    """Return the heaviest keys of a rule for a reader: their text, their weight and their share of the activation."""
    mass = np.concatenate([table.mass for table in rule.tables])
    keys = [(table, i) for table in rule.tables for i in range(len(table.keys))]
    heaviest = [keys[number] for number in np.argsort(-mass.round(4), kind="stable")[:LISTED].tolist()]
    told = [(quoted(one.family, one.names[i], "en"), one.weights[i], one.mass[i]) for one, i in heaviest]
    return [{"tokens": key, "weight": round(float(w), 4), "mass": round(float(m), 4)} for key, w, m in told]


# --- titles ----------------------------------------------------------------------------------------------------------


LONGEST = 60  # characters
SLOTS: tuple[Family, ...] = ("word", "previous-word")  # whose kinds are tried
TRIED = 4  # kinds of each slot, those with the best F1 over the training tokens


def title_of(counts: Counts, validation: Validation, rule: LatentRule) -> dict[str, Any]:
    """Return the title as the store keeps it: `it`, `en`, its score on the validation examples, and what it executes."""
    kinds = [(family, kind) for family in SLOTS for kind in fitting_kinds(counts, family)]
    judged = [(validation.judged(kind_rule(counts.places, *kind), 1), kind) for kind in kinds]
    short = shortened(rule)
    judged += [(validation.judged(each, sum(len(table.names) for table in each.tables)), ()) for each in short]
    if not judged:
        return {}
    best, kind = max(judged, key=lambda each: each[0].worth)
    told: dict[str, Any] = {}
    for language in get_args(Language):
        text = title_of_kind(*kind, language) if kind else _keys(best.rule, language)
        told[language] = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"  # even one key may be too long
    executed = {"family": kind[0], "kind": kind[1]} if kind else {"rule": plain(best.rule)}
    return {**told, "accuracy": best.accuracy, **executed}


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
    order = np.argsort(-2 * active / (total + counts.n), kind="stable")[: 4 * TRIED].tolist()  # by F1
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


def _keys(rule: LatentRule, language: Language) -> str:
    """Return the keys of a short rule as a title."""
    named: dict[str, list[str]] = {}  # by how they are put
    for table in rule.tables:
        names = [quoted(table.family, name, language) for name in table.names]
        named.setdefault(label(f"title.{table.family.rstrip('2345')}", language), []).extend(names)
    return listed([form.format(listed(names, language)) for form, names in named.items() if names], language)
