"""Tokenising and packing: ours against SAELens' own per-document path, in one run, and our memory over a long stream.

SAELens' path is the code its ActivationsStore runs for text: `to_tokens` on one document at a time, then
`concat_and_batch_sequences`. Both get the same documents in memory, the same tokenizer and context, and alternate, so a
busy machine slows both. Ours also makes document ids and character offsets, which SAELens' does not.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from sae_italian.base.errors import UsageError
from sae_italian.corpora import TextDocument, iter_documents, pack


def measure(
    corpus: str | Path,
    model: str,
    *,
    context_size: int = 128,
    n_characters: int = 20_000_000,
    repeats: int = 3,
    memory_bytes: int = 0,
) -> dict[str, Any]:
    """Return tokens per second of the two ways (each run, and the median), their ratios, and the memory's course.

    The ratio is the median of the ratios of runs that followed one another. Raises: UsageError for a corpus without text.
    """
    from sae_italian.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    documents = _take(corpus, n_characters)
    result: dict[str, Any] = {
        "corpus": str(corpus),
        "model": model,
        "context_size": context_size,
        "documents": len(documents),
        "characters": sum(len(document.text) for document in documents),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    ways: dict[str, Callable[[], int]] = {
        "saelens": lambda: _saelens(documents, tokenizer, context_size),
        "ours": lambda: _ours(documents, tokenizer, context_size),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    totals = set()
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            n_tokens = way()
            speeds[name].append(n_tokens / (time.perf_counter() - started))
            totals.add(n_tokens)
    if len(totals) != 1:
        raise AssertionError(f"the ways give different numbers of tokens: {totals}")
    result["tokens"] = totals.pop()
    result["tokens_per_second"] = {
        name: {"median": statistics.median(runs), "runs": runs} for name, runs in speeds.items()
    }
    result["ratio"] = {
        name: statistics.median(ours / theirs for ours, theirs in zip(runs, speeds["saelens"], strict=True))
        for name, runs in speeds.items()
    }
    if memory_bytes:
        result["memory"] = measure_memory(documents, tokenizer, context_size, memory_bytes)
    return result


def _take(corpus: str | Path, n_characters: int) -> list[TextDocument]:
    documents, seen = [], 0
    for document in iter_documents(corpus):
        documents.append(document)
        seen += len(document.text)
        if seen >= n_characters:
            break
    if not documents:
        raise UsageError(f"corpus {str(corpus)!r} has no document to measure with.")
    return documents


def _ours(documents: list[TextDocument], tokenizer: Any, context_size: int) -> int:
    return sum(block.tokens.size for block in pack(documents, tokenizer, context_size))


def _saelens(documents: list[TextDocument], tokenizer: Any, context_size: int) -> int:
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.tokenization_and_batching import concat_and_batch_sequences

    to_tokens = HookedProxyLM.to_tokens
    proxy: Any = type("TokenizerOnly", (), {"tokenizer": tokenizer})()
    bos = tokenizer.bos_token_id

    def tokens() -> Iterator[Any]:
        for document in documents:
            ids = to_tokens(proxy, document.text, False, None, move_to_device=False, truncate=False).squeeze(0)
            yield ids[1:] if len(ids) and ids[0] == bos else ids

    return sum(len(window) for window in concat_and_batch_sequences(tokens(), context_size, bos, None, bos))


def measure_memory(
    documents: list[TextDocument], tokenizer: Any, context_size: int, n_bytes: int, marks: int = 10
) -> dict[str, Any]:
    """Pack the documents again and again, with new numbers in them, until `n_bytes` of UTF-8 have passed.

    Returns the resident memory (MiB) at each tenth of the way and at its peak, and the growth from the second mark on.
    """
    read, resident = 0, []

    def stream() -> Iterator[TextDocument]:
        nonlocal read
        for number in count():
            document = documents[number % len(documents)]
            text = f"{number} {document.text}"
            read += len(text.encode())
            yield TextDocument(text, str(number), document.source)

    n_tokens = 0
    for block in pack(stream(), tokenizer, context_size):
        n_tokens += block.tokens.size
        if read >= n_bytes * (len(resident) + 1) / marks:
            resident.append(_resident_mib())
        if read >= n_bytes:
            break
    steady = np.array(resident[1:])
    return {
        "bytes": read,
        "tokens": n_tokens,
        "resident_mib": [round(value, 1) for value in resident],
        "growth_mib": round(float(steady.max() - steady[0]), 1) if len(steady) else 0.0,
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def _resident_mib() -> float:
    status = Path("/proc/self/statm")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def table_of(result: dict[str, Any]) -> str:
    """Return the result as a table."""
    lines = [
        f"{result['documents']:,} documents, {result['tokens']:,} tokens, windows of {result['context_size']}, "
        f"{result['cpus']} CPUs (load {result['load']:.1f})",
        f"{'':18} {'tokens/s':>12} {'ratio':>7}",
    ]
    for name, speed in result["tokens_per_second"].items():
        lines.append(f"{name:18} {speed['median']:>12,.0f} {result['ratio'][name]:>7.2f}")
    if "memory" in result:
        memory = result["memory"]
        lines.append(
            f"memory over {memory['bytes'] / 1e9:.2f} GB: {memory['resident_mib']} MiB, "
            f"growth {memory['growth_mib']} MiB, peak {memory['peak_mib']} MiB"
        )
    return "\n".join(lines)
