"""MicroItaliano: a seeded grammar of Italian that generates documents with gold labels on character spans.

`document(index, seed)` depends on its two arguments only, on any machine. See grammar.py for the rules' language.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from sae_italian.micro_italiano.grammar import load_grammar
from sae_italian.micro_italiano.prompts import agreement_pairs, ioi_prompts
from sae_italian.micro_italiano.realise import AgreementPair, GoldDocument, IoiPrompt, Span, realise
from sae_italian.micro_italiano.steps import Context, cumulate

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
_CUMULATIVE = cumulate(tuple(REGISTER_WEIGHTS.values()))


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
