"""Prompts with a known answer: the indirect object, and determiners that foretell gender or number."""

from __future__ import annotations

from sae_italian.micro_italiano.grammar import Grammar, load_grammar
from sae_italian.micro_italiano.items import Context
from sae_italian.micro_italiano.lexicon import Noun
from sae_italian.micro_italiano.realise import onset, realise
from sae_italian.micro_italiano.records import AgreementPair, IoiPrompt, Ref, Token

_IOI_RULES = ("ioi_testa", "ioi_testa_abituale", "ioi_testa_oggi")
_DETERMINERS = ("il", "il", "un", "questo", "quello")


def _pick(ctx: Context, count: int) -> int:
    return int(ctx.chance() * count)


def _text(ctx: Context) -> str:
    return realise(ctx.out, ctx.spans)[0]


def ioi_prompts(n: int, seed: int = 0) -> list[IoiPrompt]:
    """Return `n` prompts from the documents' own templates, ABBA and BABA in turn.

    A is the indirect object (the answer `io`), B the giver (`subject`), as in Wang et al. 2022, arXiv:2211.00593.
    """
    rules = load_grammar()
    return [_ioi_prompt(rules, Context(f"ioi/{seed}/{index}"), index) for index in range(n)]


def _ioi_prompt(rules: Grammar, ctx: Context, index: int) -> IoiPrompt:
    names = rules.lex.classes["nome_c"]
    giver = _pick(ctx, len(names))
    other = (giver + 1 + _pick(ctx, len(names) - 1)) % len(names)
    subject, io = (_named(names[which]) for which in (giver, other))
    order = ("ABBA", "BABA")[index % 2]
    first, second = (io, subject) if order == "ABBA" else (subject, io)
    both = (*first.core, rules.lex.words["e"], *second.core)
    joint = Ref(subject.gender & io.gender, 1, 3, both, None)
    templates = [(name, k) for name in _IOI_RULES for k in range(len(rules.rules[name].alternatives))]
    name, k = templates[_pick(ctx, len(templates))]
    rules.rules[name].run(ctx, [subject, io, joint], k)
    ctx.out.append(rules.lex.words["a"])
    return IoiPrompt(_text(ctx), io.core[0].form, subject.core[0].form, f"{name}/{k}", order)


def _named(noun: Noun) -> Ref:
    token = noun.tokens[0]
    assert token is not None
    return Ref(noun.genders[0], 0, 3, (token,), noun)


def agreement_pairs(n: int, seed: int = 0) -> list[AgreementPair]:
    """Return `n` pairs, gender and number in turn, each direction (masculine, feminine; singular, plural) as often."""
    rules = load_grammar()
    return [_agreement_pair(rules, Context(f"agreement/{seed}/{index}"), index) for index in range(n)]


def _agreement_pair(rules: Grammar, ctx: Context, index: int) -> AgreementPair:
    kind = ("gender", "number")[index % 2]
    side = index // 2 % 2  # which of the two forms is right: 0 masculine or singular
    if kind == "gender":
        couple = _couples(rules)[_pick(ctx, len(_couples(rules)))]
        number = _pick(ctx, 2)
        right, wrong = couple[side].tokens[number], couple[1 - side].tokens[number]
        gender, context = side, "contesto_persona"
    else:
        nouns = _countable(rules)
        noun = nouns[_pick(ctx, len(nouns))]
        right, wrong = noun.tokens[side], noun.tokens[1 - side]
        gender, number, context = noun.genders[0], side, "contesto_cosa"
    assert right is not None and wrong is not None
    determiners = _DETERMINERS[:2] + _DETERMINERS[3:] if number else _DETERMINERS
    determiner = rules.lex.agreeing[determiners[_pick(ctx, len(determiners))]][gender][number]
    target = Ref(gender, number, 3, (right,), None)
    rules.rules[context].run(ctx, [target])
    ctx.out += [determiner, right]
    text = _text(ctx)
    return AgreementPair(text[: -len(right.form) - 1], right.form, wrong.form, kind)


def _couples(rules: Grammar) -> list[tuple[Noun, Noun]]:
    nouns = rules.lex.classes["persone_coppia"]
    return [(nouns[k], nouns[k + 1]) for k in range(0, len(nouns), 2)]


def _countable(rules: Grammar) -> list[Noun]:
    """Return things whose two numbers differ in form and which take an article that never elides."""
    found = []
    for noun in rules.lex.classes["oggetto"] + rules.lex.classes["dono"] + rules.lex.classes["consegna"]:
        one, many = noun.tokens
        if one and many and one.form != many.form and onset(one.form) == "C" and _regular(noun, one):
            found.append(noun)
    return found


def _regular(noun: Noun, token: Token) -> bool:
    return noun.genders[0] == noun.genders[1] and token.form[0].islower()
