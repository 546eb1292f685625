"""What the longer items of a grammar rule do: closures that emit tokens into a `Context`, or choose a value for a variable."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from sae_italian.micro_italiano.lexicon import Lexicon, Noun, Verb, in_words
from sae_italian.micro_italiano.realise import Ref, Token, labels_of

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
