"""An attribution graph of random transcoders: seconds and peak memory beside circuit-tracer, each in its own process.

circuit-tracer lies in CIRCUIT_TRACER (tests/circuits/test_oracle.py). Both get the same ReLU transcoders on the embedded model,
as many latents, in turns; each number is the median of the turns, the memory the process' peak above what
model and transcoders took.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch

from sae_italian.base.report import table

THEIR_BATCH = 16  # on a processor circuit-tracer takes longer with 64 or 256
TEXT = (
    "Quando Pietro e Giovanni sono andati a scuola, Pietro ha mostrato un nuovo anello a Giovanni, e poi la maestra ha chiesto a "
    "tutti i bambini di prendere il libro rosso dalla cartella e di leggere la prima pagina ad alta voce, uno dopo l'altro, "
    "mentre fuori la pioggia cadeva sui tetti e le finestre della scuola vibravano piano per il vento che veniva dal mare."
)


def bench_circuits(options: argparse.Namespace) -> tuple[Any, str]:
    """Measure ours and circuit-tracer's graph, and with --model ours alone on that one; return rows and a table."""
    sides = ["ours", "theirs"] if os.environ.get("CIRCUIT_TRACER") else ["ours"]
    runs = [("sae-italian-mini", side) for side in sides] * options.repeats
    runs += [(options.model, "ours")] if options.model else []
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for model, side in runs:
        real = model != "sae-italian-mini"
        sizes = [options.positions if real else 24, options.latents if real else 512, options.l0 if real else 32]
        told = [model, side, *map(str, sizes), str(options.max_nodes if real else 10**6), str(options.batch)]
        done = subprocess.run([sys.executable, "-m", __name__, *told], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found.setdefault((model, side), []).append(json.loads(done.stdout.splitlines()[-1]))
    middle = {run: {key: median(each[key] for each in turns) for key in turns[0]} for run, turns in found.items()}
    head = "model | implementation | active latents | nodes | seconds | of processor time | MB above the models'"
    text = table(head, [(*run, *numbers.values()) for run, numbers in middle.items()])
    if len(sides) > 1:
        ours, theirs = (middle["sae-italian-mini", side] for side in sides)
        text += "\n\nours as a share of theirs: " + ", ".join(
            f"{ours[key] / theirs[key]:.2f} of the {name}" for key, name in (("seconds", "time"), ("MB", "memory"))
        )
    return [{"model": run[0], "side": run[1], "turns": turns} for run, turns in found.items()], text


def random_saes(model: Any, n_latents: int, l0: int, tokens: torch.Tensor) -> list[Any]:
    """Return ReLU transcoders of all layers with unit directions and so large a bias that l0 latents fire on average."""
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.transcoder import Transcoder, TranscoderConfig

    from sae_italian.models.activations import read_many

    n_layers, d = model.config.num_hidden_layers, model.config.hidden_size
    hooks = [f"blocks.{layer}.mlp.hook_in" for layer in range(n_layers)]
    reads, found = read_many(model, tokens, hooks), []
    for layer, hook in enumerate(hooks):
        metadata = SAEMetadata(hook_name=hook, hook_name_out=f"blocks.{layer}.hook_mlp_out")
        sae = Transcoder(
            TranscoderConfig(d_in=d, d_out=d, d_sae=n_latents, metadata=metadata, apply_b_dec_to_input=False)
        )
        generator = torch.Generator().manual_seed(layer)
        x = reads[hook][0, 1:]
        with torch.no_grad():
            for weight in (sae.W_enc, sae.W_dec):
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
            score = (x @ sae.W_enc).flatten()
            sae.b_enc.fill_(-float(score.topk(l0 * len(x)).values[-1]))
        found.append(sae)
    return found


def _measure(
    name: str, side: str, positions: int, n_latents: int, l0: int, max_nodes: int, batch: int
) -> dict[str, Any]:
    from sae_italian.models import load_model

    model = load_model(name)
    ids = model.tokenizer(TEXT, return_tensors="pt").input_ids[:, :positions]
    prompt = model.tokenizer.decode(ids[0, 1:])
    tokens = model.tokenizer(prompt, return_tensors="pt").input_ids
    saes = random_saes(model, n_latents, l0, tokens)
    make = _ours if side == "ours" else _theirs
    run = make(model, saes, prompt, max_nodes, batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, cpu = perf_counter(), process_time()
    active, nodes = run()
    seconds, cpu = perf_counter() - began, process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "active": active,
        "nodes": nodes,
        "seconds": round(seconds, 2),
        "cpu": round(cpu, 2),
        "MB": round(peak / 1024),
    }


def _ours(model: Any, saes: list[Any], prompt: str, max_nodes: int, batch: int) -> Any:
    from sae_italian.circuits import attribute, prune

    def run() -> tuple[int, int]:
        graph = attribute(model, saes, prompt, max_nodes=max_nodes, batch=batch or None)
        prune(graph)
        return graph.n_active, len(graph.nodes)

    return run


def _theirs(model: Any, saes: list[Any], prompt: str, max_nodes: int, batch: int) -> Any:
    import huggingface_hub.constants

    from sae_italian.models import load_model

    huggingface_hub.constants.HF_HUB_ENABLE_HF_TRANSFER = False  # pyright: ignore[reportAttributeAccessIssue]
    sys.path.insert(0, os.environ["CIRCUIT_TRACER"])
    from circuit_tracer.attribution.attribute import attribute  # pyright: ignore[reportMissingImports]
    from circuit_tracer.graph import prune_graph  # pyright: ignore[reportMissingImports]
    from circuit_tracer.replacement_model.replacement_model_transformerlens import (  # pyright: ignore[reportMissingImports]
        TransformerLensReplacementModel,
    )
    from circuit_tracer.transcoder.single_layer_transcoder import (  # pyright: ignore[reportMissingImports]
        SingleLayerTranscoder,
        TranscoderSet,
    )

    hooked, loaded = load_model("sae-italian-mini", backend="hooked"), {}
    for layer, sae in enumerate(saes):
        d_model, d_sae = sae.W_enc.shape
        its = SingleLayerTranscoder(d_model, d_sae, torch.relu, layer, dtype=torch.float32)
        its.load_state_dict({"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec})
        loaded[layer] = its
    replacement = TransformerLensReplacementModel(hooked.cfg, tokenizer=hooked.tokenizer)
    replacement.load_state_dict(hooked.state_dict(), strict=False)
    replacement._configure_replacement_model(TranscoderSet(loaded, "mlp.hook_in", "mlp.hook_out"))

    def run() -> tuple[int, int]:
        graph = attribute(prompt, replacement, batch_size=batch or THEIR_BATCH, max_feature_nodes=max_nodes)
        prune_graph(graph)
        return len(graph.active_features), len(graph.adjacency_matrix)

    return run


if __name__ == "__main__":
    name, side, *sizes = sys.argv[1:]
    print(json.dumps(_measure(name, side, *map(int, sizes))))  # noqa: T201
