"""What the decoder directions say without any text: the tokens they promote, and the directions nearest to them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_italian.cache.latent_stats import arrow

TOP = 10
BLOCK_BYTES = 2**27


def _blocks(directions: Tensor, width: int) -> tuple[Tensor, ...]:
    return directions.split(max(1, BLOCK_BYTES // (4 * width)))


@torch.no_grad()
def decoder_neighbours(sae: Any) -> dict[str, Any]:
    """Return for each latent the 10 latents with the nearest decoder directions, and the cosines."""
    directions = torch.nn.functional.normalize(sae.W_dec.float(), dim=-1)
    n = min(TOP, len(directions) - 1)
    ids, cosines = [], []
    first = 0
    for block in _blocks(directions, len(directions)):
        cosine = block @ directions.T
        cosine[torch.arange(len(block)), torch.arange(first, first + len(block))] = -2.0
        value, index = cosine.topk(n)
        ids.append(index.cpu())
        cosines.append(value.cpu())
        first += len(block)
    return {"decoder_ids": arrow(torch.cat(ids).numpy()), "decoder_cosines": arrow(torch.cat(cosines).numpy())}


@torch.no_grad()
def logit_lens(sae: Any, model: Any) -> dict[str, Any]:
    """Return the tokens whose logits each decoder direction raises and lowers most, the final norm's gain folded in.

    The norm's division by the residual's scale is left out, so values compare within a latent, not with real logits.
    """
    unembed: Float[Tensor, "vocab d_in"] = model.get_output_embeddings().weight.float()
    gain = final_gain(model)
    lists: dict[str, list[Tensor]] = {}
    for directions in _blocks(sae.W_dec.float(), len(unembed)):
        logits = (directions * gain) @ unembed.T
        for name, largest in (("promoted", True), ("suppressed", False)):
            values, ids = logits.topk(min(TOP, len(unembed)), largest=largest)
            lists.setdefault(f"{name}_ids", []).append(ids.cpu())
            lists.setdefault(f"{name}_values", []).append(values.cpu())
    return {name: arrow(torch.cat(parts).numpy()) for name, parts in lists.items()}


def unknown_decoder(d_sae: int) -> dict[str, Any]:
    """Return the columns of `decoder_neighbours` and `logit_lens` with nothing in them, for an SAE that is not there."""
    import pyarrow as pa

    kinds = {"ids": pa.int64(), "values": pa.float32(), "cosines": pa.float32()}
    names = ("decoder_ids", "decoder_cosines", "promoted_ids", "promoted_values", "suppressed_ids", "suppressed_values")
    return {name: pa.array([[]] * d_sae, pa.list_(kinds[name.split("_")[1]])) for name in names}


def final_gain(model: Any) -> Tensor | float:
    """Return the gain of the norm before the unembedding, 1 where the family keeps it elsewhere."""
    for path in ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm"):
        try:
            return model.get_submodule(path).weight.float()
        except AttributeError:
            continue
    return 1.0
