"""Explained variance against L0 (Cunningham et al. 2023, figure 6): every dictionary with its k strongest latents kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_italian.evaluation.jumprelu import held_out_activations
from sae_italian.papers.subject import Subject
from sae_italian.saes.baselines import mean_l0, rescaled, with_top_k

_PLAIN = ("standard", "topk", "jumprelu")  # architectures of one encoder and one decoder matrix
FIT_SHARE = 0.5  # of the tokens, for the one factor of random directions


def curves(dictionaries: dict[str, Any], subject: Subject, n_tokens: int) -> dict[str, list[dict[str, float]]]:
    """Return for each dictionary {k, l0, explained_variance (centred)} for k = 1, 2, 4 ... on held-out tokens.

    Random directions get for each k the factor that reconstructs best on other tokens. An SAE with more than an encoder
    and a decoder (gated) has no curve.
    """
    first = next(iter(dictionaries.values()))
    rows, _ = held_out_activations(
        first,
        subject.model,
        subject.corpus,
        n_tokens,
        context_size=subject.context_size,
        text_column=subject.text_column,
    )
    n_fit = int(FIT_SHARE * len(rows))
    found = {}
    for name, sae in dictionaries.items():
        if sae.cfg.architecture() not in _PLAIN:
            continue
        points = []
        for k in steps(min(sae.cfg.d_sae, sae.cfg.d_in)):
            kept = with_top_k(sae, k)
            kept = rescaled(kept, rows[:n_fit]) if name == "random" else kept
            value = explained_variance(kept, rows[n_fit:])
            points.append({"k": k, "l0": mean_l0(kept, rows[n_fit:]), "explained_variance": value})
        found[name] = points
    return found


def steps(limit: int) -> Sequence[int]:
    """Return 1, 2, 4 ... up to the limit."""
    return [2**power for power in range(limit.bit_length())]


@torch.no_grad()
def explained_variance(sae: Any, rows: Float[Tensor, "tokens d_in"], batch: int = 4096) -> float:
    """Return 1 - sum|x - x^|^2 / sum|x - mean|^2 over all tokens, as the evaluation card does."""
    rows = rows.to(sae.device, sae.dtype)
    error = sum(float((sae(part) - part).double().square().sum()) for part in rows.split(batch))
    return 1 - error / float((rows - rows.mean(0)).double().square().sum())
