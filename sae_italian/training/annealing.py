"""K-annealing (Llama Scope, arXiv 2410.20526, section 2.4): many latents may fire at first, so that none is left dead."""

from __future__ import annotations

from typing import Any

from sae_italian.base.errors import UsageError


def annealed_k(step: int, n_steps: int, share: float, start: int, k: float) -> float:
    """Return how many latents may fire in a step: linear from `start` at step 0 to `k` at `share` of the steps."""
    n_annealed = round(share * n_steps)
    if step >= n_annealed or start <= k:
        return k
    return max(k, round(start + (k - start) * step / n_annealed))


def set_k(sae: Any, k: float) -> None:
    """Let k latents of an SAE in training fire from now on; its config, and so what is saved, keeps the last k.

    Raises: UsageError for an SAE without a k.
    """
    if hasattr(sae.activation_fn, "k"):
        sae.activation_fn.k = k
    else:
        raise UsageError(
            f"k_anneal_share needs an SAE with a k, such as topk; sae.architecture is {sae.cfg.architecture()!r}."
        )
