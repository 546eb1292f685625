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
from sae_italian.base.storage import write_text
from sae_italian.corpora.filters import language_of
from sae_italian.corpora.packing import batched
from sae_italian.corpora.stream import CorpusStream, Reader
from sae_italian.corpora.words import WordTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LANGUAGE_EVERY = 10  # documents; the share of Italian is measured on this sample
BINS_PER_DECADE = 4
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*", re.UNICODE)


def corpus_stats(
    corpus: str | Path, tokenizer: PreTrainedTokenizerBase | None, *, n: int | None = 1000, reader: Reader | None = None
) -> dict[str, Any]:
    """Return the numbers of the first `n` kept documents (None: all).

    `fertility` is tokens per word, BOS not counted; a word is a run of letters and digits, an elided one (`l'aria`) is
    one word. `italian_share` is the share of every tenth document that py3langid calls Italian. `histogram` counts
    documents by characters, in bins of a quarter of a power of ten. Fertility is None without a tokenizer.
    Raises: UsageError when no document is kept.
    """
    stream = CorpusStream(corpus, reader or Reader())
    words_of = WordTokenizer.of(tokenizer) if tokenizer is not None else None
    lengths: list[int] = []
    sources: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    n_words = n_tokens = 0
    for batch in batched(islice(stream, n), 128):
        for document in batch:
            if len(lengths) % LANGUAGE_EVERY == 0:
                languages[language_of(document.text)] += 1
            lengths.append(len(document.text))
            sources[document.source] += 1
            n_words += sum(1 for _ in _WORD.finditer(document.text))
        if words_of is not None:
            n_tokens += len(words_of.tokenise([d.text for d in batch]).flat)
    if not lengths:
        raise UsageError(f"corpus {str(corpus)!r} has no document to measure.\n{stream.counts.lines()}")
    return {
        "corpus": str(corpus),
        "documents": len(lengths),
        "words": n_words,
        "tokens": n_tokens if words_of else None,
        "fertility": n_tokens / n_words if words_of and n_words else None,
        "characters": _quantiles(lengths),
        "italian_share": languages["it"] / languages.total(),
        "languages": dict(languages.most_common(5)),
        "sources": dict(sources.most_common(20)),
        "histogram": _histogram(lengths),
        "counts": stream.counts.as_dict(),
    }


def _quantiles(lengths: list[int]) -> dict[str, float]:
    marks = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1])
    names = ("min", "p10", "median", "p90", "max")
    return {"mean": float(np.mean(lengths)), **{n: float(m) for n, m in zip(names, marks, strict=True)}}


def _histogram(lengths: list[int]) -> list[dict[str, int]]:
    bins = Counter(math.floor(BINS_PER_DECADE * math.log10(length)) for length in lengths)
    edge = lambda i: math.ceil(10 ** (i / BINS_PER_DECADE))  # noqa: E731
    return [
        {"from": edge(i), "to": edge(i + 1) - 1, "documents": bins[i]}
        for i in range(min(bins), max(bins) + 1)
        if edge(i + 1) > edge(i)
    ]


def text_histogram(stats: dict[str, Any], width: int = 40) -> str:
    """Return the histogram as lines of bars."""
    rows = stats["histogram"]
    most = max(row["documents"] for row in rows)
    lines = []
    for row in rows:
        bar = "█" * round(width * row["documents"] / most)
        lines.append(f"{row['from']:>9,} – {row['to']:<9,} {row['documents']:>9,} {bar}")
    return "\n".join(lines)


def svg_histogram(stats: dict[str, Any], path: Path) -> None:
    """Write the histogram of document lengths as an SVG picture, readable in light and dark."""
    rows, width, height, left, bottom = stats["histogram"], 640, 300, 56, 46
    most = max(row["documents"] for row in rows)
    step = (width - left - 12) / len(rows)
    parts = []
    for i, row in enumerate(rows):
        bar = (height - bottom - 36) * row["documents"] / most
        x, y = left + i * step, height - bottom - bar
        label = f"{row['from']:,} to {row['to']:,} characters: {row['documents']:,} documents"
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{step - 2:.1f}" height="{bar:.1f}"><title>{label}</title></rect>'
        )
        if i % max(1, len(rows) // 8) == 0:
            parts.append(f'<text x="{x:.1f}" y="{height - bottom + 16}">{row["from"]:,}</text>')
    title = f"{_escaped(stats['corpus'])}: {stats['documents']:,} documents"
    style = "text{font:12px sans-serif;fill:#333}rect{fill:#2a78b8}@media(prefers-color-scheme:dark){text{fill:#ddd}}"
    write_text(
        path,
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"><title>{title}</title>'
        f"<style>{style}</style>"
        f'<text x="{left}" y="20">{title}</text><text x="4" y="40">{most:,}</text>{"".join(parts)}'
        f'<text x="{left}" y="{height - 8}">characters in a document (logarithmic); height: documents</text></svg>\n',
    )


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
