"""Speed on a real model: activations against transformers and the bridge, training runs, a cache, memory of loading.

The ways of reading activations get the same windows and alternate; each is asked for one layer's residual stream, as a
training asks for it. The whole runs are those of `tests.bench.stream`: SAELens' own objects on TransformerLens' bridge, since
its HookedTransformer has no such model. The cache is built beside Delphi's way, as `tests.bench.cache` has it. The memory is
the peak of a process that only loads the model.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import islice
from typing import Any, cast

import torch

from sae_italian.base.report import table
from sae_italian.corpora import iter_documents, pack
from sae_italian.models import load_model
from sae_italian.models.activations import read_activations
from sae_italian.models.loading import Backend, resolve
from tests.bench.cache import measure_build
from tests.bench.stream import compare_runs
from tests.bench.training import _status_mib

PLAIN, HEADLESS, OURS, BRIDGE = "transformers", "transformers, no logits", "ours", "bridge, run_with_cache"
# Where the processor does not compute in bfloat16, its rounds would take hours.
DTYPES = ("float32", *(["bfloat16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []))
WEIGHTS = "weights alone"  # without the tokenizer
FIELDS = {"VmRSS": "resident", "RssAnon": "private"}  # of /proc/self/status
STATUS = "import sys; from tests.bench.real_model import peak; peak(sys.argv[1], sys.argv[2])"


def measure(model: str, corpus: str, *, layer: int, windows: int = 8, repeats: int = 5) -> dict[str, Any]:
    """Return tokens per second of each way in float32 and, where the processor has it, bfloat16; of whole runs; a cache; memory."""
    hook_name, found = f"blocks.{layer}.hook_resid_post", {}
    for dtype in DTYPES:
        ways = _ways(model, corpus, hook_name, layer, dtype, windows)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for round_ in range(repeats + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                if round_:  # the first warms up
                    seconds[name].append(time.perf_counter() - began)
        found[dtype] = {
            name: {"tokens_per_second": windows * 128 / statistics.median(own), "ratio": _ratio(seconds[PLAIN], own)}
            for name, own in seconds.items()
        }
        del ways
    sizes: dict[str, Any] = {"d_sae": 4_096, "k": 32, "batch_size": 1_024, "context_size": 128, "buffer_tokens": 8_192}
    more: dict[str, Any] = {"repeats": 3, "stock_backend": "bridge"}
    runs = {dtype: compare_runs(model, hook_name, corpus, dtype=dtype, **sizes, **more) for dtype in DTYPES}
    memory = {name: _peak_of(model, name) for name in (WEIGHTS, "hf", "bridge")}
    return {
        "model": model,
        "hook_name": hook_name,
        "reading": found,
        "run": runs,
        "cache": _cache(model, corpus, hook_name),
        "memory": memory,
    }


def _cache(model: str, corpus: str, hook_name: str) -> dict[str, Any]:
    """Return what building a cache of 4,096 tokens takes, of an SAE that was never trained: its work is the same."""
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    loaded = load_model(model)
    torch.manual_seed(0)
    metadata = SAEMetadata(model_name=model, hook_name=hook_name)
    config = TopKSAEConfig(d_in=loaded.config.hidden_size, d_sae=4_096, k=32, metadata=metadata)
    sae = TopKSAE(config)
    torch.nn.init.normal_(sae.W_enc)
    return measure_build(sae, loaded, corpus, n_tokens=4_096)


def _ways(model: str, corpus: str, hook_name: str, layer: int, dtype: str, n: int) -> dict[str, Callable[[], Any]]:
    hf, bridge = load_model(model, dtype=dtype), load_model(model, backend="bridge", dtype=dtype)
    block = next(pack(islice(iter_documents(corpus), 200), hf.tokenizer, 128, windows_per_block=n))
    tokens = torch.from_numpy(block.tokens)
    asked: Any = {"output_hidden_states": True, "use_cache": False}
    plain = torch.no_grad()(lambda: hf(tokens, **asked).hidden_states[layer + 1])
    headless = torch.no_grad()(lambda: hf.base_model(tokens, **asked).hidden_states[layer + 1])
    to_cache = torch.no_grad()(lambda: bridge.run_with_cache(tokens, names_filter=[hook_name])[1][hook_name])
    ours = lambda: read_activations(hf, tokens, hook_name)  # noqa: E731
    return {PLAIN: plain, HEADLESS: headless, OURS: ours, BRIDGE: to_cache}


def _ratio(others: list[float], own: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(others, own, strict=True))


def _peak_of(model: str, way: str) -> dict[str, float]:
    """Return what loading adds to a process at its peak, over the weights' bytes: see `peak`."""
    told = subprocess.run([sys.executable, "-c", STATUS, model, way], capture_output=True, text=True, check=True)
    return json.loads(told.stdout.splitlines()[-1])


def peak(model: str, way: str) -> None:
    """Print the peaks of this process, over the weights: resident, and private.

    What is resident and not private are pages of the file, which the system takes back when it needs them.
    """
    import transformers.models.gemma3.modeling_gemma3

    import sae_italian.models.loud  # noqa: F401  what is imported is not the model's

    before, seen, done = {field: _status_mib(field) for field in FIELDS}, dict.fromkeys(FIELDS, 0.0), threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.update({field: max(seen[field], _status_mib(field)) for field in FIELDS})

    watcher = threading.Thread(target=watch)
    watcher.start()
    if way == WEIGHTS:
        folder = resolve(model).load_from
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        loaded = load_model(model, backend=cast(Backend, way))
    done.set()
    watcher.join()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in {*loaded.parameters()})
    print(json.dumps({name: (seen[field] - before[field]) * 2**20 / weights for field, name in FIELDS.items()}))


def table_of(result: dict[str, Any]) -> str:
    """Return the result of `measure` as tables."""
    rows = [
        (name, dtype, f"{one['tokens_per_second']:,.0f}", f"{one['ratio']:.2f}")
        for dtype, ways in result["reading"].items()
        for name, one in ways.items()
    ]
    head = f"{result['model']}, {result['hook_name']}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    parts = [head, table("reading | kind | tokens/s | times transformers", rows)]
    rows = [
        (
            dtype,
            *(f"{run['tokens_per_second'][name]['median']:,.0f}" for name in ("saelens", "ours")),
            f"{run['ratio']:.2f}",
        )
        for dtype, run in result["run"].items()
    ]
    parts.append(table("whole run | SAELens, tokens/s | ours, tokens/s | ours over SAELens", rows))
    build = result["cache"]
    rows = [
        (name, *(f"{build[part][key]:.1f}" for part in ("forward_seconds", "encode_and_write_seconds")))
        for name, key in (("Delphi's way", "delphi"), ("ours", "ours"))
    ]
    told = f"cache of {build['tokens']:,} tokens, {build['ratio_with_forward']:.2f} times Delphi's way"
    parts.append(table(f"{told} | forward, s | encode and write, s", rows))
    rows = [(way, *(f"{one[name]:.2f}" for name in FIELDS.values())) for way, one in result["memory"].items()]
    names = " | ".join(FIELDS.values())
    return "\n\n".join([*parts, table(f"loading, its peak over the weights' bytes | {names}", rows)])
