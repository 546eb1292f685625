"""What the longer items of a rule do, closures that emit tokens or choose a value; and how tokens become text."""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, NamedTuple

from sae_italian.micro_italiano.lexicon import Lexicon, Noun, Token, Verb, in_words, labels_of


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


class AgreementPair(NamedTuple):
    """`prefix` ends with a determiner; " " + `right` continues it, " " + `wrong` breaks `kind` agreement."""

    prefix: str
    right: str
    wrong: str
    kind: str


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


# --- what the items of a rule do -------------------------------------------------------------------------------------


Env = list[Any]
Step = Callable[["Context", Env], None]
Binder = Callable[["Context", Env], Any]
CONSTANTS = {  # gender, number, person of someone unnamed
    "_": (0, 0, 3),
    "_f": (1, 0, 3),
    "_p": (0, 1, 3),
    "_fp": (1, 1, 3),
    "_io": (0, 0, 1),
    "_noi": (0, 1, 1),
    "_tu": (0, 0, 2),
    "_voi": (0, 1, 2),
}
ADJECTIVE_SHARE = 0.35
DROP_SHARE, PRONOUN_SHARE = 0.55, 0.1
_COMPOUND = {"pp": "pres", "trap": "imp", "futa": "fut", "condp": "cond", "subp": "sub", "subtrap": "subimp"}
_COMMANDS = {1: "imp2", 3: "imp4", 4: "imp5"}
_STEMS = {"glielo": "glie", "melo": "me", "telo": "te", "celo": "ce", "velo": "ve"}


class Context:
    """One document in the making. All chance comes from `chance()`, uniform in [0, 1)."""

    __slots__ = ("out", "spans", "open", "chance", "used", "named", "topic", "next_topic")

    def __init__(self, seed: str) -> None:
        self.out: list[Token] = []
        self.spans: list[tuple[int, int, str]] = []
        self.open: list[tuple[int, str]] = []
        self.chance = Random(seed).random
        self.used: dict[str, set[int]] = {}
        self.named: set[str] = set()  # lemmas in use, so that two people or things are not confused
        self.topic: Ref | None = None  # subject of the sentence before
        self.next_topic: Ref | None = None

    def pick(self, values: Sequence[Any]) -> Any:
        """Return one of the values."""
        return values[int(self.chance() * len(values))]

    def weighted(self, cumulative: list[float]) -> int:
        """Return an index drawn by cumulative shares."""
        return bisect_right(cumulative, self.chance()) if len(cumulative) > 1 else 0

    def close_spans(self, n: int | None) -> None:
        """End the `n` construction spans that were opened last; None: all."""
        for _ in range(len(self.open) if n is None else n):
            first, name = self.open.pop()
            self.spans.append((first, len(self.out), name))


def cumulate(weights: Sequence[float]) -> list[float]:
    """Return cumulative shares, the last of them 1."""
    total, running, shares = sum(weights), 0.0, []
    for weight in weights:
        running += weight
        shares.append(running / total)
    shares[-1] = 1.0
    return shares


def literal(token: Token) -> Step:
    """Emit a fixed word; the end of a sentence also makes its subject the topic of the next."""
    if token.form not in (".", "?", "!"):
        return lambda ctx, env: ctx.out.append(token)

    def end(ctx: Context, env: Env) -> None:
        ctx.out.append(token)
        ctx.topic, ctx.next_topic = ctx.next_topic, None

    return end


def noun(nouns: tuple[Noun, ...], numbers: tuple[int, ...], adjective: bool) -> Binder:
    """Choose a noun not yet named in the document when one is free, its number, and perhaps an adjective."""

    def bind(ctx: Context, env: Env) -> Ref:
        noun = ctx.pick(nouns)
        for _ in range(12):
            if noun.lemma not in ctx.named:
                break
            noun = ctx.pick(nouns)
        ctx.named.add(noun.lemma)
        number = numbers[0] if len(numbers) == 1 else int(ctx.chance() * 2)
        if noun.tokens[number] is None:
            number = 1 - number
        token, gender = noun.tokens[number], noun.genders[number]
        core: tuple[Token, ...] = (token,)
        options = (*noun.before, *noun.after)
        if adjective and options and ctx.chance() < ADJECTIVE_SHARE:
            index = int(ctx.chance() * len(options))
            chosen = options[index][gender][number]
            core = (chosen, token) if index < len(noun.before) else (token, chosen)
        return Ref(gender, number, 3, core, noun.place, head=(token,))

    return bind


