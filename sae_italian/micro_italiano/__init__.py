"""MicroItaliano: a seeded grammar of Italian that generates documents with gold labels on character spans.

It also gives prompts with a known answer: determiners that foretell gender or number.
`document(index, seed)` depends on its two arguments only, on any machine. See grammar.py for the rules' language.
"""

from collections.abc import Iterator
from itertools import count

from sae_italian.micro_italiano import steps
from sae_italian.micro_italiano.grammar import Grammar, load_grammar
from sae_italian.micro_italiano.lexicon import Noun
from sae_italian.micro_italiano.steps import AgreementPair, Context, GoldDocument, Ref, Span, realise

__all__ = [
    "AgreementPair",
    "GoldDocument",
    "Span",
    "agreement_pairs",
    "document",
    "documents",
]

REGISTER_WEIGHTS = {"narrative": 0.32, "news": 0.17, "recipe": 0.11, "law": 0.11, "dialogue": 0.17, "exercise": 0.12}
_REGISTERS = tuple(REGISTER_WEIGHTS)
_CUMULATIVE = steps.cumulate(tuple(REGISTER_WEIGHTS.values()))
_DETERMINERS = ("il", "il", "un", "questo", "quello")


def document(index: int, seed: int = 0) -> GoldDocument:
    """Return document `index` of the corpus of `seed`."""
    ctx = Context(f"{seed}/{index}")
    register = _REGISTERS[ctx.weighted(_CUMULATIVE)]
    load_grammar().rules["doc_" + register].run(ctx, [])
    text, words, constructions = realise(ctx.out, ctx.spans)
    return GoldDocument(text, f"micro-italiano/{seed}/{index}", register, words, constructions)


def documents(n: int | None = None, seed: int = 0, start: int = 0) -> Iterator[GoldDocument]:
    """Yield `n` documents from index `start` on, or without end when `n` is None."""
    for index in count(start) if n is None else range(start, start + n):
        yield document(index, seed)


def agreement_pairs(n: int, seed: int = 0) -> list[AgreementPair]:
    """Return `n` pairs, gender and number in turn, each direction (masculine, feminine; singular, plural) as often."""
    rules = load_grammar()
    return [_agreement_pair(rules, Context(f"agreement/{seed}/{index}"), index) for index in range(n)]


def _agreement_pair(rules: Grammar, ctx: Context, index: int) -> AgreementPair:
    kind = ("gender", "number")[index % 2]
    side = index // 2 % 2  # which of the two forms is right: 0 masculine or singular
    if kind == "gender":
        people = rules.lex.classes["persone_coppia"]
        couple = ctx.pick(list(zip(people[::2], people[1::2], strict=True)))
        number = int(ctx.chance() * 2)
        right, wrong = couple[side].tokens[number], couple[1 - side].tokens[number]
        gender, context = side, "contesto_persona"
    else:
        noun = ctx.pick(_countable(rules))
        right, wrong = noun.tokens[side], noun.tokens[1 - side]
        gender, number, context = noun.genders[0], side, "contesto_cosa"
    assert right is not None and wrong is not None
    determiners = _DETERMINERS[:2] + _DETERMINERS[3:] if number else _DETERMINERS
    determiner = rules.lex.agreeing[ctx.pick(determiners)][gender][number]
    rules.rules[context].run(ctx, [Ref(gender, number, 3, (right,))])
    ctx.out += [determiner, right]
    text = realise(ctx.out, ctx.spans)[0]
    return AgreementPair(text[: -len(right.form) - 1], right.form, wrong.form, kind)


def _countable(rules: Grammar) -> list[Noun]:
    """Return things whose two numbers differ in form and which take an article that never elides."""
    found = []
    for noun in (noun for name in ("oggetto", "dono", "consegna") for noun in rules.lex.classes[name]):
        one, many = noun.tokens
        if one and many and one.form != many.form and noun.genders[0] == noun.genders[1]:
            found += [noun] if steps.onset(one.form) == "C" and one.form[0].islower() else []
    return found
