"""Do the three backends agree? Logits and one residual activation, on one prompt."""

from __future__ import annotations

from typing import Any

import torch

from sae_italian.models.activations import read_activations
from sae_italian.models.loading import load_model

TOLERANCE = 1e-4


@torch.no_grad()
def compare_backends(name: str, prompt: str) -> dict[str, Any]:
    """Return the largest differences from the Hugging Face backend, and whether all are within 1e-4 (float32).

    Compared are the logits, and the residual stream after the middle layer.
    """
    hf = load_model(name, "hf")
    tokens = hf.tokenizer(prompt, return_tensors="pt").input_ids
    hook_name = f"blocks.{hf.config.num_hidden_layers // 2}.hook_resid_post"
    logits, resid = hf(tokens).logits, read_activations(hf, tokens, hook_name)
    differences = {}
    for backend in ("bridge", "hooked"):
        model = load_model(name, backend)
        other, cache = model.run_with_cache(tokens, names_filter=[hook_name])
        differences[f"{backend} logits"] = (other - logits).abs().max().item()
        differences[f"{backend} {hook_name}"] = (cache[hook_name] - resid).abs().max().item()
    ok = all(difference <= TOLERANCE for difference in differences.values())
    return {"model": name, "prompt": prompt, "n_tokens": tokens.shape[1], "differences": differences, "ok": ok}
