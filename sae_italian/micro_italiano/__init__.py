"""MicroItaliano: a seeded grammar of Italian that generates documents with gold labels on character spans.

`document(index, seed)` depends on its two arguments only, on any machine. See grammar.py for the rules' language.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from typing import Any

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
    "vocabulary",
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


@lru_cache(maxsize=4)
def vocabulary(n: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Return what `n` documents hold: counts of forms (lower case), labels, constructions and registers.

    Keys: documents, sentences, words, forms, labels ("gender=Fem" style), constructions, registers.
    """
    forms, labels, constructions, registers = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for doc in documents(n, seed):
        registers[doc.register] += 1
        constructions.update(span.labels["construction"] for span in doc.constructions)
        for span in doc.words:
            forms[doc.text[span.start : span.end].lower()] += 1
            labels.update(f"{key}={value}" for key, value in span.labels.items() if key != "lemma")
    sentences = sum(forms[end] for end in ".?!")
    for mark in [form for form in forms if not any(map(str.isalnum, form))]:
        del forms[mark]
    report: dict[str, Any] = {"documents": n, "sentences": sentences, "words": forms.total()}
    for key, counts in (("forms", forms), ("labels", labels), ("constructions", constructions)):
        report[key] = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    return report | {"registers": dict(registers)}
