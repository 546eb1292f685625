"""What each item of a grammar rule does: closures that emit tokens into a `Context` or bind a variable."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from sae_italian.micro_italiano.lexicon import CLITICS, Grid, Lexicon, Noun, Verb, in_words
from sae_italian.micro_italiano.records import Ref, Token, labels_of

Env = list[Any]
Step = Callable[["Context", Env], None]
Binder = Callable[["Context", Env], object]
_COMPOUND = {"pp": "pres", "trap": "imp", "futa": "fut", "condp": "cond", "subp": "sub", "subtrap": "subimp"}
ADJECTIVE_SHARE = 0.35
DROP_SHARE, PRONOUN_SHARE = 0.55, 0.1


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


def cumulate(weights: Sequence[float]) -> list[float]:
    """Return cumulative shares, the last of them 1."""
    total, running, shares = sum(weights), 0.0, []
    for weight in weights:
        running += weight
        shares.append(running / total)
    shares[-1] = 1.0
    return shares


def weighted(ctx: Context, cumulative: list[float]) -> int:
    """Return an index drawn by cumulative shares."""
    return bisect_right(cumulative, ctx.chance()) if len(cumulative) > 1 else 0


def literal(token: Token) -> Step:
    """Emit a fixed word; sentence-final punctuation also turns the page for `subject`."""
    if token.form not in (".", "?", "!"):
        return lambda ctx, env: ctx.out.append(token)

    def end(ctx: Context, env: Env) -> None:
        ctx.out.append(token)
        ctx.topic, ctx.next_topic = ctx.next_topic, None

    return end


def choice(branches: list[tuple[Step, ...]], cumulative: list[float]) -> Step:
    """Run one of the branches."""

    def step(ctx: Context, env: Env) -> None:
        for inner in branches[weighted(ctx, cumulative)]:
            inner(ctx, env)

    return step


def open_span(name: str) -> Step:
    """Begin a construction span."""
    return lambda ctx, env: ctx.open.append((len(ctx.out), name))


def open_command(slot: int) -> Step:
    """Begin an order: "imperative", or "infinitive_command" when no one in particular is spoken to."""

    def step(ctx: Context, env: Env) -> None:
        ctx.open.append((len(ctx.out), "imperative" if env[slot].person != 3 else "infinitive_command"))

    return step


def close_span(ctx: Context, env: Env) -> None:
    """End the construction span opened last."""
    first, name = ctx.open.pop()
    ctx.spans.append((first, len(ctx.out), name))


def close_spans(ctx: Context, env: Env) -> None:
    """End every construction span still open, if any."""
    while ctx.open:
        close_span(ctx, env)


def call(run: Callable[[Context, list[object]], None], slots: list[int], low: int, high: int) -> Step:
    """Run another rule between `low` and `high` times with the values in `slots`."""
    if low == high == 1:
        return lambda ctx, env: run(ctx, [env[slot] for slot in slots])

    def step(ctx: Context, env: Env) -> None:
        for _ in range(low + int(ctx.chance() * (high - low + 1))):
            run(ctx, [env[slot] for slot in slots])

    return step


def assign(slot: int, bind: Binder) -> Step:
    """Store what `bind` returns."""

    def step(ctx: Context, env: Env) -> None:
        env[slot] = bind(ctx, env)

    return step


CONSTANTS = {  # gender, number, person
    "_": (0, 0, 3),
    "_f": (1, 0, 3),
    "_p": (0, 1, 3),
    "_fp": (1, 1, 3),
    "_io": (0, 0, 1),
    "_noi": (0, 1, 1),
    "_tu": (0, 0, 2),
    "_voi": (0, 1, 2),
}


def bind_constant(name: str) -> Binder:
    """Bind someone known only by gender, number and person."""
    ref = Ref(*CONSTANTS[name], (), None)
    return lambda ctx, env: ref


def bind_one(values: Sequence[object]) -> Binder:
    """Choose one of some adjectives or verbs."""
    return lambda ctx, env: values[int(ctx.chance() * len(values))]


def bind_same_gender(slot: int, binders: tuple[Binder, Binder]) -> Binder:
    """Choose with the binder for the gender of X: the first name that goes with «la sindaca»."""
    return lambda ctx, env: binders[env[slot].gender](ctx, env)


def bind_noun(nouns: tuple[Noun, ...], numbers: tuple[int, ...], adjective: bool) -> Binder:
    """Choose a noun not yet named in the document when one is free, its number, and perhaps an adjective."""
    total = len(nouns)

    def bind(ctx: Context, env: Env) -> Ref:
        chance = ctx.chance
        noun = nouns[int(chance() * total)]
        for _ in range(12):
            if noun.lemma not in ctx.named:
                break
            noun = nouns[int(chance() * total)]
        ctx.named.add(noun.lemma)
        number = numbers[0] if len(numbers) == 1 else int(chance() * 2)
        token = noun.tokens[number]
        if token is None:
            number = 1 - number
            token = noun.tokens[number]
            assert token is not None
        gender = noun.genders[number]
        core: tuple[Token, ...] = (token,)
        options = len(noun.before) + len(noun.after)
        if adjective and options and chance() < ADJECTIVE_SHARE:
            index = int(chance() * options)
            if index < len(noun.before):
                core = (noun.before[index][gender][number], token)
            else:
                core = (token, noun.after[index - len(noun.before)][gender][number])
        ref = Ref(gender, number, 3, core, noun, noun.place)
        ref.head = (token,)
        return ref

    return bind


def bind_both(first: int, second: int, any_order: bool, conjunction: Token) -> Binder:
    """Join two people: plural, feminine only when both are."""

    def bind(ctx: Context, env: Env) -> Ref:
        a, b = env[first], env[second]
        if any_order and ctx.chance() < 0.5:
            a, b = b, a
        return Ref(a.gender & b.gender, 1, 3, (*a.core, conjunction, *b.core), None)

    return bind


def bind_speaker(kind: str, slots: list[int]) -> Binder:
    """Make someone the speaker (io, noi) or the one spoken to (tu, voi)."""
    person = 1 if kind in ("io", "noi") else 2
    number = 1 if kind in ("noi", "voi") else 0

    def bind(ctx: Context, env: Env) -> Ref:
        gender = 1
        for slot in slots:
            gender &= env[slot].gender
        return Ref(gender, number, person, (), None)

    return bind


def phrase(slot: int, grids: tuple[Grid, ...]) -> Step:
    """Emit determiners and the noun with its adjective."""
    if not grids:
        return lambda ctx, env: ctx.out.extend(env[slot].core)

    def step(ctx: Context, env: Env) -> None:
        ref = env[slot]
        for grid in grids:
            ctx.out.append(grid[ref.gender][ref.number])
        ctx.out.extend(ref.core)
        ref.core = ref.head  # an adjective is said once: «una gatta nera», then «la gatta»

    return step


def place(slot: int) -> Step:
    """Emit the place with its preposition: al mercato, in piazza."""
    return lambda ctx, env: ctx.out.extend(env[slot].place)


def subject(slot: int, lex: Lexicon) -> Step:
    """Emit X as subject, or nothing, or a pronoun, when X was the subject of the sentence before."""
    pronouns = lex.pronouns["lui"]

    def step(ctx: Context, env: Env) -> None:
        ref: Ref = env[slot]
        ctx.next_topic = ref
        if ctx.topic is ref:
            draw = ctx.chance()
            if draw < DROP_SHARE:
                return
            if draw < DROP_SHARE + PRONOUN_SHARE and ref.number == 0 and ref.core[0].labels["upos"] == "PROPN":
                ctx.out.append(pronouns[_person(ref)][ref.gender])
                return
        if ref.core[-1].labels["upos"] != "PROPN":
            ctx.out.append(lex.articles[ref.gender][ref.number])
        ctx.out.extend(ref.core)

    return step


def agree(grid: Grid, slot: int) -> Step:
    """Emit an agreeing word."""

    def step(ctx: Context, env: Env) -> None:
        ref = env[slot]
        ctx.out.append(grid[ref.gender][ref.number])

    return step


def agree_with(where: int, slot: int) -> Step:
    """Emit the adjective bound in slot `where`."""

    def step(ctx: Context, env: Env) -> None:
        ref = env[slot]
        ctx.out.append(env[where][ref.gender][ref.number])

    return step


def _person(ref: Ref) -> int:
    return ref.person - 1 + 3 * ref.number


def pronoun(kind: str, slot: int, lex: Lexicon) -> Step:
    """Emit the pronoun for X: reflexive mi, accusative lo, dative gli, stressed lui, or glielo agreeing with X."""
    if kind == "glielo":
        return agree(lex.agreeing["glielo"], slot)
    tokens = lex.pronouns[kind]

    def step(ctx: Context, env: Env) -> None:
        ref = env[slot]
        ctx.out.append(tokens[_person(ref)][ref.gender])

    return step


def verb(fixed: Verb | None, where: int, key: str, clitic: str | None, slots: list[int], lex: Lexicon) -> Step:
    """Emit a form of the verb `fixed`, or else of the one bound in slot `where`.

    `slots` are the subject and, for a participle after a clitic, the object.
    """
    if clitic is not None:
        return _with_clitic(fixed, where, key, clitic, slots, lex)
    part = key[-1] if key[-1] in "12" and key[:-1] in _COMPOUND else ""
    tense = key[:-1] if part else key
    reflexive = lex.pronouns["mi"]
    if key in ("inf", "ger", "imp2", "imp4", "imp5", "cmd", "ncmd"):
        return _single(fixed, where, key, slots)
    if key == "part":
        return lambda ctx, env: ctx.out.append(
            (fixed or env[where]).participle[env[slots[0]].gender][env[slots[0]].number]
        )
    if tense not in _COMPOUND:

        def finite(ctx: Context, env: Env) -> None:
            entry, ref = fixed or env[where], env[slots[0]]
            if entry.reflexive:
                ctx.out.append(reflexive[_person(ref)][0])
            ctx.out.append(entry.finite[tense][_person(ref)])

        return finite
    auxiliary_tense = _COMPOUND[tense]

    def compound(ctx: Context, env: Env) -> None:
        entry, ref = fixed or env[where], env[slots[0]]
        if part != "2":
            if entry.reflexive:
                ctx.out.append(reflexive[_person(ref)][0])
            ctx.out.append(lex.auxiliary[entry.takes_essere].finite[auxiliary_tense][_person(ref)])
        if part != "1":
            target = env[slots[1]] if len(slots) > 1 else ref if entry.takes_essere else None
            forms = entry.participle
            ctx.out.append(forms[0][0] if target is None else forms[target.gender][target.number])

    return compound


_COMMANDS = {1: "imp2", 3: "imp4", 4: "imp5"}


def _mode(key: str, ref: Ref | None) -> str:
    """Return the form that gives an order to X, or forbids it: «taglia, non tagliare», «tagliate», «tagliare»."""
    if ref is None or key not in ("cmd", "ncmd"):
        return key
    mode = _COMMANDS.get(_person(ref), "inf")
    return "inf" if key == "ncmd" and mode == "imp2" else mode


def _single(fixed: Verb | None, where: int, key: str, slots: list[int]) -> Step:
    def step(ctx: Context, env: Env) -> None:
        entry = fixed or env[where]
        ref = env[slots[0]] if slots else None
        mode = _mode(key, ref)
        if entry.reflexive:
            assert ref is not None
            ctx.spans.append((len(ctx.out), len(ctx.out) + 1, "enclitic"))
            ctx.out.append(entry.with_clitic(mode, CLITICS["mi"][_person(ref)]))
        else:
            ctx.out.append(entry.single[mode])

    return step


def _with_clitic(fixed: Verb | None, where: int, key: str, clitic: str, slots: list[int], lex: Lexicon) -> Step:
    """Attach lo, gli, glielo, melo, telo, celo (agreeing with a slot) or a fixed pronoun (ne, ci, mi, si...)."""
    stem = {"glielo": "glie", "melo": "me", "telo": "te", "celo": "ce", "velo": "ve"}.get(clitic)
    tokens = lex.pronouns["lo" if stem else clitic] if stem or clitic in CLITICS and slots else None

    def step(ctx: Context, env: Env) -> None:
        form = clitic
        if tokens is not None:
            ref = env[slots[-1]]
            form = (stem or "") + tokens[_person(ref)][ref.gender].form
        ctx.spans.append((len(ctx.out), len(ctx.out) + 1, "enclitic"))
        mode = _mode(key, env[slots[0]] if slots else None)
        ctx.out.append((fixed or env[where]).with_clitic(mode, form))

    return step


def number(spec: str) -> Step:
    """Emit a number: digits between two bounds with a step (#30-90/10), `w` in words, `year`, or `time` (18.30)."""
    if spec == "time":
        times = [f"{hour}.{minute}" for hour in range(9, 23) for minute in ("15", "30", "45")]
        return _one_of([Token(text, labels_of(text, "NUM")) for text in times])
    if spec == "year":
        return _one_of([Token(str(year), labels_of(str(year), "NUM")) for year in range(1990, 2025)])
    words, thousands = spec[0] == "w", "mila" if spec[-1] == "k" else ""
    bounds, _, step = spec.strip("wk").partition("/")
    low, _, high = bounds.partition("-")
    span = range(int(low), int(high) + 1, int(step or 1))
    numbers = [in_words(value) + thousands if words else str(value) for value in span]
    return _one_of([Token(text, labels_of(text, "NUM")) for text in numbers])


def _one_of(tokens: list[Token]) -> Step:
    return lambda ctx, env: ctx.out.append(tokens[int(ctx.chance() * len(tokens))])
