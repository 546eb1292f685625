"""Do the three backends agree? Logits, and the activations at every layer and site, on one prompt."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sae_italian.models.activations import read_many
from sae_italian.models.hooks import SITES
from sae_italian.models.loading import bos_count, load_model

TOLERANCE = 1e-4


@torch.no_grad()
def compare_backends(name: str, prompt: str) -> dict[str, Any]:
    """Return the largest differences from the Hugging Face backend, and whether all are within 1e-4 (float32)."""
    hf = load_model(name, "hf")
    tokens = hf.tokenizer(prompt, return_tensors="pt").input_ids
    differences: dict[str, float] = {}
    for backend in ("bridge", "hooked"):
        found = largest_differences(hf, load_model(name, backend), tokens)
        differences |= {f"{backend} {what}": value for what, value in found.items()}
    return {
        "model": name,
        "revision": hf.loaded_from["revision"],
        "prompt": prompt,
        "n_tokens": tokens.shape[1],
        "n_layers": hf.config.num_hidden_layers,
        "bos_added": bos_count(hf.tokenizer),
        "catalogue_differences": hf.loaded_from["differences"],
        "differences": differences,
        "ok": all(difference <= TOLERANCE for difference in differences.values()),
    }


@torch.no_grad()
def largest_differences(hf: Any, other: Any, tokens: Int[Tensor, "batch pos"]) -> dict[str, float]:
    """Return the largest absolute difference of another backend from `hf`.

    Compared are the logits, and for each site (R, A, M, TC) the activations at every layer.
    """
    layers = range(hf.config.num_hidden_layers)
    hook_names = [f"blocks.{layer}.{hook}" for layer in layers for hook in SITES.values()]
    expected = read_many(hf, tokens, hook_names)
    logits, cache = other.run_with_cache(tokens, names_filter=hook_names)
    differences = {"logits": (logits - hf(tokens).logits).abs().max().item()}
    for site, hook in SITES.items():
        at_site = [name for name in hook_names if name.endswith(hook)]
        largest = max((cache[name] - expected[name]).abs().max().item() for name in at_site)
        differences[f"{site} ({hook}), all layers"] = largest
    return differences
