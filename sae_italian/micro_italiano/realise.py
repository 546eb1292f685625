"""What leaves the grammar, and how its tokens become text: elision, contraction, capitals, spacing, character offsets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple


class Span(NamedTuple):
    """Characters `start` (inclusive) to `end` (exclusive) of a document's text, with gold labels.

    Word spans carry "lemma" and "upos" and, where they apply, "gender", "number", "person", "tense", "mood", "verbform",
    "contracted" ("yes" for «della») and "clitic" (for «prenderla»). Construction spans carry "construction". Values
    follow Universal Dependencies. Label dictionaries are shared between spans: copy before changing one.
    """

    start: int
    end: int
    labels: dict[str, str]


class GoldDocument(NamedTuple):
    """One generated text with its gold labels; `words` cover every non-space character, in order."""

    text: str
    doc_id: str
    register: str
    words: list[Span]
    constructions: list[Span]

    def __repr__(self) -> str:
        return f"GoldDocument({self.doc_id!r}, {self.register}, {len(self.words)} words: {self.text[:60]!r}...)"


class IoiPrompt(NamedTuple):
    """An indirect-object prompt: `text` ends right before " " + `io`; `order` is "ABBA" or "BABA"."""

    text: str
    io: str
    subject: str
    template: str
    order: str


class AgreementPair(NamedTuple):
    """`prefix` ends with a determiner; " " + `right` continues it, " " + `wrong` breaks `kind` agreement."""

    prefix: str
    right: str
    wrong: str
    kind: str


@dataclass(slots=True, eq=False)
class Token:
    """One word before realisation: citation form, shared labels, and the kind of sound change it undergoes."""

    form: str
    labels: dict[str, str]
    kind: str = ""


@dataclass(slots=True, eq=False)
class Ref:
    """Something a sentence talks about: its features, the tokens that name it, and how one is there."""

    gender: int  # 0 masculine, 1 feminine
    number: int  # 0 singular, 1 plural
    person: int  # 1, 2 or 3
    core: tuple[Token, ...]  # all that names it, adjective included
    place: tuple[Token, ...] = ()
    head: tuple[Token, ...] = ()  # the core without the adjective, where it has one

    @property
    def form(self) -> int:
        """Of a verb or pronoun: io tu lui noi voi loro."""
        return self.person - 1 + 3 * self.number


def labels_of(lemma: str, upos: str, **features: str | int | None) -> dict[str, str]:
    """Return a label dictionary without the features that are None."""
    shown = {key: str(value) for key, value in features.items() if value is not None}
    return {"lemma": lemma, "upos": upos, **shown}


# --- from tokens to text -----------------------------------------------------------------------------------------------

_IMPURE = re.compile(r"s[^aeiouàèéìòùh]|z|gn|ps|pn|x|y")
_ARTICULATED = {"di": "de", "a": "a", "da": "da", "in": "ne", "su": "su"}
_TAILS = {"il": "l", "lo": "llo", "l'": "ll'", "la": "lla", "i": "i", "gli": "gli", "le": "lle"}


@cache
def onset(form: str) -> str:
    """Return how a word begins for its article: "V" vowel sound, "Z" as in zio, studente, gnomo, "C" otherwise."""
    low = form.lower()
    if low[0] in "aeiouàèéìòùh" or low == "11" or low[0] == "8":
        return "V"
    return "Z" if _IMPURE.match(low) else "C"


@cache
def sandhi(kind: str, form: str, following: str) -> str:
    """Return the shape of a word before the word `following`.

    Kinds: lemmas of articles, demonstratives and adjectives that change (il, uno, quello, ...), "lo" and "glielo"
    (l'ho, gliel'ho), "e" and "prep" (ed, ad before the same vowel), "elide_e" (c'è, dov'era), "quale" (qual è).
    """
    start = onset(following)
    if kind in ("il", "quello", "bello"):
        return _definite(kind, form, start)
    if kind in ("uno", "nessuno", "alcuno", "buono"):
        if form[-1] == "o" or form == "un":
            stem = form if form == "un" else form[:-1]
            return stem + "o" if start == "Z" else stem
        return form[:-1] + "'" if start == "V" and form[-1] == "a" and kind in ("uno", "nessuno") else form
    if kind == "questo":
        return "quest'" if start == "V" and form[-1] in "oa" else form
    if kind in ("e", "prep"):
        same = form in ("e", "a") and following[0].lower() in {"e": "eè", "a": "a"}[form]
        return form + "d" if same else form
    return form


def _definite(kind: str, form: str, start: str) -> str:
    stem = "" if kind == "il" else kind[:-3]
    last = form[-1]
    if form in ("la", "quella"):
        return form[:-1] + "'" if start == "V" else form
    if last in "ae":
        return form
    if last == "i" and form != "il":
        return {"C": stem + "i", "Z": stem + "gli", "V": stem + "gli"}[start]
    if start == "C":
        return "il" if kind == "il" else stem + "l"
    return stem + ("l'" if start == "V" else "lo") if kind == "il" else stem + ("ll'" if start == "V" else "llo")


def _shape(token: Token, following: Token) -> str:
    kind = token.kind
    if kind == "lo":
        if following.labels["lemma"] == "avere" and following.form[0] in "aeh":
            return token.form[:-1] + "'"
        return token.form
    if kind in ("elide_e", "quale"):
        if following.labels["lemma"] == "essere" and following.form[0] in "eè":
            return "qual" if kind == "quale" else token.form[:-1] + "'"
        return token.form
    return sandhi(kind, token.form, following.form)


@cache
def _contract(preposition: str, article: str, gender: str, number: str) -> tuple[str, dict[str, str]]:
    """Return the contracted form and its labels: di + la, della; in + l', nell'."""
    labels = {"lemma": preposition, "upos": "ADP", "gender": gender, "number": number, "contracted": "yes"}
    return _ARTICULATED[preposition] + _TAILS[article], labels


def realise(tokens: list[Token], constructions: list[tuple[int, int, str]]) -> tuple[str, list[Span], list[Span]]:
    """Return text, word spans and construction spans; `constructions` are (first token, token after the last, name)."""
    pieces: list[str] = []
    words: list[Span] = []
    places: list[tuple[int, int]] = []  # characters of each token
    position, glue, upper = 0, True, True
    index, total = 0, len(tokens)
    while index < total:
        token = tokens[index]
        form, labels, n_tokens = token.form, token.labels, 1
        if token.kind and index + 1 < total:
            following = tokens[index + 1]
            if token.kind == "prep" and following.kind == "il":
                article = _shape(following, tokens[index + 2]) if index + 2 < total else following.form
                form, labels = _contract(form, article, following.labels["gender"], following.labels["number"])
                n_tokens = 2
            else:
                form = _shape(token, following)
        punctuation = labels["upos"] == "PUNCT"
        if upper and not punctuation:
            form = form[0].upper() + form[1:]
        if not (glue or punctuation and form != "«"):
            pieces.append(" ")
            position += 1
        pieces.append(form)
        end = position + len(form)
        words.append(Span(position, end, labels))
        places += [(position, end)] * n_tokens
        position = end
        glue = form[-1] in "'«" and form != "po'" and "verbform" not in labels
        upper = token.kind == "end" or punctuation and form in ".?!«" or upper and form == "«"
        index += n_tokens
    spans = [Span(places[first][0], places[last - 1][1], {"construction": name}) for first, last, name in constructions]
    return "".join(pieces), words, spans
