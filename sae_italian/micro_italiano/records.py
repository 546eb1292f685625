"""Records that leave the grammar, and the small objects it works with."""

from __future__ import annotations

from typing import NamedTuple

FEATURE_KEYS = ("gender", "number", "person", "tense", "mood", "verbform")
GENDERS = ("Masc", "Fem")
NUMBERS = ("Sing", "Plur")


class Span(NamedTuple):
    """Characters `start` (inclusive) to `end` (exclusive) of a document's text, with gold labels.

    Word spans carry "lemma" and "upos" and, where they apply, the keys of `FEATURE_KEYS`, "contracted" ("yes" for
    «della») and "clitic" (for «prenderla»). Construction spans carry "construction". Values follow Universal
    Dependencies. Label dictionaries are shared between spans: copy before changing one.
    """

    start: int
    end: int
    labels: dict[str, str]


class Document(NamedTuple):
    """One generated text with its gold labels; `words` cover every non-space character, in order."""

    text: str
    doc_id: str
    register: str
    words: list[Span]
    constructions: list[Span]


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


class Token:
    """One word before realisation: citation form, shared labels, and the kind of sound change it undergoes."""

    __slots__ = ("form", "labels", "kind")

    def __init__(self, form: str, labels: dict[str, str], kind: str = "") -> None:
        self.form = form
        self.labels = labels
        self.kind = kind


class Ref:
    """Something a sentence talks about: its features, the tokens that name it, and the entry it came from."""

    __slots__ = ("gender", "number", "person", "core", "head", "place", "entry")

    def __init__(
        self,
        gender: int,
        number: int,
        person: int,
        core: tuple[Token, ...],
        entry: object,
        place: tuple[Token, ...] = (),
    ) -> None:
        self.gender = gender  # 0 masculine, 1 feminine
        self.number = number  # 0 singular, 1 plural
        self.person = person  # 1, 2 or 3
        self.core = core  # all that names it, adjective included
        self.head = core  # without the adjective
        self.entry = entry
        self.place = place


def labels_of(lemma: str, upos: str, **features: str | int | None) -> dict[str, str]:
    """Return a label dictionary without the features that are None."""
    labels = {"lemma": lemma, "upos": upos}
    labels.update({key: str(value) for key, value in features.items() if value is not None})
    return labels
