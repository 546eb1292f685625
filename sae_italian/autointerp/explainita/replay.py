"""Play the data's tokens through a model and an SAE again: are the activations those that the data says?

The data holds windows cut from longer contexts, and not the beginning of these, so a token's activation can differ from
the one stored where it depended on what was cut away; nor is it said whether a BOS came first. Both readings, with and
without BOS, are played, and agreement is reported rather than equality: on a window that began its context it is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from sae_italian.autointerp.explainita.data import Excerpt, Latent, as_example
from sae_italian.base.errors import UsageError
from sae_italian.models.activations import read_activations

_MEASURES = ("correlation", "on_and_off_agree", "relative_error")
AGREES = 0.9  # correlation from which a latent counts as replayed


@torch.no_grad()
def replay(latents: Sequence[Latent], sae: Any, model: Any) -> dict[str, Any]:
    """Return how far the data's activations are those of `sae` on `model`, read with and without a BOS.

    Per latent the correlation over all its tokens, and whether on and off agree; then their medians, and the share of
    latents that are replayed. Task 1's strengths are whole numbers, so its correlation cannot be exactly 1.

    Raises: UsageError when no sequence has activations or could be tokenised again, or a latent is not the SAE's.
    """
    width, tokenizer = int(sae.cfg.d_sae), model.tokenizer
    prefixes = {"without BOS": []} | ({} if tokenizer.bos_token_id is None else {"with BOS": [tokenizer.bos_token_id]})
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in prefixes}
    n_sequences = n_aligned = 0
    for latent in latents:
        if latent.index >= width:
            raise UsageError(f"{latent.id} is not a latent of this SAE, which has {width}. Give the released one.")
        known = [(one.strengths, token_ids(tokenizer, one)) for one in latent.sequences if one.strengths is not None]
        aligned = [(strengths, ids) for strengths, ids in known if ids is not None]
        n_sequences, n_aligned = n_sequences + len(known), n_aligned + len(aligned)
        if not any(strengths.any() for strengths, _ in aligned):
            continue
        stored = np.concatenate([strengths for strengths, _ in aligned])
        for name, prefix in prefixes.items():
            ours = []
            for _, ids in aligned:
                x = read_activations(model, torch.tensor([[*prefix, *ids]]), sae.cfg.metadata.hook_name)
                encoded = sae.encode(x.to(sae.W_dec.dtype))[0, len(prefix) :, latent.index]
                ours.append(encoded.float().cpu().numpy())
            found[name].append(_agreement(stored, np.concatenate(ours)))
    if not any(found.values()):
        raise UsageError(
            f"none of {n_sequences} sequences with activations could be tokenised again into its own tokens, so nothing "
            "can be compared: is this the model's tokenizer, and the split not `test`?"
        )
    counts = {"latents": len(found["without BOS"]), "sequences": n_sequences, "tokenised_again": n_aligned}
    return counts | {name: _summary(rows) for name, rows in found.items()}


def _summary(rows: list[tuple[float, float, float]]) -> dict[str, float]:
    replayed = float(np.mean([correlation >= AGREES for correlation, *_ in rows]))
    medians = dict(zip(_MEASURES, np.median(rows, axis=0).tolist(), strict=True))
    return {"replayed": replayed, **medians}


def token_ids(tokenizer: Any, sequence: Excerpt) -> list[int] | None:
    """Return the ids that stand behind a sequence's strings: of its text, tokenised again, when that gives its tokens.

    None when it does not (a window that begins within a word, strings that lost their spaces): it is left out, not
    guessed at.
    """
    wanted = [_bare(token) for token in sequence.tokens]
    text = sequence.text if sequence.text is not None else as_example(sequence).text
    for candidate in (text, f" {text}", text.lstrip()):
        ids = tokenizer(candidate, add_special_tokens=False)["input_ids"]
        pieces = tokenizer.convert_ids_to_tokens(ids)
        if [_bare(piece) for piece in pieces] == wanted or [_bare(tokenizer.decode([one])) for one in ids] == wanted:
            return list(ids)
    return None


def _bare(token: str) -> str:
    return token.replace("▁", " ").replace("Ġ", " ").strip()


def _agreement(stored: Float[np.ndarray, " tokens"], ours: Float[np.ndarray, " tokens"]) -> tuple[float, float, float]:
    """Return the correlation, the share of tokens on which both are on or both off, and the median relative error."""
    correlation = float(np.corrcoef(stored, ours)[0, 1]) if stored.std() > 0 and ours.std() > 0 else 0.0
    on = stored > 0
    scale = float(stored.max() / ours.max()) if ours.max() > 0 and float(stored.max()).is_integer() else 1.0
    error = float(np.median(np.abs(ours[on] * scale - stored[on]) / stored[on]))
    return correlation, float((on == (ours > 0)).mean()), error
