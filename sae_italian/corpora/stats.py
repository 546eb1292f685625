"""Numbers of a corpus under a tokenizer: fertility, lengths, share of Italian; and the histogram as a picture."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_italian.base.errors import UsageError
from sae_italian.corpora.filters import language_of
from sae_italian.corpora.packing import batched, tokenise
from sae_italian.corpora.stream import CorpusStream, Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LANGUAGE_EVERY = 10  # documents; the share of Italian is measured on this sample
BINS_PER_DECADE = 4
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def corpus_stats(
    corpus: str | Path, tokenizer: PreTrainedTokenizerBase | None, *, n: int | None = 1000, reader: Reader | None = None
) -> dict[str, Any]:
    """Return the numbers of the first `n` kept documents (None: all).

    `fertility` is tokens per word, BOS not counted, None without a tokenizer; a word is a run of letters and digits, an
    elided one (`l'aria`) is one word. `typed_special_tokens` counts documents in which a special token such as `<s>` is
    typed; it is tokenised as the characters it is. `italian_share` is the share of every tenth document that py3langid calls Italian.
    `histogram` counts documents by characters, in bins of a quarter of a power of ten.
    Raises: UsageError when no document is kept.
    """
    stream = CorpusStream(corpus, reader)
    lengths: list[int] = []
    sources, languages = Counter[str](), Counter[str]()
    n_words = n_tokens = n_typed = 0
    special = "|".join(map(re.escape, tokenizer.all_special_tokens)) if tokenizer is not None else ""
    typed = re.compile(special or "(?!)")
    for batch in batched(islice(stream, n), 128):
        texts = [document.text for document in batch]
        languages.update(map(language_of, texts[-len(lengths) % LANGUAGE_EVERY :: LANGUAGE_EVERY]))
        lengths += map(len, texts)
        sources.update(document.source for document in batch)
        n_words += sum(len(_WORD.findall(text)) for text in texts)
        n_typed += sum(typed.search(text) is not None for text in texts)
        n_tokens += 0 if tokenizer is None else sum(tokens.shape[1] for tokens in tokenise(tokenizer, texts))
    if not lengths:
        raise UsageError(f"corpus {str(corpus)!r} has no document to measure.\n{stream.counts.lines()}")
    marks = zip(("min", "p10", "median", "p90", "max"), np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]), strict=True)
    return {
        "corpus": str(corpus),
        "documents": len(lengths),
        "words": n_words,
        "tokens": n_tokens if tokenizer else None,
        "typed_special_tokens": n_typed if tokenizer else None,
        "fertility": n_tokens / n_words if tokenizer and n_words else None,
        "characters": {"mean": float(np.mean(lengths)), **{name: float(mark) for name, mark in marks}},
        "italian_share": languages["it"] / languages.total(),
        "languages": dict(languages.most_common(5)),
        "sources": dict(sources.most_common(20)),
        "histogram": _histogram(lengths),
        "counts": stream.counts.as_dict(),
    }


def _histogram(lengths: list[int]) -> list[dict[str, int]]:
    bins = Counter(math.floor(BINS_PER_DECADE * math.log10(length)) for length in lengths)
    edges = {i: math.ceil(10 ** (i / BINS_PER_DECADE)) for i in range(min(bins), max(bins) + 2)}
    ranges = [(i, edges[i], edges[i + 1] - 1) for i in range(min(bins), max(bins) + 1)]
    return [{"from": first, "to": last, "documents": bins[i]} for i, first, last in ranges if last >= first]


def text_histogram(stats: dict[str, Any], width: int = 40) -> str:
    """Return the histogram as lines of bars."""
    most = max(row["documents"] for row in stats["histogram"])
    line = "{from:>9,} – {to:<9,} {documents:>9,} {bar}"
    return "\n".join(line.format(**row, bar="█" * round(width * row["documents"] / most)) for row in stats["histogram"])


def draw_histogram(stats: dict[str, Any]) -> str:
    """Return the histogram of document lengths as an SVG picture."""
    from sae_italian.base.pictures import OURS, svg

    rows = stats["histogram"]

    def draw(panels: Any) -> None:
        axes = panels[0]
        axes.bar(range(len(rows)), [row["documents"] for row in rows], color=OURS)
        axes.set_xticks(range(len(rows)), [f"{row['from']:,}" for row in rows], rotation=45)
        axes.set_title(f"{stats['corpus']}: {stats['documents']:,} documents")
        axes.set_xlabel("characters in a document, from")
        axes.set_ylabel("documents")

    return svg(draw, 1, (7, 4))
