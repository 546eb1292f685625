"""What waits for a GPU, in one unattended command of under nine minutes: `make bench TABLE=gpu`.

At the sizes of Minerva-1B (d_in 2,048, 65,536 latents, k 32 and 64, batch 8,192, bf16): a training step of `sparse_topk`
against SAELens' `topk`, sparsify's way and the bare product with top-k, each with its peak memory; then tokens a second of a
whole run and of a cache build with a model of random weights. What is found is printed and kept at once; a part that fails
says why and the others go on. `device=cpu small=true` goes the same way with small sizes: its numbers mean nothing.
"""

from __future__ import annotations

import gc
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_italian.base.errors import UsageError
from sae_italian.base.report import table
from sae_italian.cli import key_values
from tests.bench.training import BARE, OURS, SAELENS, Shape, _bare, _inputs, _trainer, _wait

SPARSIFY = "sparsify's step"
DEFAULTS: dict[str, Any] = {"device": "cuda", "small": False, "minutes": 8.0, "out": "gpu-bench.json"}
GOALS = {SAELENS: "at least 3", SPARSIFY: "not below 1", BARE: "not below 0.67"}  # of their time over ours
TEXTS = 2_000  # documents of the whole run, read again and again


class TimeIsOver(BaseException):
    """A part is stopped where it stands; no `except Exception` or `except OSError` on its way may take it for a failure."""


class Sizes(NamedTuple):
    """Of everything that is measured."""

    steps: list[Shape]
    repeats: int
    model: dict[str, Any]
    layer: int
    context: int
    batch: int
    buffer: int
    run_steps: int
    cache_tokens: int


FULL = Sizes(
    steps=[Shape(2048, 65_536, k, 8192, "bfloat16") for k in (32, 64)],
    repeats=5,
    model={"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4,
           "intermediate_size": 8192, "vocab_size": 32_768},
    layer=8, context=512, batch=8192, buffer=262_144, run_steps=32, cache_tokens=262_144,
)  # fmt: skip
SMALL = Sizes(
    steps=[Shape(16, 256, 4, 64), Shape(16, 256, 8, 64)],  # float32: a CPU lacks some of bf16
    repeats=1,
    model={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
           "intermediate_size": 64, "vocab_size": 4096},
    layer=0, context=64, batch=256, buffer=1024, run_steps=2, cache_tokens=512,
)  # fmt: skip


def bench_gpu(words: list[str]) -> tuple[dict[str, Any], str]:
    """Return every row that was measured, and the tables. Raises: UsageError where there is no such device."""
    settings = key_values(words, DEFAULTS)
    device, sizes = settings["device"], SMALL if settings["small"] else FULL
    if device not in ("cuda", "cpu"):
        raise UsageError(f"device is {device!r}; it must be cuda or cpu.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "no GPU is here: PyTorch sees no CUDA device, so nothing was measured. "
            "`device=cpu small=true` shows that the command works."
        )
    result: dict[str, Any] = {"device": _name(device), "torch": torch.__version__, "rows": [], "failed": {}}
    started, out = time.monotonic(), Path(settings["out"])
    for part, measure in _parts(device, sizes):
        try:
            result["rows"] += _within(60 * settings["minutes"] - (time.monotonic() - started), measure)
        except TimeIsOver:
            result["failed"][part] = f"{settings['minutes']:g} minutes were over"
        except Exception as error:  # the other parts are worth having
            result["failed"][part] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        gc.collect()  # a trainer holds itself; left there, its SAE would count in the next part's peak
        if device == "cuda":
            torch.cuda.empty_cache()
        result["seconds"] = round(time.monotonic() - started, 1)
        out.write_text(json.dumps(result, indent=2), encoding="utf-8")
        sys.stderr.write(f"{part}: {result['failed'].get(part, 'done')} ({result['seconds']:.0f} s)\n")
    return result, _text(result)


