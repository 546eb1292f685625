"""From tokens to text: elision, contraction, capitals, spacing and character offsets, in one pass."""

from __future__ import annotations

import re
from functools import cache

from sae_italian.micro_italiano.records import Span, Token

_IMPURE = re.compile(r"s[^aeiouàèéìòùh]|z|gn|ps|pn|x|y")
_ARTICULATED = {"di": "de", "a": "a", "da": "da", "in": "ne", "su": "su"}
_TAILS = {"il": "l", "lo": "llo", "l'": "ll'", "la": "lla", "i": "i", "gli": "gli", "le": "lle"}
_SHORT = {"bello": "bel", "quello": "quel"}


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


_contracted: dict[tuple[str, str, str, str], dict[str, str]] = {}


def _contract(preposition: Token, article: str, labels: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Return the contracted form and its labels: di + la, della; in + l', nell'."""
    form = _ARTICULATED[preposition.form] + _TAILS[article]
    key = (form, preposition.form, labels["gender"], labels["number"])
    merged = _contracted.get(key)
    if merged is None:
        merged = {"lemma": preposition.form, "upos": "ADP", "gender": labels["gender"], "number": labels["number"]}
        merged["contracted"] = "yes"
        _contracted[key] = merged
    return form, merged


def realise(
    tokens: list[Token], constructions: list[tuple[int, int, str]], capital: bool = True
) -> tuple[str, list[Span], list[Span]]:
    """Return text, word spans and construction spans.

    `constructions` are (first token, token after the last, name). With `capital`, sentences begin with a capital.
    """
    pieces: list[str] = []
    words: list[Span] = []
    starts: list[int] = []
    ends: list[int] = []
    position, glue, upper = 0, True, capital
    index, total = 0, len(tokens)
    while index < total:
        token = tokens[index]
        form, labels, merged = token.form, token.labels, False
        if token.kind and index + 1 < total:
            following = tokens[index + 1]
            if token.kind == "prep" and following.kind == "il":
                article = _shape(following, tokens[index + 2]) if index + 2 < total else following.form
                form, labels = _contract(token, article, following.labels)
                merged = True
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
        for _ in range(1 + merged):
            starts.append(position)
            ends.append(end)
        position = end
        glue = form[-1] in "'«" and form != "po'" and "verbform" not in labels
        upper = capital and punctuation and form in ".?!«" or upper and form == "«"
        if token.kind == "end":
            upper = True
        index += 1 + merged
    spans = [Span(starts[first], ends[last - 1], {"construction": name}) for first, last, name in constructions]
    return "".join(pieces), words, spans
