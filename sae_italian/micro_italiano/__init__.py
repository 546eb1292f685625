"""MicroItaliano: a seeded grammar of Italian that generates documents with gold labels on character spans.

It also gives prompts with a known answer: the indirect object, and determiners that foretell gender or number.
`document(index, seed)` depends on its two arguments only, on any machine. See grammar.py for the rules' language.
"""

from collections.abc import Iterator
from itertools import count

from sae_italian.micro_italiano import steps
from sae_italian.micro_italiano.grammar import Grammar, load_grammar
from sae_italian.micro_italiano.lexicon import Noun
from sae_italian.micro_italiano.steps import AgreementPair, Context, GoldDocument, IoiPrompt, Ref, Span, realise

__all__ = [
    "AgreementPair",
    "GoldDocument",
    "IoiPrompt",
    "Span",
    "agreement_pairs",
    "document",
    "documents",
    "ioi_prompts",
]

REGISTER_WEIGHTS = {"narrative": 0.32, "news": 0.17, "recipe": 0.11, "law": 0.11, "dialogue": 0.17, "exercise": 0.12}
_REGISTERS = tuple(REGISTER_WEIGHTS)
_CUMULATIVE = steps.cumulate(tuple(REGISTER_WEIGHTS.values()))
_IOI_RULES = ("ioi_testa", "ioi_testa_abituale", "ioi_testa_oggi")
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


def ioi_prompts(n: int, seed: int = 0) -> list[IoiPrompt]:
    """Return `n` prompts from the documents' own templates, ABBA and BABA in turn.

    A is the indirect object (the answer `io`), B the giver (`subject`), as in Wang et al. 2022, arXiv:2211.00593.
    """
    rules = load_grammar()
    return [_ioi_prompt(rules, Context(f"ioi/{seed}/{index}"), index) for index in range(n)]


def _ioi_prompt(rules: Grammar, ctx: Context, index: int) -> IoiPrompt:
    names = rules.lex.classes["nome_c"]
    giver = int(ctx.chance() * len(names))
    other = (giver + 1 + int(ctx.chance() * (len(names) - 1))) % len(names)
    subject, io = (_named(names[which]) for which in (giver, other))
    order = ("ABBA", "BABA")[index % 2]
    first, second = (io, subject) if order == "ABBA" else (subject, io)
    both = (*first.core, rules.lex.words["e"], *second.core)
    joint = Ref(subject.gender & io.gender, 1, 3, both)
    templates = [(name, k) for name in _IOI_RULES for k in range(len(rules.rules[name].alternatives))]
    name, k = ctx.pick(templates)
    rules.rules[name].run(ctx, [subject, io, joint], k)
    ctx.out.append(rules.lex.words["a"])
    return IoiPrompt(realise(ctx.out, ctx.spans)[0], io.core[0].form, subject.core[0].form, f"{name}/{k}", order)


def _named(noun: Noun) -> Ref:
    token = noun.tokens[0]
    assert token is not None
    return Ref(noun.genders[0], 0, 3, (token,))


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
