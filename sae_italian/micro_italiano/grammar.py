"""The grammar files' language: rules are parsed and compiled to closures that emit tokens into a `Context`.

A file holds rules; `name(A,B):` opens one (`name!` : its alternatives are not repeated within a document) and each
"- " begins an alternative, "%3" first gives it a weight. Items are separated by spaces:

    word            a word of data/words.yaml, with its tag        ( a | b | )  a choice
    X:=class.p+     bind X to a noun: s p sp (number), m f, "+" may take an adjective
    X:=class^Y      a noun of the gender of Y
    X:=&A,B  X:=&?A,B   both, in this or in any order              X:=io(A) tu(A) noi(A,B) voi(A) voi(A,B)
    q:=adj:class    v:=verb:comprare/pagare                       bind an adjective, a verb
    ~X  il~X  il+suo~X  the noun phrase, with determiners          @X   how one is in the place X
    =X              X as subject: left out or a pronoun when X was the subject of the sentence before
    buono^X  lo^X   agreeing word, or pronoun for X (mi lo gli lui glielo)
    verb.key^S^O    finite tense (pres imp fut cond sub subimp), compound (pp trap condp subp subtrap), its first or
                    second word (pp1 pp2), inf ger imp2 imp4 imp5, part^X, cmd^T ncmd^T (an order to T, a ban);
                    +lo^O adds an enclitic; S is the subject
    #2-28 #30-90/10 #w2-9 #w2-9k #year #time    numbers: in digits, in steps, in words, in thousands
    $rule(A,B)*2-4  another rule, repeated
    <name ... >     a construction span; "<cmd^T" is an order to T; ">>" ends all that are open
    _ _f _p _fp _io _tu _noi _voi               someone unnamed, to agree with

"clitic_left" spans hold a direct or indirect object pronoun and the finite verb after it: «lo vede», «gli ha detto»,
not the reflexive, ne, or ci of place.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from sae_italian.micro_italiano import steps
from sae_italian.micro_italiano.lexicon import Lexicon, data_text
from sae_italian.micro_italiano.steps import CONSTANTS, Binder, Context, Env, Ref, Step

GRAMMAR_FILES = ("common", "ioi", "narrative", "news", "recipe", "law", "dialogue", "pairs", "exercise")
_HEADER = re.compile(r"^(\w+)(!?)(?:\(([\w,]*)\))?:$")
_CALL = re.compile(r"^\$(\w+)(?:\(([\w,]*)\))?(?:\*(\d)-(\d))?$")
_VERB = re.compile(r"^([\w/]+)\.([a-z]+[1245]?)(?:\+(\w+))?((?:\^\w+)*)$")
_AGREE = re.compile(r"^([\w</]+)\^(\w+)$")


@dataclass
class Rule:
    """A named set of weighted alternatives, each a compiled sequence with its number of variables."""

    name: str
    unique: bool
    params: list[str]
    sources: list[str] = field(default_factory=list)
    alternatives: list[tuple[int, list[Step]]] = field(default_factory=list)
    cumulative: list[float] = field(default_factory=list)

    def run(self, ctx: Context, args: list[Any]) -> None:
        """Emit one alternative, chosen by weight."""
        size, body = self.alternatives[self._pick(ctx)]
        env: Env = [None] * size
        env[: len(args)] = args
        for step in body:
            step(ctx, env)

    def _pick(self, ctx: Context) -> int:
        index = ctx.weighted(self.cumulative)
        if not self.unique:
            return index
        used = ctx.used.setdefault(self.name, set())
        if len(used) >= len(self.alternatives):
            used.clear()
        while index in used:
            index = (index + 1) % len(self.alternatives)
        used.add(index)
        return index


class Grammar:
    """All rules of the grammar files."""

    def __init__(self, lex: Lexicon) -> None:
        self.lex = lex
        self.rules: dict[str, Rule] = {}
        for name in GRAMMAR_FILES:
            self._read(name)
        for rule in self.rules.values():
            self._compile(rule)

    def _read(self, name: str) -> None:
        rule = Rule(name, False, [])
        for line in data_text(name + ".txt").splitlines():
            text = line.strip()
            if not text or text.startswith("#  ") or text == "#":
                continue
            header = _HEADER.match(text)
            if header:
                rule = Rule(header[1], bool(header[2]), [p for p in (header[3] or "").split(",") if p])
                self.rules[rule.name] = rule
            elif text.startswith("- "):
                rule.sources.append(text[2:])
            else:
                rule.sources[-1] += " " + text

    def _compile(self, rule: Rule) -> None:
        """Compile the alternatives of a rule."""
        weights = []
        for source in rule.sources:
            words = source.split()
            weights.append(float(words.pop(0)[1:]) if words[0][0] == "%" else 1.0)
            parser = _Parser(self, _hoist(words), list(rule.params))
            body = parser.sequence()
            rule.alternatives.append((len(parser.names), parser.constants + body))
        rule.cumulative = steps.cumulate(weights)


def _hoist(words: list[str]) -> list[str]:
    """Return the words with the bindings outside choices in front, so that they may be written anywhere."""
    depth, bindings, others = 0, [], []
    for word in words:
        depth += (word == "(") - (word == ")")
        (bindings if ":=" in word and depth == 0 else others).append(word)
    return bindings + others


class _Parser:
    """Compile one alternative; `names` are its variables in the order of their slots."""

    def __init__(self, grammar: Grammar, words: list[str], names: list[str]) -> None:
        self.grammar, self.lex = grammar, grammar.lex
        self.words, self.names = words, names
        self.constants: list[Step] = []
        self.at = 0

    def sequence(self) -> list[Step]:
        """Compile the words up to the end, or to the end of a choice's branch."""
        body: list[Step] = []
        while self.at < len(self.words) and self.words[self.at] not in ("|", ")"):
            word = self.words[self.at]
            self.at += 1
            body.append(self._choice() if word == "(" else self._item(word))
        return body

    def _choice(self) -> Step:
        branches: list[list[Step]] = []
        while not branches or self.words[self.at - 1] != ")":
            branches.append(self.sequence())
            self.at += 1
        cumulative = steps.cumulate([1.0] * len(branches))

        def step(ctx: Context, env: Env) -> None:
            for inner in branches[ctx.weighted(cumulative)]:
                inner(ctx, env)

        return step

    def _item(self, word: str) -> Step:
        if word in self.lex.words:
            return steps.literal(self.lex.words[word])
        if ":=" in word:
            name, spec = word.split(":=")
            return self._assign(name, self._binder(spec))
        if word in (">", ">>"):
            return lambda ctx, env: ctx.close_spans(None if word == ">>" else 1)
        first, rest = word[0], word[1:]
        if first == "@":
            place = self._slot(rest)
            return lambda ctx, env: ctx.out.extend(env[place].place)
        if first == "=":
            return steps.subject(self._slot(rest), self.lex)
        if first in "<$#":
            compilers: dict[str, Callable[[str], Step]] = {"<": self._open, "$": self._call, "#": steps.number}
            return compilers[first](rest)
        if "~" in word:
            return self._phrase(*word.split("~"))
        if match := _AGREE.match(word):
            return self._agreeing(match[1], match[2])
        if match := _VERB.match(word):
            head, slots = match[1], [self._slot(name) for name in match[4].split("^") if name]
            where = self.names.index(head) if head in self.names else -1
            fixed = self.lex.verbs[head] if where < 0 else None
            return steps.verb(fixed, where, match[2], match[3] or "", slots, self.lex)
        raise ValueError(f"unknown word {word!r}; add it to data/words.yaml")

    def _slot(self, name: str) -> int:
        if name in CONSTANTS and name not in self.names:
            self.constants.append(self._assign(name, self._binder(name)))
        return self.names.index(name)

    def _assign(self, name: str, bind: Binder) -> Step:
        if name not in self.names:
            self.names.append(name)
        slot = self.names.index(name)

        def step(ctx: Context, env: Env) -> None:
            env[slot] = bind(ctx, env)

        return step

    def _binder(self, spec: str) -> Binder:
        if spec in CONSTANTS:
            nobody = Ref(*CONSTANTS[spec], ())
            return lambda ctx, env: nobody
        if spec.startswith(("adj:", "verb:")):
            kind, _, names = spec.partition(":")
            entries = self.lex.adjective_classes[names] if kind == "adj" else names.split("/")
            values = [self.lex.agreeing[name] if kind == "adj" else self.lex.verbs[name] for name in entries]
            return lambda ctx, env: ctx.pick(values)
        if spec.startswith("&"):
            return self._both(*map(self._slot, spec.lstrip("&?").split(",")), any_order="?" in spec)
        if "(" in spec:
            kind, _, rest = spec.rstrip(")").partition("(")
            slots = [self._slot(part) for part in rest.split(",")]
            number, person = int(kind in ("noi", "voi")), 1 if kind in ("io", "noi") else 2
            # feminine only when all of them are
            return lambda ctx, env: Ref(min(env[slot].gender for slot in slots), number, person, ())
        if "^" in spec:
            cls, _, other = spec.partition("^")
            slot, pair = self._slot(other), (self._noun(cls + ".m"), self._noun(cls + ".f"))
            return lambda ctx, env: pair[env[slot].gender](ctx, env)
        return self._noun(spec)

    def _both(self, first: int, second: int, any_order: bool) -> Binder:
        """Join two people: plural, feminine only when both are."""
        conjunction = self.lex.words["e"]

        def bind(ctx: Context, env: Env) -> Ref:
            a, b = env[first], env[second]
            if any_order and ctx.chance() < 0.5:
                a, b = b, a
            return Ref(a.gender & b.gender, 1, 3, (*a.core, conjunction, *b.core))

        return bind

    def _noun(self, spec: str) -> Binder:
        classes, _, options = spec.rstrip("+").partition(".")
        nouns = tuple(noun for cls in classes.split("/") for noun in self.lex.classes[cls])
        gender = 0 if "m" in options else 1 if "f" in options else None
        if gender is not None:
            nouns = tuple(noun for noun in nouns if noun.genders[0] == gender)
        numbers = (0, 1) if "sp" in options else (1,) if "p" in options else (0,)
        return steps.noun(nouns, numbers, spec.endswith("+"))

    def _open(self, name: str) -> Step:
        """Begin a construction span; an order is "infinitive_command" when no one in particular is spoken to."""
        if not name.startswith("cmd^"):
            return lambda ctx, env: ctx.open.append((len(ctx.out), name))
        slot, names = self._slot(name[4:]), {3: "infinitive_command"}
        return lambda ctx, env: ctx.open.append((len(ctx.out), names.get(env[slot].person, "imperative")))

    def _call(self, word: str) -> Step:
        match = _CALL.match("$" + word)
        assert match is not None
        rule = self.grammar.rules[match[1]]
        slots = [self._slot(name) for name in (match[2] or "").split(",") if name]
        low, high = int(match[3] or 1), int(match[4] or 1)

        def step(ctx: Context, env: Env) -> None:
            for _ in range(low if low == high == 1 else low + int(ctx.chance() * (high - low + 1))):
                rule.run(ctx, [env[slot] for slot in slots])

        return step

    def _phrase(self, determiners: str, name: str) -> Step:
        grids = [self.lex.agreeing[d] for d in determiners.split("+") if d]
        slot = self._slot(name)

        def step(ctx: Context, env: Env) -> None:
            ref = env[slot]
            ctx.out.extend(grid[ref.gender][ref.number] for grid in grids)
            ctx.out.extend(ref.core)
            if grids:
                ref.core = ref.head or ref.core  # its adjective is said once: «una gatta nera», «la gatta»

        return step

    def _agreeing(self, head: str, name: str) -> Step:
        slot = self._slot(name)
        if head in self.lex.pronouns and head not in self.names:
            tokens = self.lex.pronouns[head]
            return lambda ctx, env: ctx.out.append(tokens[env[slot].form][env[slot].gender])
        where = self.names.index(head) if head in self.names else -1
        fixed = self.lex.agreeing[head] if where < 0 else None
        return lambda ctx, env: ctx.out.append((fixed or env[where])[env[slot].gender][env[slot].number])


@lru_cache(maxsize=1)
def load_grammar() -> Grammar:
    """Return the compiled grammar, built on first use."""
    return Grammar(Lexicon())
