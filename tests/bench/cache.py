"""Building a feature cache against Delphi's LatentCache, the size and memory of both, and how fast a big cache is read.

Delphi's way is written here after its `delphi/latents/cache.py`, because the package cannot be installed beside ours:
run the whole model, logits included, encode a batch densely, take what is above 1e-5 with `nonzero`, count firings over
the dense latents, keep everything in memory as int64 places and float32 values, concatenate at the end, and write five
splits by latent, each with all tokens (`save_splits`). Both ways get the same model, SAE and windows, alternate in one
run, and end with files by latent; ours stops the model at the hook and also writes the latents by token.
"""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from scipy.sparse import vstack

from sae_italian.cache.build import build_cache, transpose
from sae_italian.cache.layout import Manifest
from sae_italian.cache.read import FeatureCache
from sae_italian.cache.shards import encode_sparse, write_activations, write_token_shard
from sae_italian.cache.stats import write_statistics
from sae_italian.corpora import PackedBlock, iter_documents, pack
from sae_italian.corpora.packing import special_mask, take_tokens
from sae_italian.models.activations import read_activations

BATCH_WINDOWS = 32
N_SPLITS = 5
THRESHOLD = 1e-5


def measure_build(
    sae: Any, model: Any, corpus: str, *, n_tokens: int = 131_072, context_size: int = 128, repeats: int = 3
) -> dict[str, Any]:
    """Return seconds of the forward pass, and of encoding and writing by both ways; ratios are medians of paired runs."""
    blocks = _blocks(model, corpus, n_tokens, context_size)
    windows = [torch.from_numpy(part) for block in blocks for part in _batches_of(block.tokens)]
    batches: list[Any] = []
    ways: dict[str, tuple[Callable[[], Any], Callable[[Path], tuple[int, int]]]] = {
        "delphi": (lambda: _whole_forward(model, windows), lambda folder: _delphi(sae, batches, folder)),
        "ours": (
            lambda: [(batch, read_activations(model, batch, sae.cfg.metadata.hook_name)) for batch in windows],
            lambda folder: _ours(sae, model, blocks, batches, folder),
        ),
    }
    batches = ways["ours"][0]()
    forwards: dict[str, list[float]] = {name: [] for name in ways}
    runs: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, tuple[int, int]] = {}
    for _ in range(repeats):
        for name, (forward, way) in ways.items():
            started = time.perf_counter()
            forward()
            forwards[name].append(time.perf_counter() - started)
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                found[name] = way(Path(folder))
                runs[name].append(time.perf_counter() - started)
    whole = {name: [a + b for a, b in zip(forwards[name], runs[name], strict=True)] for name in ways}
    return {
        "tokens": sum(block.tokens.size for block in blocks),
        "forward_seconds": {name: statistics.median(times) for name, times in forwards.items()},
        "encode_and_write_seconds": {name: statistics.median(times) for name, times in runs.items()},
        "ratio": _median_ratio(runs),
        "ratio_with_forward": _median_ratio(whole),
        "non_zeros": {name: nnz for name, (nnz, _) in found.items()},
        "bytes_per_non_zero": {name: size / max(1, nnz) for name, (nnz, size) in found.items()},
    }


def _median_ratio(times: dict[str, list[float]]) -> float:
    return statistics.median(theirs / ours for theirs, ours in zip(times["delphi"], times["ours"], strict=True))


def _batches_of(tokens: np.ndarray) -> list[np.ndarray]:
    return np.split(tokens, range(BATCH_WINDOWS, len(tokens), BATCH_WINDOWS))


@torch.no_grad()
def _whole_forward(model: Any, windows: list[torch.Tensor]) -> None:
    """The model as Delphi's `LatentCache.run` calls it."""
    for batch in windows:
        model(batch)


def _blocks(model: Any, corpus: str, n_tokens: int, context_size: int) -> list[PackedBlock]:
    packed = pack(iter_documents(corpus), model.tokenizer, context_size, windows_per_block=512)
    return list(take_tokens(packed, n_tokens, corpus))


