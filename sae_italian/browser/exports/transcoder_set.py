"""A suite of transcoders as a folder that circuit-tracer opens unpatched, and the features that its page shows.

config.yaml                      model, hooks and scan (the name by which its page looks for features)
layer_<i>.safetensors            W_enc [F, d], W_dec [F, d], b_enc, b_dec, with W_skip [d, d] and, for a JumpReLU,
                                 activation_function.threshold [F]
features/index.json.gz           by layer: `filename`, and `offsets` [F + 1] into it
features/layer_<i>.bin           a record a latent: its length in 4 bytes, little end first, then zlib's JSON

circuit-tracer reads a TopK set as ReLU without a word, so a TopK transcoder goes there as the JumpReLU whose thresholds
are calibrated on held-out text.
"""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_italian.base.errors import UsageError
from sae_italian.base.pace import progress
from sae_italian.base.report import table
from sae_italian.base.storage import write_text
from sae_italian.browser.exports import circuit_feature
from sae_italian.browser.exports.latents import Latents, make_row
from sae_italian.browser.source import LatentSource
from sae_italian.circuits.edges import layers_of
from sae_italian.evaluation.diagnosis import export_jumprelu
from sae_italian.saes import load_sae

QUANTILES = (0.5, 0.9, 0.99, 1.0)
_UNSCALED = ("none", None)


def export_set(
    saes: Sequence[Any], model: Any, out: Path, *, name: str, corpus: str, caches: Mapping[int, Any], **reading: Any
) -> list[dict[str, Any]]:
    """Write the folder and return a record a layer: its activation, L0 and explained variance before and after.

    `name` is the model's, `caches` are opened feature caches by layer (none: no features), `reading` what
    `export_jumprelu` takes of the text that sets the thresholds.
    Raises: UsageError for a layer that is missing, transcoders of several widths, one that circuit-tracer has no form for,
    and as `layers_of`.
    """
    by_layer = layers_of(saes, model)
    _check_whole(by_layer, model.config.num_hidden_layers)
    rows = []
    for layer, sae in sorted(by_layer.items()):
        plain, row = sae, {"layer": layer, "architecture": sae.cfg.architecture()}
        if row["architecture"].startswith("topk"):
            with TemporaryDirectory() as folder:
                report = export_jumprelu(sae, model, corpus, Path(folder) / "sae", **reading)
                plain = load_sae(Path(folder) / "sae")
            told = ("l0_before", "l0", "explained_variance_before", "explained_variance")
            row |= {key: report[key] for key in told}
        save_file(_tensors(plain, layer), out / f"layer_{layer}.safetensors")
        rows.append(row)
    hook = saes[0].cfg.metadata.hook_name.split(".", 2)[2]
    config = {"model_name": name, "model_kind": "transcoder_set", "scan": out.resolve().name}
    config |= {"feature_input_hook": hook, "feature_output_hook": "hook_mlp_out"}
    write_text(out / "config.yaml", "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items()))
    if caches:
        _write_features(out / "features", caches, model, len(by_layer))
    return rows


def set_text(rows: Sequence[Mapping[str, Any]], out: Path) -> str:
    """Return a Markdown table of what `export_set` returned."""
    pairs = (("l0_before", "l0"), ("explained_variance_before", "explained_variance"))
    changes = ((" -> ".join(f"{row[key]:.3g}" for key in pair if key in row) for pair in pairs) for row in rows)
    shown = [(row["layer"], row["architecture"], *own) for row, own in zip(rows, changes, strict=True)]
    read_with = f"circuit-tracer attribute --transcoder_set {out.resolve()}"
    return f"{table('layer | architecture | L0 | explained variance', shown)}\n\n{out}; read it with {read_with}"


def _check_whole(by_layer: Mapping[int, Any], n_layers: int) -> None:
    if missing := sorted(set(range(n_layers)) - set(by_layer)):
        raise UsageError(
            f"no transcoder of layer {', '.join(map(str, missing))}: circuit-tracer needs one of each of {n_layers} layers. "
            "Train the rest, or use `sae-italian graph`, which does without."
        )
    if len(widths := sorted({sae.cfg.d_sae for sae in by_layer.values()})) > 1:
        raise UsageError(f"the transcoders have widths {widths}; circuit-tracer needs one for all layers.")


@torch.no_grad()
def _tensors(sae: Any, layer: int) -> dict[str, Tensor]:
    """Return the weights under circuit-tracer's names. Raises: UsageError for what it cannot compute."""
    scaling, architecture = getattr(sae.cfg, "normalize_activations", "none"), sae.cfg.architecture()
    if scaling not in _UNSCALED:
        raise UsageError(
            f"layer {layer}: {architecture} with normalize_activations {scaling!r} has no form in circuit-tracer, which reads "
            "raw activations. Fold its scale first, or train with `topk`."
        )
    bias = sae.b_enc
    if getattr(sae.cfg, "apply_b_dec_to_input", False):
        bias = bias - sae.b_dec @ sae.W_enc
    found = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": bias, "b_dec": sae.b_dec}
    if getattr(sae, "threshold", None) is not None:
        found["activation_function.threshold"] = sae.threshold
    if getattr(sae, "W_skip", None) is not None:
        found["W_skip"] = sae.W_skip
    return {key: value.detach().float().contiguous().clone() for key, value in found.items()}


def _write_features(folder: Path, caches: Mapping[int, Any], model: Any, n_layers: int) -> None:
    folder.mkdir(exist_ok=True)
    index: dict[str, Any] = {}
    for layer, cache in sorted(caches.items()):
        latents = Latents(LatentSource(cache, model.tokenizer))
        file, offsets = f"layer_{layer}.bin", [0]
        with (folder / file).open("wb") as stream:
            for latent in progress(f"features {layer}", range(cache.manifest.d_sae), unit="latent"):
                record = json.dumps(_feature(latents, latent, layer), ensure_ascii=False, allow_nan=False)
                packed = zlib.compress(record.encode("utf-8", "replace"))
                stream.write(len(packed).to_bytes(4, "little") + packed)
                offsets.append(stream.tell())
        index[str(layer)] = {"filename": file, "offsets": offsets}
    (folder / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode(), mtime=0))


def _feature(latents: Latents, latent: int, layer: int) -> dict[str, Any]:
    """Return a latent's record with all that circuit-tracer's own model of one (feature_models.py) asks for."""
    values = latents.cache.latent(latent).value.astype(np.float64)
    counts = np.histogram(values, bins=50)[0].tolist() if len(values) else []
    return {
        **make_row("circuit_feature", circuit_feature(latents, latent)),
        "transcoder_id": f"layer_{layer}",
        "quantile_values": np.quantile(values, QUANTILES).tolist() if len(values) else [],
        "histogram": [float(count) for count in counts],
        "activation_frequency": float(latents.stats["density"][latent]),
    }
