"""The evaluation card: what an SAE keeps of the activations and of the model's predictions, on held-out text.

Definitions follow SAELens' evals (and are tested against them), with intervals by bootstrap over documents added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from sae_italian.corpora import Split, iter_documents, pack
from sae_italian.corpora.packing import NO_DOCUMENT, special_mask, take_tokens
from sae_italian.models.activations import check_context, logits_with_replacement, read_activations
from sae_italian.saes import check_fits
from sae_italian.statistics import Estimate, bootstrap, wilson
from sae_italian.storage import utc_now, write_json, write_text

# Columns of the per-document sums.
_SUMS = ("n", "l0", "sse", "sq", "n_loss", "ce", "ce_sae", "ce_zero", "kl")


@dataclass(frozen=True)
class EvaluationCard:
    """Means are per token, special tokens left out; losses in nats; intervals are 95 %, over documents."""

    model: str
    sae: str
    hook_name: str
    corpus: str
    split: str
    context_size: int
    n_tokens: int
    n_documents: int
    l0: Estimate
    explained_variance: Estimate  # centred, as SAELens: 1 - sum|x - x^|^2 / sum|x - mean|^2 over all tokens
    explained_variance_uncentred: Estimate  # as Llama Scope: 1 - sum|x - x^|^2 / sum|x|^2
    ce_loss: Estimate
    ce_loss_with_sae: Estimate
    ce_loss_with_ablation: Estimate  # the activation set to zero where the SAE is applied (SAELens: at BOS too)
    ce_loss_recovered: Estimate  # (ablated - with SAE) / (ablated - clean)
    kl_div_with_sae: Estimate
    dead: Estimate  # share of latents that never fired in n_tokens
    d_sae: int
    created: str

    def as_dict(self) -> dict[str, Any]:
        return {
            name: getattr(self, name).as_dict() if isinstance(getattr(self, name), Estimate) else value
            for name, value in asdict(self).items()
        }

    def save(self, folder: Path) -> None:
        """Write card.json and card.md."""
        write_json(folder / "card.json", self.as_dict())
        write_text(folder / "card.md", self.markdown())

    def markdown(self) -> str:
        lines = [
            f"# Evaluation card: {self.sae}",
            "",
            f"{self.model}, `{self.hook_name}`, {self.d_sae:,} latents; {self.n_tokens:,} tokens of {self.n_documents:,} "
            f"{self.split} documents of {self.corpus}, context {self.context_size}; 95 % intervals over documents.",
            "",
            "| metric | value | interval |",
            "|---|---|---|",
        ]
        for name, value in vars(self).items():
            if isinstance(value, Estimate):
                lines.append(f"| {name} | {value.value:.4g} | {value.lo:.4g} to {value.hi:.4g} |")
        return "\n".join(lines) + "\n"


@torch.no_grad()
def evaluate(
    sae: Any,
    model: Any,
    corpus: str,
    *,
    split: Split = "heldout",
    n_tokens: int = 50_000,
    context_size: int | None = None,
    batch_windows: int = 16,
    text_column: str = "text",
    name: str = "",
) -> EvaluationCard:
    """Return the evaluation card of `sae` on `model` (backend `hf`) over `n_tokens` tokens of a corpus.

    At special tokens the SAE is not applied, and they count nowhere. Raises: UsageError when SAE and model do not fit,
    or the corpus is too short for `n_tokens` (the message says how many there are).
    """
    hook_name = check_fits(sae, model)
    context = check_context(int(context_size or sae.cfg.metadata.context_size or 128), model.config)
    blocks = take_tokens(
        pack(
            iter_documents(corpus, split, text_column=text_column),
            model.tokenizer,
            context,
            windows_per_block=batch_windows,
        ),
        n_tokens,
        f"the {split} split of {corpus}",
    )
    sums, vectors = _Totals(len(_SUMS)), _Totals(sae.cfg.d_in)
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    for block in tqdm(blocks, desc="evaluate", unit="batch", disable=None):
        rows, acts, keep = _measure(sae, model, hook_name, torch.from_numpy(block.tokens).to(model.device))
        fired |= rows.pop("fired").cpu()
        docs = block.doc[keep.cpu().numpy()]
        sums.add(docs, np.stack([rows[column] for column in _SUMS], axis=1))
        vectors.add(docs, acts)
    per_doc, mean_parts = sums.table(), vectors.table()
    column = {quantity: i for i, quantity in enumerate(_SUMS)}
    ratio = partial(_ratio, column=column)
    dead = int((~fired).sum())
    return EvaluationCard(
        model=str(sae.cfg.metadata.model_name),
        sae=name or str(sae.cfg.metadata.model_name),
        hook_name=hook_name,
        corpus=str(corpus),
        split=split,
        context_size=context,
        n_tokens=int(per_doc[:, 0].sum()),
        n_documents=len(per_doc),
        l0=bootstrap(per_doc, ratio("l0", "n")),
        explained_variance=_explained_variance(per_doc, mean_parts),
        explained_variance_uncentred=bootstrap(per_doc, lambda s: 1 - s[:, column["sse"]] / s[:, column["sq"]]),
        ce_loss=bootstrap(per_doc, ratio("ce", "n_loss")),
        ce_loss_with_sae=bootstrap(per_doc, ratio("ce_sae", "n_loss")),
        ce_loss_with_ablation=bootstrap(per_doc, ratio("ce_zero", "n_loss")),
        ce_loss_recovered=bootstrap(
            per_doc,
            lambda s: (
                (s[:, column["ce_zero"]] - s[:, column["ce_sae"]]) / (s[:, column["ce_zero"]] - s[:, column["ce"]])
            ),
        ),
        kl_div_with_sae=bootstrap(per_doc, ratio("kl", "n")),
        dead=wilson(dead, len(fired)),
        d_sae=len(fired),
        created=utc_now(),
    )


def _measure(
    sae: Any, model: Any, hook_name: str, tokens: Int[Tensor, "batch pos"]
) -> tuple[dict[str, Any], np.ndarray, Bool[Tensor, "batch pos"]]:
    """Return per-token quantities at the kept positions, their activations, and the mask of kept positions."""
    keep = torch.from_numpy(~special_mask(tokens.cpu().numpy(), model.tokenizer)).to(tokens.device)
    x = read_activations(model, tokens, hook_name)
    latents = sae.encode(x[keep].to(sae.dtype))
    x_hat = sae.decode(latents)

    def with_sae(activation: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        new = activation.clone()
        new[keep] = x_hat.to(activation.dtype)
        return new

    def zero(activation: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        return torch.where(keep[..., None], 0.0, activation)

    clean = model(tokens, use_cache=False).logits
    replaced = logits_with_replacement(model, tokens, hook_name, with_sae)
    zeroed = logits_with_replacement(model, tokens, hook_name, zero)
    has_loss = keep.clone()
    has_loss[:, -1] = False
    kept, flat = x[keep].double(), has_loss[keep]

    def at_kept(per_position: Float[Tensor, "batch pos"]) -> np.ndarray:
        return torch.where(flat, per_position[keep].double(), 0.0).cpu().numpy()

    rows: dict[str, Any] = {
        "n": np.ones(int(keep.sum())),
        "l0": (latents != 0).sum(-1).double().cpu().numpy(),
        "sse": (kept - x_hat.double()).pow(2).sum(-1).cpu().numpy(),
        "sq": kept.pow(2).sum(-1).cpu().numpy(),
        "n_loss": flat.double().cpu().numpy(),
        "ce": at_kept(_loss(clean, tokens)),
        "ce_sae": at_kept(_loss(replaced, tokens)),
        "ce_zero": at_kept(_loss(zeroed, tokens)),
        "kl": _kl(clean, replaced)[keep].double().cpu().numpy(),
        "fired": (latents != 0).any(0),
    }
    return rows, kept.cpu().numpy(), keep


def _loss(logits: Float[Tensor, "batch pos vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """Return the loss of predicting the next token at each position; 0 at the last."""
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return torch.nn.functional.pad(loss.view(len(tokens), -1), (0, 1))


def _kl(clean: Float[Tensor, "batch pos vocab"], other: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos"]:
    log_p, log_q = clean.float().log_softmax(-1), other.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class _Totals:
    """Sums of per-token rows within each document, kept as one row per document."""

    def __init__(self, width: int):
        self.width = width
        self.rows: dict[int, np.ndarray] = {}

    def add(self, docs: Int[np.ndarray, " tokens"], values: Float[np.ndarray, "tokens width"]) -> None:
        ids, index = np.unique(docs, return_inverse=True)
        totals = np.zeros((len(ids), self.width))
        np.add.at(totals, index, values)
        for doc, total in zip(ids.tolist(), totals, strict=True):
            if doc != NO_DOCUMENT:
                self.rows[doc] = self.rows.get(doc, 0.0) + total

    def table(self) -> Float[np.ndarray, "documents width"]:
        return np.stack([self.rows[doc] for doc in sorted(self.rows)])


def _ratio(above: str, below: str, column: dict[str, int]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda sums: sums[:, column[above]] / sums[:, column[below]]


def _explained_variance(per_doc: np.ndarray, sums_of_x: Float[np.ndarray, "documents d_in"]) -> Estimate:
    """Return the centred explained variance; the mean of x is taken over the (resampled) documents themselves."""
    column = {quantity: i for i, quantity in enumerate(_SUMS)}
    together = np.concatenate([per_doc, sums_of_x], axis=1)

    def statistic(sums: np.ndarray) -> np.ndarray:
        n, sse, sq = (sums[:, column[quantity]] for quantity in ("n", "sse", "sq"))
        variance = sq - (sums[:, len(_SUMS) :] ** 2).sum(axis=1) / n
        return 1 - sse / variance

    return bootstrap(together, statistic)
