"""The commands of corpora: the catalogue, what a corpus holds, and packing it into tokens ahead of time."""

from __future__ import annotations

import re
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

import sae_italian
from sae_italian.base.errors import UsageError
from sae_italian.base.report import table
from sae_italian.base.storage import write_text
from sae_italian.cli.options import Count, Folder, Result, Seed, facts, key_values

if TYPE_CHECKING:
    from sae_italian.corpora import Reader

MICRO = "micro-italiano"
Corpus = Annotated[str, Parameter(help="micro-italiano, a name of `corpora list`, hf://datasets/..., or a local path.")]
Words = Annotated[str, Parameter(help="Rare settings of the reading: split=heldout on_broken=skip min_chars=200 ...")]
TextColumn = Annotated[str, Parameter(help="Column that holds the text.")]
Italian = Annotated[bool, Parameter(help="Drop documents in other languages.")]
Deduplicate = Annotated[
    Literal["no", "exact", "near"], Parameter(help="Drop a text that came before: the same, or nearly the same too.")
]


def _reader(words: tuple[str, ...], *, deduplicate: str = "no", **given: Any) -> tuple[Reader, dict[str, Any]]:
    """Return the reader that options and `key=value` words describe, and the settings of the packing among the words.

    Raises: UsageError for a word that is no setting, or whose value is not of its kind.
    """
    from sae_italian.corpora import Reader

    reader = {name: value for name, value in vars(Reader()).items() if value is not None}
    packing = {"prepend_bos": True, "windows_per_shard": 16_384}
    options = given | {"duplicates": deduplicate != "no", "near_duplicates": deduplicate == "near"}
    settings = key_values(words, reader | packing | options)
    return Reader(**{name: settings[name] for name in reader}), {name: settings[name] for name in packing}


def list_corpora() -> Result:
    """Names, licence, gate, size and routes of the known corpora."""
    from sae_italian.corpora.catalogue import catalogue

    entries = catalogue().values()
    rows = [(MICRO, "no end", "MIT", "no", "in this package (gold labels)")]
    for entry in entries:
        size = f"{entry.bytes / 1e9:.1f} GB" if entry.bytes else "size not stated"
        size = f"{entry.words / 1e9:.1f} G words" if entry.words else size
        rows.append((entry.name, size, entry.licence, "yes" if entry.gated else "no", ", ".join(entry.routes)))
    values = [entry.model_dump(mode="json") for entry in entries]
    return Result(values, table("name | size | licence | gated | routes", rows))


def show(corpus: Corpus, /, *words: Words, documents: Count | None = None, text_column: TextColumn = "text") -> Result:
    """Facts about a corpus of the catalogue, and the first documents of any.

    Args:
        documents: Documents to print; default: none for a corpus of the catalogue, 3 for others.
    """
    from sae_italian.corpora import CorpusStream
    from sae_italian.corpora.catalogue import find

    located = find(corpus)
    value: dict[str, Any] = {"facts": located[0].model_dump(mode="json") if located else None, "documents": []}
    parts = [facts(value["facts"])] if located else []
    if documents or not located:
        stream = CorpusStream(corpus, _reader(words, text_column=text_column)[0])
        found = list(islice(stream, documents or 3))
        value["documents"] = [document._asdict() for document in found]
        parts += [f"[{document.doc_id} · {document.source}]\n{document.text}" for document in found]
        parts += [] if found else [f"no document is kept.\n{stream.counts.lines()}"]
    return Result(value, "\n\n".join(parts))


def stats(
    corpus: Corpus,
    /,
    *words: Words,
    documents: int = 1000,
    model: str | None = None,
    out: Path | None = None,
    text_column: TextColumn = "text",
    italian: Italian = False,
    deduplicate: Deduplicate = "no",
) -> Result:
    """Tokens per word, document lengths, share of Italian, and what is dropped and why.

    Args:
        documents: Documents to measure, the first that are kept; 0: all.
        model: The model whose tokenizer counts tokens; default: none are counted.
        out: File to draw the histogram of lengths into, as SVG; default: none.
    """
    from sae_italian.corpora.stats import corpus_stats, draw_histogram, text_histogram
    from sae_italian.corpora.stream import DocumentCounts

    if not documents and corpus == MICRO:
        raise UsageError(f"{MICRO} has no end: say how many documents (--documents).")
    tokenizer = sae_italian.load_tokenizer(model) if model else None
    reader, _ = _reader(words, text_column=text_column, italian=italian, deduplicate=deduplicate)
    result = corpus_stats(corpus, tokenizer, n=documents or None, reader=reader)
    lengths = result["characters"]
    told = {"documents": f"{result['documents']:,}", "words": f"{result['words']:,}"}
    if tokenizer is not None:
        fertility = result["fertility"] if result["fertility"] is not None else float("nan")
        told["tokens"] = f"{result['tokens']:,}, {fertility:.3f} a word ({model})"
        if typed := result["typed_special_tokens"]:
            told["typed <s>"] = f"{typed:,} documents hold a special token's name; it is read as characters"
    told["italian"] = f"{result['italian_share']:.1%} of every tenth document ({result['languages']})"
    ends = f"10 % under {lengths['p10']:,.0f}, 10 % over {lengths['p90']:,.0f}"
    told["characters"] = f"median {lengths['median']:,.0f}, {ends}"
    if out:
        write_text(out, draw_histogram(result))
        told["picture"] = str(out)
    counts = DocumentCounts(result["counts"]).lines()
    return Result(result, "\n\n".join([facts(told), text_histogram(result), counts]))


def pretokenize(
    corpus: Corpus,
    /,
    *words: Words,
    model: str,
    out: Path,
    context_size: int = 128,
    tokens: int | None = None,
    separator: str = "bos",
    seed: Seed = 0,
    text_column: TextColumn = "text",
    italian: Italian = False,
    deduplicate: Deduplicate = "no",
    folder: Folder = Folder(),
) -> Result:
    """Write packed tokens that SAELens and our trainer read, and the text beside them; the split is train.

    Args:
        words: Rare settings: those of the reading, prepend_bos=false, windows_per_shard=16384.
        model: The model whose tokenizer is used.
        out: Folder to write to.
        context_size: Tokens of a window.
        tokens: Stop after this many tokens; default: the whole corpus.
        separator: What stands between documents: bos, eos, sep, a token's id, or none.
    """
    from sae_italian.corpora.pretokenize import PretokenizedCorpus
    from sae_italian.corpora.pretokenize import pretokenize as write

    options = {"text_column": text_column, "italian": italian, "deduplicate": deduplicate}
    reader, packing = _reader(words, split="train", seed=seed, **options)
    write(
        corpus,
        sae_italian.load_tokenizer(model),
        out,
        context_size=context_size,
        reader=reader,
        n_tokens=tokens,
        separator=None
        if separator == "none"
        else int(separator[:19])
        if re.fullmatch("[0-9]+", separator)
        else separator,
        **asdict(folder),
        **packing,
    )
    made = PretokenizedCorpus(out)
    n_tokens = len(made) * made.context_size
    value = {"folder": str(out), "windows": len(made), "tokens": n_tokens, "counts": made.counts.as_dict()}
    return Result(value, f"{out}: {len(made):,} windows, {n_tokens:,} tokens\n{made.counts.lines()}")
