"""How often the morphology behind titles is right on Universal Dependencies: `make bench TABLE=titles`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sae_italian.autointerp.morphology import kinds_of, lemma_of
from sae_italian.base.report import plain, table
from sae_italian.base.statistics import wilson

Facts = set[str]  # of a surface word: its parts of speech and features, those of all the words that it contracts
GOLD: dict[str, set[str]] = {  # kind -> what UD says of such a word, all of it
    "preposition": {"ADP"},
    "contracted": {"ADP", "DET"},
    "article": {"DET", "PronType=Art"},
    "possessive": {"Poss=Yes"},
    "number": {"NUM"},
    "adverb": {"ADV"},
    "noun": {"NOUN or PROPN"},
    "noun fem plur": {"NOUN", "Gender=Fem", "Number=Plur"},
    "noun masc plur": {"NOUN", "Gender=Masc", "Number=Plur"},
    "adjective": {"ADJ or DET"},
    "adjective fem sing": {"ADJ or DET", "Gender=Fem", "Number=Sing"},
    "adjective fem plur": {"ADJ or DET", "Gender=Fem", "Number=Plur"},
    "adjective masc sing": {"ADJ or DET", "Gender=Masc", "Number=Sing"},
    "adjective masc plur": {"ADJ or DET", "Gender=Masc", "Number=Plur"},
    "any fem": {"Gender=Fem"},
    "any masc": {"Gender=Masc"},
    "any fem plur": {"Gender=Fem", "Number=Plur"},
    "any plur": {"Number=Plur"},
    "verb": {"VERB or AUX"},
    "participle": {"VerbForm=Part"},
    "verb infinitive": {"VerbForm=Inf"},
    "verb gerund": {"VerbForm=Ger"},
    "verb present": {"VerbForm=Fin", "Tense=Pres"},
    "verb imperfect": {"Mood=Ind", "Tense=Imp"},
    "verb past": {"Mood=Ind", "Tense=Past"},
    "verb future": {"Tense=Fut"},
    "verb conditional": {"Mood=Cnd"},
    "verb subjunctive": {"Mood=Sub", "Tense=Imp"},
    "verb third plural": {"VerbForm=Fin", "Person=3", "Number=Plur"},
    "verb first plural": {"VerbForm=Fin", "Person=1", "Number=Plur"},
}


def words_of(file: Path) -> list[tuple[str, set[str], Facts]]:
    """Return the surface words of a CoNLL-U file in small letters, their lemmas and their facts."""
    found, until = [], 0
    for line in file.read_text(encoding="utf-8").split("\n"):
        columns = line.split("\t")
        if len(columns) != 10 or "." in columns[0]:
            until = 0 if not line else until
            continue
        first, _, last = columns[0].partition("-")
        facts = {columns[3], *columns[5].split("|")} - {"_", "PUNCT"}
        facts |= {"ADJ or DET"} if facts & {"ADJ", "DET"} else set()
        facts |= {"NOUN or PROPN"} if facts & {"NOUN", "PROPN"} else set()
        facts |= {"VERB or AUX"} if facts & {"VERB", "AUX"} else set()
        if int(first) > until:
            found.append((columns[1].lower(), {columns[2].lower()} - {"_"}, facts))
            until = int(last or first)
        else:
            found[-1][1].add(columns[2].lower())
            found[-1][2].update(facts)
    return found


def bench_titles(folder: Path) -> tuple[Any, str]:
    """Return how often each kind is right where it is said (precision) and said where it is right (recall), and lemmas."""
    words = [word for file in sorted(folder.rglob("*.conllu")) for word in words_of(file)]
    said, true, both = Counter[str](), Counter[str](), Counter[str]()
    lemmas = Counter[bool]()
    for word, lemma, facts in words:
        kinds = set(kinds_of(word))
        if any(kind.startswith("lemma ") for kind in kinds):
            lemmas[lemma_of(word) in lemma] += 1
        for kind, gold in GOLD.items():
            said[kind] += kind in kinds
            true[kind] += gold <= facts
            both[kind] += kind in kinds and gold <= facts
    rows = {}
    for kind in GOLD:
        rows[kind] = {"said": said[kind], "precision": plain(wilson(both[kind], said[kind])),
                      "recall": plain(wilson(both[kind], true[kind]))}  # fmt: skip
    right = wilson(lemmas[True], lemmas.total())
    lines = [[kind, row["said"], *(f"{100 * row[name]['value']:.1f} %" for name in ("precision", "recall"))]
             for kind, row in rows.items() if row["said"]]  # fmt: skip
    lines.append(["lemma", lemmas.total(), f"{100 * right.value:.1f} %", ""])
    return {"n_words": len(words), "kinds": rows, "lemma": plain(right)}, table("kind | said | right | found", lines)