def _within(seconds: float, measure: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return what `measure` does, which an alarm stops. Raises: TimeIsOver."""

    def over(*_: Any) -> None:
        raise TimeIsOver

    if seconds <= 0:
        raise TimeIsOver
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return measure()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def _parts(device: str, sizes: Sizes) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    for shape in sizes.steps:
        for name in (OURS, SAELENS, SPARSIFY, BARE):
            yield f"k {shape.k}: {name}", lambda name=name, shape=shape: measure_way(name, shape, device, sizes.repeats)
    yield "whole run", lambda: measure_run(device, sizes)


# --- the step ---------------------------------------------------------------------------------------------------------


class FusedEncoder(torch.autograd.Function):
    """The k largest of ReLU(x W^T + b), with gradients of the kept rows alone, as sparsify's fused encoder has them."""

    @staticmethod
    def forward(ctx, x, weight, bias, k):  # pyright: ignore[reportIncompatibleMethodOverride]
        values, indices = torch.relu(nn.functional.linear(x, weight, bias)).topk(k, dim=-1, sorted=False)
        ctx.save_for_backward(x, weight, indices, values)
        return values, indices

    @staticmethod
    def backward(ctx, grad, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, indices, values = ctx.saved_tensors
        grad = grad * (values > 0)
        grad_x = nn.functional.embedding_bag(indices, weight, mode="sum", per_sample_weights=grad.to(weight.dtype))
        grad_weight, grad_bias = torch.zeros_like(weight), weight.new_zeros(len(weight))
        for part in torch.arange(len(x), device=x.device).split(1024):  # all at once is batch * k * d_in numbers
            rows = (grad[part].unsqueeze(2) * x[part].unsqueeze(1)).flatten(0, 1)
            grad_weight.index_add_(0, indices[part].flatten(), rows.to(weight.dtype))
        grad_bias.index_add_(0, indices.flatten(), grad.flatten().to(weight.dtype))
        return grad_x, grad_weight, grad_bias, None


class SparsifyCoder(nn.Module):
    """sparsify's SparseCoder in plain PyTorch: fused encoder, decoder by weighted rows, FVU, decoder of unit norm."""

    def __init__(self, shape: Shape, device: str):
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": getattr(torch, shape.dtype)}
        directions = nn.functional.normalize(torch.randn(shape.d_sae, shape.d_in, device=device), dim=-1)
        self.k, self.W_dec = shape.k, nn.Parameter(directions.to(like["dtype"]))
        self.W_enc, self.b_enc = (
            nn.Parameter(self.W_dec.detach().clone()),
            nn.Parameter(torch.zeros(shape.d_sae, **like)),
        )
        self.b_dec = nn.Parameter(torch.zeros(shape.d_in, **like))

    def forward(self, x: Tensor) -> Tensor:
        values, indices = FusedEncoder.apply(x - self.b_dec, self.W_enc, self.b_enc, self.k)
        out = nn.functional.embedding_bag(indices, self.W_dec, mode="sum", per_sample_weights=values) + self.b_dec
        return (out - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()


def _sparsify(shape: Shape, x: Tensor) -> Callable[[], Any]:
    """Return a step with clipping and fused Adam, as the others have, and the decoder put back to unit norm."""
    torch.manual_seed(0)
    coder = SparsifyCoder(shape, x.device.type)
    adam = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        coder(x).backward()
        nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            coder.W_dec /= coder.W_dec.norm(dim=-1, keepdim=True)  # pyright: ignore[reportAttributeAccessIssue]

    return step


def _way(name: str, shape: Shape, x: Tensor) -> Callable[[], Any]:
    from sae_italian.saes.sparse import tune

    if name in (BARE, SPARSIFY):
        return (_bare if name == BARE else _sparsify)(shape, x)
    trainer = _trainer(shape, name, x.device.type)
    return lambda: (tune(trainer) if name == OURS else trainer).step(x)


def measure_way(name: str, shape: Shape, device: str, repeats: int) -> list[dict[str, Any]]:
    """Return milliseconds of a whole step (median) and its peak memory; alone, as several SAEs with Adam fill a card."""
    x, seconds = _inputs(shape, device), []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = _way(name, shape, x)
    for round_ in range(repeats + 2):  # two warm up
        _wait(device)
        started = time.perf_counter()
        step()
        _wait(device)
        seconds += [time.perf_counter() - started] if round_ > 1 else []
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return [{"k": shape.k, "way": name, "ms": 1000 * statistics.median(seconds), "peak_gb": peak}]


# --- model and SAE together -------------------------------------------------------------------------------------------


def _random_model(folder: Path, sizes: Sizes) -> str:
    """Write a Mistral of random weights in bf16 with the mini model's tokenizer, and return its folder."""
    from transformers import AutoModelForCausalLM, MistralConfig

    from sae_italian.models import load_tokenizer

    config = MistralConfig(**sizes.model, max_position_embeddings=4096, sliding_window=None, tie_word_embeddings=False)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    load_tokenizer("sae-italian-mini").save_pretrained(folder / "model")
    return str(folder / "model")


def measure_run(device: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Return tokens a second of training from text to SAE, and of building its feature cache."""
    from sae_italian.cache import build_cache
    from sae_italian.corpora import iter_documents
    from sae_italian.models import load_model
    from sae_italian.saes import load_sae
    from sae_italian.training.config import spec_from_dict
    from sae_italian.training.loop import SAERun
    from sae_italian.training.run import open_stream

    shape = sizes.steps[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = folder / "text.jsonl"
        lines = (json.dumps({"text": each.text}) for each in islice(iter_documents("micro-italiano", "train"), TEXTS))
        text.write_text("\n".join(lines), encoding="utf-8")
        spec = spec_from_dict({
            "model": _random_model(folder, sizes), "hook_name": f"blocks.{sizes.layer}.hook_resid_post",
            "corpus": str(text), "repeat_corpus": True, "device": device, "dtype": "bfloat16",
            "sae": {"architecture": "sparse_topk", "d_sae": shape.d_sae, "k": shape.k},
            "training_tokens": 10**9, "context_size": sizes.context, "train_batch_size_tokens": sizes.batch,
            "buffer_tokens": sizes.buffer,
        })  # fmt: skip
        (folder / "sae").mkdir()
        model = load_model(spec.model, dtype=spec.dtype, device=device)
        stream, run = open_stream(spec, model, [spec.hook_name]), SAERun(spec, model, folder / "sae")
        run.prepare(stream)
        run.step(next(stream))
        _wait(device)
        started, read = time.perf_counter(), stream.n_tokens
        for _ in range(sizes.run_steps):
            run.step(next(stream))
        _wait(device)
        seconds = time.perf_counter() - started
        rows = [{"way": "train", "tokens_per_second": sizes.run_steps * sizes.batch / seconds}]
        rows[0]["model_tokens_read"] = stream.n_tokens - read
        run.finish()
        sae = load_sae(folder / "sae", device=device)
        started = time.perf_counter()
        cached = build_cache(sae, model, str(text), folder / "cache", n_tokens=sizes.cache_tokens, split="all")
        assert (cached / "manifest.json").is_file()
        rows.append({"way": "cache build", "tokens_per_second": sizes.cache_tokens / (time.perf_counter() - started)})
    return rows


def _text(result: dict[str, Any]) -> str:
    lines = [f"{result['device']}, torch {result['torch']}, {result.get('seconds', 0):.0f} s"]
    steps = [row for row in result["rows"] if "ms" in row]
    ours = {row["k"]: row["ms"] for row in steps if row["way"] == OURS}
    cells = []
    for row in steps:
        ratio = row["ms"] / ours[row["k"]] if row["k"] in ours else None
        peak = "-" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
        over = "-" if ratio is None else f"{ratio:.2f}"
        cells.append([row["k"], row["way"], f"{row['ms']:,.1f}", peak, over, GOALS.get(row["way"], "")])
    head = "k | way | ms | peak GB | its time over ours | goal"
    lines += [table(head, cells)] if cells else []
    lines += [f"{row['way']}: {row['tokens_per_second']:,.0f} tokens/s" for row in result["rows"] if "ms" not in row]
    lines += [f"NOT measured: {part}: {why}" for part, why in result["failed"].items()]
    return "\n".join(lines)
