"""Statistics of every latent in one pass over the latent-major files, written to stats.parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sae_italian.cache.layout import STATS, Manifest
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.storage import atomic_path

TOP_TOKENS = 10
N_BINS = 20
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def write_statistics(folder: Path, manifest: Manifest, sae: Any, model: Any) -> None:
    """Write one row per latent.

    count, density (share of non-special tokens with a non-zero activation), max, mean (over non-zero activations),
    quantiles (0.1, .25, .5, .75, .9 of non-zero activations), histogram (20 equal bins from 0 to max), n_documents,
    token_ids and token_shares (the tokens it fires on, by share of activation mass), token_entropy (nats, of that
    share), promoted_ids, promoted_values, suppressed_ids, suppressed_values (logit lens, in logits; empty lists
    without `sae` and `model`, as in a cache that was imported).
    """
    import pyarrow as pa
    import pyarrow.parquet

    from sae_italian.cache.read import FeatureCache

    cache = FeatureCache(folder, manifest)
    n_counted = int((cache.doc != NO_DOCUMENT).sum())
    columns: dict[str, list[Any]] = {}
    for latent in tqdm(range(manifest.d_sae), desc="statistics", unit="latent", disable=None):
        for name, value in _row(cache, latent, n_counted).items():
            columns.setdefault(name, []).append(value)
    columns |= _logit_lens(sae, model) if sae is not None and model is not None else _no_lens(manifest.d_sae)
    table = pa.table({"latent": np.arange(manifest.d_sae), **columns})
    with atomic_path(folder / STATS) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")


def _row(cache: Any, latent: int, n_counted: int) -> dict[str, Any]:
    position, value = cache.latent(latent)
    tokens, index = np.unique(cache.tokens[position], return_inverse=True)
    mass = np.bincount(index, weights=value, minlength=len(tokens))
    share = mass / mass.sum() if len(mass) else mass
    top = np.argsort(-share, kind="stable")[:TOP_TOKENS]
    largest = float(value.max(initial=0.0))
    return {
        "count": len(value),
        "density": len(value) / n_counted,
        "max": largest,
        "mean": float(value.mean()) if len(value) else 0.0,
        "quantiles": np.quantile(value, QUANTILES) if len(value) else np.zeros(len(QUANTILES)),
        "histogram": np.histogram(value, bins=N_BINS, range=(0.0, largest or 1.0))[0],
        "n_documents": len(np.unique(cache.doc[position])),
        "token_ids": tokens[top].astype(np.int64),
        "token_shares": share[top],
        "token_entropy": float(-(share * np.log(share)).sum()) if len(share) else 0.0,
    }


def _no_lens(d_sae: int) -> dict[str, Any]:
    import pyarrow as pa

    kinds = {"ids": pa.int64(), "values": pa.float32()}
    return {
        f"{name}_{what}": pa.array([[]] * d_sae, pa.list_(kind))
        for name in ("promoted", "suppressed")
        for what, kind in kinds.items()
    }


@torch.no_grad()
def _logit_lens(sae: Any, model: Any, block: int = 1024) -> dict[str, list[np.ndarray]]:
    """Return the tokens whose logits each decoder direction raises and lowers most, the final norm's gain folded in.

    The norm's division by the residual's scale is left out, so values compare within a latent, not with real logits.
    """
    unembed: Float[Tensor, "vocab d_in"] = model.get_output_embeddings().weight.float()
    gain = _final_gain(model)
    lists: dict[str, list[np.ndarray]] = {}
    for directions in sae.W_dec.float().split(block):
        logits = (directions * gain) @ unembed.T
        for name, largest in (("promoted", True), ("suppressed", False)):
            values, ids = logits.topk(TOP_TOKENS, largest=largest)
            lists.setdefault(f"{name}_ids", []).extend(ids.cpu().numpy())
            lists.setdefault(f"{name}_values", []).extend(values.cpu().numpy())
    return lists


def _final_gain(model: Any) -> Tensor | float:
    """Return the gain of the norm before the unembedding, 1 where the family keeps it elsewhere."""
    for path in ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm"):
        try:
            return model.get_submodule(path).weight.float()
        except AttributeError:
            continue
    return 1.0
