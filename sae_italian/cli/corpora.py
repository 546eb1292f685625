"""The commands of corpora."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.cli.base import Commands, Result, folder_options


def add_commands(root: Commands) -> None:
    group = root.group("corpora", "Italian text")
    group.add("list", list_corpora, "names, licence, gate, size, routes")
    group.add("show", show_corpus, "route, licence, columns and known traps of one corpus").add_argument("name")
    sub = group.add("preview", preview, "print the first documents")
    _reading_options(sub)
    sub.add_argument("-n", type=int, default=3)
    sub = group.add("stats", stats, "tokens per word, document lengths, share of Italian, what is dropped and why")
    _reading_options(sub)
    sub.add_argument("-n", type=int, default=1000, help="documents to read, 0 for all (default: 1000)")
    sub.add_argument("--model", help="the model whose tokenizer counts tokens (default: none are counted)")
    sub.add_argument("--picture", type=Path, help="write the histogram of lengths here, as SVG")
    sub = group.add("pretokenize", pretokenize, "write packed tokens that SAELens and our trainer read")
    _reading_options(sub, split="train")
    sub.add_argument("--model", required=True, help="the model whose tokenizer is used")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--context-size", type=int, default=128)
    sub.add_argument("--tokens", type=int, help="stop after this many (default: the whole corpus)")
    sub.add_argument("--separator", default="bos", help="between documents: bos, eos, sep, an id, or none")
    sub.add_argument("--no-bos", action="store_true", help="open windows without a BOS")
    sub.add_argument("--workers", type=int, default=1, help="processes that tokenise")
    sub.add_argument("--windows-per-shard", type=int, default=16_384)
    folder_options(sub)


def _reading_options(sub: argparse.ArgumentParser, split: str = "all") -> None:
    sub.add_argument(
        "name", help="micro-italiano, a name of `corpora list`, hf://datasets/..., or a local file or folder"
    )
    sub.add_argument("--split", default=split, choices=("train", "heldout", "all"))
    sub.add_argument("--text-column", default="text")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--on-broken", default="refuse", choices=("refuse", "skip"), help="broken lines and shards")
    sub.add_argument("--italian", action="store_true", help="drop documents in other languages")
    sub.add_argument("--deduplicate", default="no", choices=("no", "exact", "near"))
    sub.add_argument("--min-chars", type=int, default=0)


def _reader(options: argparse.Namespace) -> Any:
    from sae_italian.corpora.filters import Filters
    from sae_italian.corpora.stream import Reader

    filters = Filters(
        min_chars=options.min_chars,
        italian=options.italian,
        duplicates=options.deduplicate != "no",
        near_duplicates=options.deduplicate == "near",
    )
    return Reader(
        split=options.split,
        seed=options.seed,
        text_column=options.text_column,
        on_broken=options.on_broken,
        filters=filters,
    )


def _size(entry: Any) -> str:
    if entry.words:
        return f"{entry.words / 1e9:.1f} G words"
    if entry.bytes:
        return f"{entry.bytes / 1e9:.1f} GB"
    return "size not stated"


def list_corpora(options: argparse.Namespace) -> Result:
    from sae_italian.corpora.catalogue import catalogue

    entries = catalogue().values()
    lines = [f"{'micro-italiano':22} {'no end':16} {'MIT':38} gated: no   in this package (gold labels)"]
    for entry in entries:
        gate = "yes" if entry.gated else "no "
        lines.append(f"{entry.name:22} {_size(entry):16} {entry.licence:38} gated: {gate}  {', '.join(entry.routes)}")
    return [entry.as_dict() for entry in entries], "\n".join(lines)


def show_corpus(options: argparse.Namespace) -> Result:
    from sae_italian.base.errors import nearest
    from sae_italian.corpora.catalogue import find, names

    located = find(options.name)
    if located is None:
        raise UsageError(f"corpus {options.name!r} is not in the catalogue. {nearest(options.name, names())}")
    entry = located.entry
    facts = {
        "name": entry.name,
        "hub": f"https://huggingface.co/datasets/{entry.hub}",
        "licence": entry.licence,
        "gated": "yes: agree on the hub, then `hf auth login`" if entry.gated else "no",
        "size": _size(entry) + (f", {entry.documents:,} documents" if entry.documents else ""),
        "split": entry.split,
        "text column": " or ".join(entry.text_columns),
        "shuffle": f"shards {'by seed' if entry.shuffle_shards else 'in order'}, buffer {entry.shuffle_buffer} documents",
        "note": entry.note,
    }
    lines = [f"{key:12} {value}" for key, value in facts.items()]
    for name, route in entry.routes.items():
        lines.append(f"route {name:6} {route.hub}@{route.revision}: {' or '.join(route.files)} {route.note}".rstrip())
    lines += [f"trap         {trap}" for trap in entry.traps]
    return entry.as_dict(), "\n".join(lines)


def preview(options: argparse.Namespace) -> Result:
    from sae_italian.corpora.stream import CorpusStream

    stream = CorpusStream(options.name, _reader(options))
    documents = list(islice(stream, max(options.n, 0)))
    text = "\n\n".join(f"[{document.doc_id} · {document.source}]\n{document.text}" for document in documents)
    if not documents:
        text = f"no document is kept.\n{stream.counts.lines()}"
    return [document._asdict() for document in documents], text


def stats(options: argparse.Namespace) -> Result:
    from sae_italian.corpora.stats import corpus_stats, svg_histogram, text_histogram
    from sae_italian.models import load_tokenizer

    if options.n == 0 and options.name == "micro-italiano":
        raise UsageError("micro-italiano has no end: say how many documents (-n).")
    tokenizer = load_tokenizer(options.model) if options.model else None
    result = corpus_stats(options.name, tokenizer, n=options.n or None, reader=_reader(options))
    lengths = result["characters"]
    lines = [
        f"documents       {result['documents']:,}",
        f"words           {result['words']:,}",
        f"italian         {result['italian_share']:.1%} of every tenth document ({result['languages']})",
        f"characters      median {lengths['median']:,.0f}, 10 % under {lengths['p10']:,.0f}, 10 % over {lengths['p90']:,.0f}",
    ]
    if tokenizer is not None:
        fertility = result["fertility"] if result["fertility"] is not None else float("nan")
        lines.insert(2, f"tokens          {result['tokens']:,}, {fertility:.3f} a word ({options.model})")
    counts = _counts_lines(result["counts"])
    if options.picture:
        svg_histogram(result, options.picture)
        lines.append(f"picture         {options.picture}")
    return result, "\n".join([*lines, "", text_histogram(result), "", counts])


def _counts_lines(counts: dict[str, Any]) -> str:
    from sae_italian.corpora.counts import Counts

    shown = Counts()
    shown.load(counts)
    return shown.lines()


def pretokenize(options: argparse.Namespace) -> Result:
    from sae_italian.corpora.pretokenize import PretokenizedCorpus, read_counts
    from sae_italian.corpora.pretokenize import pretokenize as write
    from sae_italian.models import load_tokenizer

    separator = options.separator
    separator = None if separator == "none" else int(separator) if separator.isdigit() else separator
    folder = write(
        options.name,
        load_tokenizer(options.model),
        options.out,
        context_size=options.context_size,
        reader=_reader(options),
        n_tokens=options.tokens,
        prepend_bos=not options.no_bos,
        separator=separator,
        windows_per_shard=options.windows_per_shard,
        workers=options.workers,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    corpus, counts = PretokenizedCorpus(folder), read_counts(folder)
    n_tokens = len(corpus) * corpus.context_size
    value = {"folder": str(folder), "windows": len(corpus), "tokens": n_tokens, "counts": counts.as_dict()}
    return value, f"{folder}: {len(corpus):,} windows, {n_tokens:,} tokens\n{counts.lines()}"