@torch.no_grad()
def _ours(sae: Any, model: Any, blocks: list[PackedBlock], batches: list[Any], folder: Path) -> tuple[int, int]:
    """Encode and write as `build_cache` does after the forward pass; return non-zeros and bytes of the latents' files."""
    manifest = Manifest(
        model="", sae="", sae_hash="", tokenizer_hash="", hook_name="", d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, k=None,
        corpus="", text_column="", split="", n_tokens_asked=0, context_size=blocks[0].tokens.shape[1],
        windows_per_shard=512, versions={},
    )  # fmt: skip
    following = iter(batches)
    for index, block in enumerate(blocks):
        shard = write_token_shard(folder, index, block)
        parts = []
        for _ in range(-(-len(block.tokens) // BATCH_WINDOWS)):
            tokens, x = next(following)
            parts.append(encode_sparse(sae, x.flatten(0, 1), special_mask(tokens.numpy(), model.tokenizer).ravel()))
        manifest.shards.append(write_activations(folder, shard, vstack(parts, "csr")))
    transpose(folder, manifest)
    return manifest.nnz, sum(file.stat().st_size for file in (folder / "latents").iterdir())


@torch.no_grad()
def _delphi(sae: Any, batches: list[Any], folder: Path) -> tuple[int, int]:
    """Cache as Delphi's LatentCache does (`InMemoryCache.add`, `.save`, `save_splits`); return non-zeros and bytes."""
    places, values, tokens = [], [], []
    firings = torch.zeros(sae.cfg.d_sae, dtype=torch.long)
    for number, (batch, x) in enumerate(batches):
        latents = sae.encode(x)
        place = torch.nonzero(latents.abs() > THRESHOLD)
        values.append(latents[latents.abs() > THRESHOLD])
        place[:, 0] += number * BATCH_WINDOWS
        places.append(place)
        tokens.append(batch)
        firings += (latents > 0).sum((0, 1))
    return _delphi_splits(torch.cat(places), torch.cat(values), torch.cat(tokens), sae.cfg.d_sae, folder)


def _delphi_splits(
    places: torch.Tensor, values: torch.Tensor, tokens: torch.Tensor, d_sae: int, folder: Path
) -> tuple[int, int]:
    latent = places[:, 2]
    edges = torch.linspace(0, d_sae, steps=N_SPLITS + 1).long()
    for start, end in zip(edges[:-1], edges[1:] - 1, strict=True):
        mask = (latent >= start) & (latent <= end)
        masked, activations = places[mask].numpy(), values[mask].half().numpy()
        masked[:, 2] -= start.item()
        small = masked.size == 0 or max(masked[:, 2].max(), masked[:, 0].max()) < 2**16
        arrays = {
            "locations": masked.astype(np.uint16 if small else np.uint32),
            "activations": activations,
            "tokens": tokens.numpy(),
        }
        save_file(arrays, folder / f"{start}_{end}.safetensors")
    return len(values), sum(file.stat().st_size for file in folder.iterdir())


# --- memory, each way in a process of its own ------------------------------------------------------------------------


def measure_memory(sae: str, model: str, corpus: str, *, n_tokens: int, context_size: int = 128) -> dict[str, Any]:
    """Return the peak resident MiB above model and SAE of both ways over `n_tokens`, forward pass and all passes included."""
    peaks: dict[str, float] = {}
    for way in ("ours", "delphi"):
        with get_context("spawn").Pool(1) as pool:
            peaks[way] = pool.apply(_peak, (way, sae, model, corpus, n_tokens, context_size))
    return {"tokens": n_tokens, "peak_mib": peaks, "ratio": peaks["delphi"] / peaks["ours"]}


def _peak(way: str, sae_name: str, model_name: str, corpus: str, n_tokens: int, context_size: int) -> float:
    from sae_italian.models import load_model
    from sae_italian.saes import load_sae

    sae, model = load_sae(sae_name), load_model(model_name)
    sae.encode(read_activations(model, torch.zeros(1, 8, dtype=torch.long), sae.cfg.metadata.hook_name))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with tempfile.TemporaryDirectory() as folder:
        if way == "ours":
            build_cache(sae, model, corpus, Path(folder) / "c", n_tokens=n_tokens, context_size=context_size)
        else:
            _delphi(sae, _Batches(sae, model, corpus, n_tokens, context_size), Path(folder))  # pyright: ignore[reportArgumentType]
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20


class _Batches:
    """The batches of a corpus, one in memory at a time."""

    def __init__(self, sae: Any, *source: Any):
        self.hook_name, self.source = sae.cfg.metadata.hook_name, source

    def __iter__(self) -> Any:
        model, corpus, n_tokens, context_size = self.source
        packed = pack(iter_documents(corpus), model.tokenizer, context_size, windows_per_block=BATCH_WINDOWS)
        for block in take_tokens(packed, n_tokens, corpus):
            tokens = torch.from_numpy(block.tokens)
            yield tokens, read_activations(model, tokens, self.hook_name)


# --- reading ---------------------------------------------------------------------------------------------------------


def measure_reading(folder: Path, *, n_non_zeros: int, d_sae: int, n_latents: int = 200) -> dict[str, Any]:
    """Return what a synthetic cache of that size costs: seconds to transpose and to summarise, milliseconds to read."""
    from tests.bench.synthetic_cache import write_synthetic

    started = time.perf_counter()
    manifest, sae, model = write_synthetic(folder, n_non_zeros=n_non_zeros, d_sae=d_sae)
    written = time.perf_counter() - started
    started = time.perf_counter()
    write_statistics(folder, manifest, sae, model)
    summarised = time.perf_counter() - started
    manifest.complete = True
    manifest.save(folder)
    cache = FeatureCache.open(folder)
    live = np.flatnonzero(cache.statistics["count"] > 0)
    chosen = np.random.default_rng(0).choice(live, min(n_latents, len(live)), replace=False).tolist()
    reads: dict[str, Callable[[int], Any]] = {
        "top 40 windows with text": lambda latent: cache.latent(latent).windows("top", 40).shown(),
        "quantile windows with text": lambda latent: cache.latent(latent).windows("quantiles", 40).shown(),
        "activations": cache.latent,
        "statistics": lambda latent: cache.table.slice(latent, 1).to_pylist()[0],
    }
    latencies = {}
    for name, read in reads.items():
        times = []
        for latent in [*chosen, *chosen]:  # the second time is warm
            started = time.perf_counter()
            read(latent)
            times.append(1000 * (time.perf_counter() - started))
        warm = np.array(times[len(chosen) :])
        latencies[name] = {"median_ms": float(np.median(warm)), "p95_ms": float(np.quantile(warm, 0.95))}
    size = sum(file.stat().st_size for file in (folder / "latents").iterdir())
    return {
        "non_zeros": manifest.nnz,
        "d_sae": d_sae,
        "write_seconds": written,
        "statistics_seconds": summarised,
        "latents_bytes_per_non_zero": size / manifest.nnz,
        "latency": latencies,
    }


def table_of(result: dict[str, Any]) -> str:
    """Return the result as a table."""
    lines = []
    if "build" in result:
        build = result["build"]
        seconds, forward = build["encode_and_write_seconds"], build["forward_seconds"]
        lines += [
            f"build, {build['tokens']:,} tokens (median of paired runs, load {result['load']:.1f})",
            f"  encode and write   ours {seconds['ours']:.2f} s, Delphi's way {seconds['delphi']:.2f} s, "
            f"{build['ratio']:.2f} times",
            f"  forward pass       ours {forward['ours']:.2f} s (stops at the hook), Delphi's way {forward['delphi']:.2f} s "
            f"(whole model); all together {build['ratio_with_forward']:.2f} times",
            f"  bytes by latent    ours {build['bytes_per_non_zero']['ours']:.2f} per non-zero, "
            f"Delphi's way {build['bytes_per_non_zero']['delphi']:.2f}",
        ]
    if "memory" in result:
        memory = result["memory"]
        lines.append(
            f"memory above model and SAE, {memory['tokens']:,} tokens: ours {memory['peak_mib']['ours']:.0f} MiB, "
            f"Delphi's way {memory['peak_mib']['delphi']:.0f} MiB, {memory['ratio']:.1f} times"
        )
    if "reading" in result:
        reading = result["reading"]
        lines.append(
            f"a cache of {reading['non_zeros']:,} non-zeros, d_sae {reading['d_sae']:,}: "
            f"{reading['latents_bytes_per_non_zero']:.2f} bytes per non-zero, statistics {reading['statistics_seconds']:.0f} s"
        )
        for name, times in reading["latency"].items():
            lines.append(f"  {name:28} median {times['median_ms']:.2f} ms, 95 % {times['p95_ms']:.2f} ms")
    return "\n".join(lines)
