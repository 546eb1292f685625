"""The grammar files' language: rules are parsed and compiled to closures that emit tokens into a `Context`.

A file holds rules; `name(A,B):` opens one (`name!` : its alternatives are not repeated within a document) and each
"- " begins an alternative, "%3" first gives it a weight. Items are separated by spaces:

    word            a word of data/words.yaml, with its tag        ( a | %2 b | )  a choice
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

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from sae_italian.micro_italiano import items
from sae_italian.micro_italiano.items import Context, Env, Step
from sae_italian.micro_italiano.lexicon import Lexicon, data_text, load_lexicon

GRAMMAR_FILES = ("common", "ioi", "narrative", "news", "recipe", "law", "dialogue", "pairs", "exercise")
_HEADER = re.compile(r"^(\w+)(!?)(?:\(([\w,]*)\))?:$")
_CALL = re.compile(r"^\$(\w+)(?:\(([\w,]*)\))?(?:\*(\d)-(\d))?$")
_VERB = re.compile(r"^([\w/]+)\.([a-z]+[1245]?)(?:\+(\w+))?((?:\^\w+)*)$")
_AGREE = re.compile(r"^([\w</]+)\^(\w+)$")


class Rule:
    """A named set of weighted alternatives, each a compiled sequence with its number of variables."""

    def __init__(self, name: str, unique: bool, params: list[str]) -> None:
        self.name, self.unique, self.params = name, unique, params
        self.sources: list[str] = []
        self.alternatives: list[tuple[int, tuple[Step, ...]]] = []
        self.cumulative: list[float] = []

    def run(self, ctx: Context, args: list[object], index: int | None = None) -> None:
        """Emit one alternative, chosen by weight unless `index` names it."""
        size, steps = self.alternatives[self._pick(ctx) if index is None else index]
        env: Env = [None] * size
        env[: len(args)] = args
        for step in steps:
            step(ctx, env)

    def _pick(self, ctx: Context) -> int:
        index = items.weighted(ctx, self.cumulative)
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
    """All rules of the grammar files; `run` emits a rule into a context."""

    def __init__(self, lex: Lexicon) -> None:
        self.lex = lex
        self.rules: dict[str, Rule] = {}
        for name in GRAMMAR_FILES:
            self._read(name)
        faults: list[str] = []
        for rule in self.rules.values():
            self._compile(rule, faults)
        if faults:
            raise ValueError("the grammar files have faults:\n" + "\n".join(faults))

    def _read(self, name: str) -> None:
        rule: Rule | None = None
        for line in data_text(name + ".txt").splitlines():
            text = line.strip()
            if not text or text.startswith("#  ") or text == "#":
                continue
            header = _HEADER.match(text)
            if header:
                params = [p for p in (header[3] or "").split(",") if p]
                rule = Rule(header[1], bool(header[2]), params)
                if rule.name in self.rules:
                    raise ValueError(f"{name}.txt: rule {rule.name!r} is defined twice. Rename one.")
                self.rules[rule.name] = rule
            elif rule is None:
                raise ValueError(f"{name}.txt: {text!r} stands before any rule. Open one with `name:`.")
            elif text.startswith("- "):
                rule.sources.append(text[2:])
            else:
                rule.sources[-1] += " " + text

    def _compile(self, rule: Rule, faults: list[str]) -> None:
        weights = []
        for source in rule.sources:
            words = source.split()
            weights.append(float(words.pop(0)[1:]) if words[0][0] == "%" else 1.0)
            try:
                parser = _Parser(self, _hoist(words), list(rule.params))
                body = parser.sequence()
                steps = (*parser.constants, *body)
            except (ValueError, KeyError, IndexError) as error:
                faults.append(f"rule {rule.name!r}: {error!s} in {source!r}")
                continue
            rule.alternatives.append((len(parser.names), steps))
        rule.cumulative = items.cumulate(weights)


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

    def sequence(self) -> tuple[Step, ...]:
        steps: list[Step] = []
        while self.at < len(self.words) and self.words[self.at] not in ("|", ")"):
            word = self.words[self.at]
            self.at += 1
            steps.append(self._choice() if word == "(" else self._item(word))
        return tuple(steps)

    def _choice(self) -> Step:
        branches: list[tuple[Step, ...]] = []
        weights: list[float] = []
        while True:
            weight = 1.0
            if self.words[self.at].startswith("%"):
                weight = float(self.words[self.at][1:])
                self.at += 1
            branches.append(self.sequence())
            weights.append(weight)
            self.at += 1
            if self.words[self.at - 1] == ")":
                return items.choice(branches, items.cumulate(weights))

    def _slot(self, name: str) -> int:
        if name in items.CONSTANTS and name not in self.names:
            self.names.append(name)
            self.constants.append(items.assign(self.names.index(name), items.bind_constant(name)))
        if name not in self.names:
            raise ValueError(f"variable {name!r} is not bound; known are {self.names}")
        return self.names.index(name)

    def _item(self, word: str) -> Step:
        if word in self.lex.words:
            return items.literal(self.lex.words[word])
        if ":=" in word:
            return self._binding(*word.split(":="))
        if word == ">":
            return items.close_span
        if word == ">>":
            return items.close_spans
        handlers: dict[str, Callable[[str], Step]] = {
            "<": self._open,
            "$": lambda rest: self._call("$" + rest),
            "=": lambda rest: items.subject(self._slot(rest), self.lex),
            "@": lambda rest: items.place(self._slot(rest)),
            "~": lambda rest: items.phrase(self._slot(rest), ()),
            "#": items.number,
        }
        if word[0] in handlers:
            return handlers[word[0]](word[1:])
        if "~" in word:
            determiners, name = word.split("~")
            grids = tuple(self.lex.agreeing[d] for d in determiners.split("+"))
            return items.phrase(self._slot(name), grids)
        if match := _AGREE.match(word):
            return self._agreeing(match[1], match[2])
        if match := _VERB.match(word):
            return self._verb(match)
        raise ValueError(f"unknown word {word!r}; add it to data/words.yaml")

    def _open(self, name: str) -> Step:
        return items.open_command(self._slot(name[4:])) if name.startswith("cmd^") else items.open_span(name)

    def _call(self, word: str) -> Step:
        match = _CALL.match(word)
        if match is None:
            raise ValueError(f"malformed call {word!r}")
        rule = self.grammar.rules[match[1]]
        slots = [self._slot(name) for name in (match[2] or "").split(",") if name]
        if len(slots) != len(rule.params):
            raise ValueError(f"{word!r}: rule takes {rule.params}")
        return items.call(rule.run, slots, int(match[3] or 1), int(match[4] or 1))

    def _binding(self, name: str, spec: str) -> Step:
        if spec.startswith("adj:"):
            values: list[object] = [self.lex.agreeing[a] for a in self.lex.adjective_classes[spec[4:]]]
            bind = items.bind_one(values)
        elif spec.startswith("verb:"):
            bind = items.bind_one([self.lex.verbs[v] for v in spec[5:].split("/")])
        elif spec.startswith("&"):
            first, second = spec.lstrip("&?").split(",")
            bind = items.bind_both(self._slot(first), self._slot(second), "?" in spec, self.lex.words["e"])
        elif "(" in spec:
            kind, _, rest = spec.rstrip(")").partition("(")
            bind = items.bind_speaker(kind, [self._slot(part) for part in rest.split(",")])
        elif spec in items.CONSTANTS:
            bind = items.bind_constant(spec)
        elif "^" in spec:
            cls, _, other = spec.partition("^")
            pair = self._noun_binding(cls + ".m"), self._noun_binding(cls + ".f")
            bind = items.bind_same_gender(self._slot(other), pair)
        else:
            bind = self._noun_binding(spec)
        if name not in self.names:
            self.names.append(name)
        return items.assign(self.names.index(name), bind)

    def _noun_binding(self, spec: str) -> Callable[[Context, Env], object]:
        classes, _, options = spec.rstrip("+").partition(".")
        nouns = tuple(noun for cls in classes.split("/") for noun in self.lex.classes[cls])
        gender = 0 if "m" in options else 1 if "f" in options else None
        if gender is not None:
            nouns = tuple(noun for noun in nouns if noun.genders[0] == gender)
        numbers = (0, 1) if "sp" in options else (1,) if "p" in options else (0,)
        return items.bind_noun(nouns, numbers, spec.endswith("+"))

    def _agreeing(self, head: str, name: str) -> Step:
        slot = self._slot(name)
        if head in self.names:
            return items.agree_with(self.names.index(head), slot)
        if head in self.lex.pronouns or head == "glielo":
            return items.pronoun(head, slot, self.lex)
        return items.agree(self.lex.agreeing[head], slot)

    def _verb(self, match: re.Match[str]) -> Step:
        head, key, clitic = match[1], match[2], match[3]
        slots = [self._slot(name) for name in match[4].split("^") if name]
        where = self.names.index(head) if head in self.names else -1
        verb = self.lex.verbs[head] if where < 0 else None
        return items.verb(verb, where, key, clitic, slots, self.lex)


@lru_cache(maxsize=1)
def load_grammar() -> Grammar:
    """Return the compiled grammar, built on first use."""
    return Grammar(load_lexicon())
