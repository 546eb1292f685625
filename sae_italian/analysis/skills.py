"""Has a model learnt the language? Agreement on minimal pairs, and the indirect object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sae_italian import micro_italiano
from sae_italian.micro_italiano import AgreementPair, IoiPrompt


@torch.no_grad()
def continuation_log_probs(
    model: Any, prefixes: Sequence[str], continuations: Sequence[str]
) -> Float[np.ndarray, " n"]:
    """Return log p(" " + continuation | prefix), in nats, summed over the continuation's tokens.

    `model` is a Hugging Face model with its tokenizer, which puts the BOS in front.
    """
    values = []
    for prefix, continuation in zip(prefixes, continuations, strict=True):
        tokens = model.tokenizer(f"{prefix} {continuation}", return_tensors="pt").input_ids
        n_prefix = len(model.tokenizer(prefix).input_ids)
        log_probs = model(tokens.to(model.device)).logits[0].log_softmax(-1)
        targets = tokens[0, n_prefix:].to(model.device)
        values.append(log_probs[n_prefix - 1 : -1].gather(1, targets[:, None]).sum().item())
    return np.array(values)


def agreement_accuracy(model: Any, pairs: Sequence[AgreementPair]) -> dict[str, float]:
    """Return the share of pairs whose right form is more probable than the wrong one: overall, and by kind."""
    prefixes = [pair.prefix for pair in pairs]
    right = continuation_log_probs(model, prefixes, [pair.right for pair in pairs])
    wrong = continuation_log_probs(model, prefixes, [pair.wrong for pair in pairs])
    correct = right > wrong
    kinds = np.array([pair.kind for pair in pairs])
    return {"all": float(correct.mean())} | {
        kind: float(correct[kinds == kind].mean()) for kind in np.unique(kinds).tolist()
    }


def ioi_logit_differences(model: Any, prompts: Sequence[IoiPrompt]) -> Float[np.ndarray, " n"]:
    """Return log p(indirect object) - log p(subject) after each prompt, in nats: above 0 the model is right."""
    texts = [prompt.text for prompt in prompts]
    right = continuation_log_probs(model, texts, [prompt.io for prompt in prompts])
    return right - continuation_log_probs(model, texts, [prompt.subject for prompt in prompts])


def italian_skills(model: Any, *, n: int = 300, seed: int = 1001) -> dict[str, float]:
    """Return what a model knows of MicroItaliano, on n items each: shares right, and a mean difference in nats."""
    agreement = agreement_accuracy(model, micro_italiano.agreement_pairs(n, seed=seed))
    differences = ioi_logit_differences(model, micro_italiano.ioi_prompts(n, seed=seed))
    return {
        **{f"agreement, {kind}": share for kind, share in agreement.items()},
        "indirect object, right": float((differences > 0).mean()),
        "indirect object, mean difference": float(differences.mean()),
    }