def subject(slot: int, lex: Lexicon) -> Step:
    """Emit X as subject, or nothing, or a pronoun, when X was the subject of the sentence before."""

    def step(ctx: Context, env: Env) -> None:
        ref: Ref = env[slot]
        ctx.next_topic = ref
        if ctx.topic is ref:
            draw = ctx.chance()
            if draw < DROP_SHARE:
                return
            if draw < DROP_SHARE + PRONOUN_SHARE and ref.number == 0 and ref.core[0].labels["upos"] == "PROPN":
                ctx.out.append(lex.pronouns["lui"][ref.form][ref.gender])
                return
        if ref.core[-1].labels["upos"] != "PROPN":
            ctx.out.append(lex.agreeing["il"][ref.gender][ref.number])
        ctx.out.extend(ref.core)

    return step


def verb(fixed: Verb | None, where: int, key: str, clitic: str, slots: list[int], lex: Lexicon) -> Step:
    """Emit a form of the verb `fixed`, or else of the one bound in slot `where`.

    `slots` are the subject and, for a participle after a clitic, the object.
    """
    if clitic or key in ("inf", "ger", "imp2", "imp4", "imp5", "cmd", "ncmd"):
        return _hosting(fixed, where, key, clitic, slots, lex)
    part = key[-1] if key[-1] in "12" and key[:-1] in _COMPOUND else ""
    tense = key[:-1] if part else key
    compound = tense in _COMPOUND
    shown = _COMPOUND.get(tense, tense)

    def step(ctx: Context, env: Env) -> None:
        entry, ref = fixed or env[where], env[slots[0]]
        if part != "2" and key != "part":
            if entry.reflexive:
                ctx.out.append(lex.pronouns["mi"][ref.form][0])
            finite = lex.auxiliary[entry.takes_essere] if compound else entry
            ctx.out.append(finite.finite[shown][ref.form])
        if key == "part":
            ctx.out.append(entry.participle[ref.gender][ref.number])
        elif compound and part != "1":
            target = env[slots[1]] if len(slots) > 1 else ref if entry.takes_essere else Ref(0, 0, 3, ())
            ctx.out.append(entry.participle[target.gender][target.number])

    return step


def _hosting(fixed: Verb | None, where: int, key: str, clitic: str, slots: list[int], lex: Lexicon) -> Step:
    """Emit an infinitive, gerund or imperative with what hangs on it: a reflexive pronoun, or a clitic.

    A clitic is lo, gli, glielo, melo, telo, celo (agreeing with the last slot) or a fixed pronoun (ne, ci, mi, si...).
    """
    stem = _STEMS.get(clitic, "")
    tokens = lex.pronouns["lo" if stem else clitic] if stem or clitic in lex.pronouns and slots else None

    def step(ctx: Context, env: Env) -> None:
        entry, ref = fixed or env[where], env[slots[0]] if slots else None
        form = clitic
        if tokens is not None:
            object_ = env[slots[-1]]
            form = stem + tokens[object_.form][object_.gender].form
        elif entry.reflexive and not clitic:
            assert ref is not None
            form = lex.pronouns["mi"][ref.form][0].form
        if form:
            ctx.spans.append((len(ctx.out), len(ctx.out) + 1, "enclitic"))
        ctx.out.append(entry.with_clitic(_mode(key, ref), form))

    return step


def _mode(key: str, ref: Ref | None) -> str:
    """Return the form that gives an order to X, or forbids it: «taglia, non tagliare», «tagliate», «tagliare»."""
    if ref is None or key not in ("cmd", "ncmd"):
        return key
    mode = _COMMANDS.get(ref.form, "inf")
    return "inf" if key == "ncmd" and mode == "imp2" else mode


def number(spec: str) -> Step:
    """Emit a number: digits between two bounds with a step (#30-90/10), `w` in words, `year`, or `time` (18.30)."""
    if spec == "time":
        texts = [f"{hour}.{minute}" for hour in range(9, 23) for minute in ("15", "30", "45")]
    elif spec == "year":
        texts = [str(year) for year in range(1990, 2025)]
    else:
        words, thousands = spec[0] == "w", "mila" if spec[-1] == "k" else ""
        bounds, _, step = spec.strip("wk").partition("/")
        low, _, high = bounds.partition("-")
        values = range(int(low), int(high) + 1, int(step or 1))
        texts = [in_words(value) + thousands if words else str(value) for value in values]
    tokens = [Token(text, labels_of(text, "NUM")) for text in texts]
    return lambda ctx, env: ctx.out.append(ctx.pick(tokens))
