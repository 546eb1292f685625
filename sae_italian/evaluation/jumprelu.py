"""Exports of an SAE that need activations of its model on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_italian.corpora import Split, iter_documents, pack
from sae_italian.corpora.packing import special_mask, take_tokens
from sae_italian.evaluation.diagnosis import take_sample
from sae_italian.models.activations import check_context
from sae_italian.saes import check_fits
from sae_italian.saes.jumprelu_export import JumpReLUExport, check_exportable, check_free, save_sae, to_jumprelu

JUMPRELU_TOKENS = 40_960  # four fifths of them, 32,768 as Llama Scope took, set the threshold; the rest checks it


def export_jumprelu(
    sae: Any,
    model: Any,
    corpus: str,
    out: str | Path,
    *,
    n_tokens: int = JUMPRELU_TOKENS,
    split: Split = "heldout",
    context_size: int | None = None,
    text_column: str = "text",
) -> JumpReLUExport:
    """Write the JumpReLU of a TopK SAE or transcoder to the new folder `out` and return what changed.

    Raises: UsageError for another architecture, an SAE that does not fit the model, a corpus that is too short, and a
    folder that is not empty; before anything is written.
    """
    check_free(out)
    check_exportable(sae)
    x, y = held_out_activations(
        sae, model, corpus, n_tokens, split=split, context_size=context_size, text_column=text_column
    )
    exported, report = to_jumprelu(sae, x, y)
    save_sae(exported, out)
    return report


@torch.no_grad()
def held_out_activations(
    sae: Any,
    model: Any,
    corpus: str,
    n_tokens: int,
    *,
    split: Split = "heldout",
    context_size: int | None = None,
    text_column: str = "text",
) -> tuple[Tensor, Tensor]:
    """Return the SAE's input [tokens, d_in] and target [tokens, d_out] on text it was not trained on, no special tokens."""
    check_fits(sae, model)
    context = check_context(int(context_size or sae.cfg.metadata.context_size or 128), model.config)
    documents = iter_documents(corpus, split, text_column=text_column)
    blocks = take_tokens(pack(documents, model.tokenizer, context), n_tokens, f"the {split} split of {corpus}")
    samples = []
    for block in blocks:
        keep = torch.from_numpy(~special_mask(block.tokens, model.tokenizer))
        sample = take_sample(sae, model, torch.from_numpy(block.tokens), keep)
        samples.append((sample.x.cpu(), sample.y.cpu()))
    return torch.cat([x for x, _ in samples])[:n_tokens], torch.cat([y for _, y in samples])[:n_tokens]
