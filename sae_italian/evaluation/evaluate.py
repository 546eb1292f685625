"""Measure the evaluation card: what an SAE keeps of the activations and of the model's predictions, on held-out text.

The definitions are those of SAELens' `sae_lens.evals`, and tests hold ours to its numbers. Its code is not called,
because it

- runs HookedTransformer models only, and knows no transcoder (`get_recons_loss` replaces at the hook that is read);
- returns means over tokens, from which no interval over documents follows, and keeps every token's value until the end
  (its memory grows with the batches; ours does not);
- sets the activation to zero at BOS too when it ablates, although the SAE is not applied there, so that an SAE that
  writes zeros does not recover 0 of the loss; gives NaN as the cosine of a reconstruction that is zero;
- counts tokens as batches times context, special ones included; has no share of dead latents.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import nll_loss, pad

from sae_italian.base.errors import UsageError, check_whole
from sae_italian.base.pace import paced
from sae_italian.base.statistics import NOTHING, Estimate, StreamingBootstrap
from sae_italian.base.storage import utc_now
from sae_italian.corpora import Split, iter_documents, pack
from sae_italian.corpora.packing import NO_DOCUMENT, PackedBlock, special_mask
from sae_italian.evaluation.card import ULTRA_ACTIVE, DensityBin, EvaluationCard, Outliers, outliers_of
from sae_italian.models.activations import check_context, logits_of, logits_with_replacement, read_many
from sae_italian.saes import check_fits, hooks_of
from sae_italian.saes.fit import decoded
from sae_italian.saes.loading import open_sae

TOKENS_PER_BATCH = 2048
LATENT_RESAMPLES = 200  # each holds a count per latent: 200 of 65,536 latents are 52 MB
LOGITS_AT_ONCE = 2**25  # of one forward pass for losses: 134 MB in float32, one window of 128 with Gemma's vocabulary
LOGITS_IN_A_SOFTMAX = 2**18  # 1 MB: eight times as many leave the processor's cache, and take 1.4 times as long
DENSITY_EDGES = np.linspace(-6, 0, 25)  # log10 of the share of tokens
# What is summed over the tokens of a document, before the components of the activation itself.
_SUMS = ("n", "l0", "sse", "sq", "cos", "norm", "n_loss", "ce", "ce_sae", "ce_zero", "n_kl", "kl_sae", "kl_zero")


class Windows(NamedTuple):
    """Whole windows: their tokens, which of these count, and the documents of those."""

    tokens: Int[Tensor, "batch pos"]
    keep: Bool[Tensor, "batch pos"]  # neither special nor between documents
    doc: Int[np.ndarray, " kept"]


@torch.no_grad()
def evaluate(
    sae: Any,
    model: Any = None,
    corpus: str | None = None,
    *,
    split: Split = "heldout",
    n_tokens: int = 50_000,
    at_most: bool = False,
    loss_tokens: int | None = None,
    context_size: int | None = None,
    text_column: str = "text",
    name: str = "",
) -> EvaluationCard:
    """Return the evaluation card of `sae` on `model` (backend `hf`) over `n_tokens` tokens of a corpus.

    An SAE is given as it is, as a folder or as release:sae_id; model and corpus are by default those that it names.
    Special tokens are not measured (the loss of predicting one is), and the SAE is not applied to them. Losses and KL take
    three more forward passes, with `loss_tokens` on the first so many tokens only. A transcoder is measured, and put in
    place, at the hook it writes.
    Raises: UsageError where SAE and model do not fit, or the corpus has fewer than `n_tokens` (`at_most`: none).
    """
    check_whole(2, context_size=context_size)
    name = name or (str(sae) if isinstance(sae, str | Path) else "")
    sae, model, corpus = open_sae(sae, model, corpus)
    hook_in, hook_out = check_fits(sae, model, writes=True), hooks_of(sae)[1]
    context = check_context(int(context_size or sae.cfg.metadata.context_size or 128), model.config)
    documents = iter_documents(corpus, split, text_column=text_column)
    blocks = pack(documents, model.tokenizer, context, windows_per_block=max(1, TOKENS_PER_BATCH // context))
    sums = TokenSums(getattr(sae.cfg, "d_out", sae.cfg.d_in))
    dimensions = StreamingBootstrap(1 + 3 * sums.d_out, n_samples=LATENT_RESAMPLES)
    latents, n_loss, outliers = LatentCounts(sae.cfg.d_sae), 0, None
    found = windows_until(blocks, model.tokenizer, [loss_tokens, n_tokens], str(documents), at_most=at_most)
    for windows in paced(found, "evaluate", n_tokens, "token", size=lambda batch: len(batch.doc)):
        with_loss = loss_tokens is None or n_loss < loss_tokens
        outliers = outliers or (_outliers(model, hook_out, windows) if len(windows.doc) > 1 else None)
        rows, active, y, error = measure(sae, model, hook_in, hook_out, windows, with_loss=with_loss)
        sums.add(windows.doc, rows, y)
        latents.add(windows.doc, active)
        dimensions.add_sums(*by_document(windows.doc, [rows["n"], y, y**2, error**2]))
        n_loss += len(windows.doc) * with_loss
    return EvaluationCard(
        model=str(sae.cfg.metadata.model_name),
        sae=name or str(sae.cfg.metadata.model_name),
        hook_name=hook_in,
        hook_name_out=hook_out,
        corpus=documents.corpus,
        split=split,
        context_size=context,
        n_tokens=latents.n_tokens,
        n_loss_tokens=n_loss,
        n_documents=sums.n_clusters,
        **sums.estimates(),
        **latents.estimates(),
        explained_variance_per_dimension=dimensions.estimate(explained_per_dimension),
        outliers=outliers,
        started_from=sae.cfg.metadata.started_from,
        density=latents.density(),
        d_sae=sae.cfg.d_sae,
        created=utc_now(),
    )


def windows_until(
    blocks: Iterator[PackedBlock], tokenizer: Any, marks: list[Any], what: str, *, at_most: bool = False
) -> Iterator[Windows]:
    """Yield whole windows until they hold the last of the marks in tokens that count; a batch ends at each, None apart.

    Raises: UsageError when the blocks end before; with `at_most` only when there are none.
    """
    check_whole(1, n_tokens=marks[-1] or 0, loss_tokens=marks[0])  # no corpus need have an end
    seen, marks = 0, sorted({min(mark, marks[-1]) for mark in marks if mark is not None})
    for block in blocks:
        keep = ~special_mask(block.tokens, tokenizer) & (block.doc != NO_DOCUMENT)
        first = 0
        while first < len(keep):
            counted = keep[first:].sum(axis=1).cumsum()
            last = min(first + int(np.searchsorted(counted, marks[0] - seen)) + 1, len(keep))
            here = slice(first, last)
            seen += int(keep[here].sum())
            yield Windows(
                torch.from_numpy(block.tokens[here]), torch.from_numpy(keep[here]), block.doc[here][keep[here]]
            )
            first = last
            if seen >= marks[0]:
                marks.pop(0)
            if not marks:
                return
    if not (at_most and seen):
        raise UsageError(
            f"{what} has about {seen:,} tokens, fewer than the {marks[-1]:,} asked for. "
            f"Ask for fewer (--tokens {seen}), or use more text."
        )


@torch.no_grad()
def measure(
    sae: Any, model: Any, hook_in: str, hook_out: str, windows: Windows, *, with_loss: bool
) -> tuple[dict[str, np.ndarray], Bool[Tensor, "kept d_sae"], Float[np.ndarray, "kept d"], Float[np.ndarray, "kept d"]]:
    """Return the summands per kept token, the latents that fired there, the activation to be reconstructed, and the error."""
    tokens, keep = windows.tokens.to(model.device), windows.keep.to(model.device)
    acts = read_many(model, tokens, [hook_in, hook_out])
    x = acts[hook_in][keep].to(sae.device, sae.dtype)
    latents = sae.encode(x)
    latents = latents.to_dense() if latents.is_sparse else latents
    y_hat = decoded(sae, latents, x)
    y, wide_hat = acts[hook_out][keep].cpu().double(), y_hat.cpu().double()
    norm, norm_hat = y.norm(dim=-1), wide_hat.norm(dim=-1)
    columns = {
        "n": torch.ones(len(y)),
        "l0": (latents != 0).sum(-1),
        "sse": (y - wide_hat).pow(2).sum(-1),
        "sq": y.pow(2).sum(-1),
        "cos": (y * wide_hat).sum(-1) / (norm * norm_hat).clamp_min(1e-12),
        "norm": norm_hat / norm.clamp_min(1e-4),
    }
    if with_loss:
        n_windows = max(1, LOGITS_AT_ONCE // (tokens.shape[1] * model.config.get_text_config().vocab_size))
        kept = (part.sum().item() for part in keep.split(n_windows))
        parts = zip(tokens.split(n_windows), keep.split(n_windows), y_hat.split(list(kept)), strict=True)
        losses = [_losses(model, *part, hook_out) for part in parts]
        columns |= {name: torch.cat([part[name] for part in losses]) for name in losses[0]}
    rows = {name: column.cpu().numpy() for name, column in columns.items()}
    return rows, latents != 0, y.numpy(), (y - wide_hat).numpy()


def _outliers(model: Any, hook_name: str, windows: Windows) -> Outliers:
    tokens, keep = windows.tokens.to(model.device), windows.keep.to(model.device)
    return outliers_of(read_many(model, tokens, [hook_name])[hook_name], tokens, keep, model.tokenizer)


def _losses(
    model: Any, tokens: Int[Tensor, "batch pos"], keep: Bool[Tensor, "batch pos"], y_hat: Tensor, hook_out: str
) -> dict[str, Tensor]:
    """Return loss and KL per kept token, of the model as it is, with y_hat in place, and with zeros in place.

    The logits of the three passes are held at once, but go through the softmax a few rows at a time: with a vocabulary of
    262,144 whole copies of them would cost more than the passes.
    """

    def with_sae(activation: Tensor) -> Tensor:
        new = activation.clone()
        new[keep] = y_hat.to(activation.device, activation.dtype)
        return new

    def zero(activation: Tensor) -> Tensor:
        return torch.where(keep[..., None], 0.0, activation)

    passes = [logits_of(model, tokens)]
    passes += [logits_with_replacement(model, tokens, hook_out, replace) for replace in (with_sae, zero)]
    logits = [each.flatten(0, 1) for each in passes]
    has_next = torch.ones_like(keep)
    has_next[:, -1] = False
    has_loss, target = has_next[keep], tokens.roll(-1, dims=1)[keep]
    n_rows = max(1, LOGITS_IN_A_SOFTMAX // logits[0].shape[-1])
    blocks = zip(keep.flatten().nonzero()[:, 0].split(n_rows), target.split(n_rows), strict=True)
    found = [_losses_of([each[rows] for each in logits], following) for rows, following in blocks]
    sums = {name: torch.cat([block[name] for block in found]) for name in found[0]}
    for name in ("ce", "ce_sae", "ce_zero"):
        sums[name] = torch.where(has_loss, sums[name], 0.0)
    return {"n_loss": has_loss, "n_kl": torch.ones(len(target)), **sums}


def _losses_of(logits: list[Float[Tensor, "rows vocab"]], following: Int[Tensor, " rows"]) -> dict[str, Tensor]:
    """Return the loss of each of three predictions, and the KL divergence from the first to the other two."""
    log_p, *others = (each.float().log_softmax(-1) for each in logits)
    p = log_p.exp()
    found = {"ce": nll_loss(log_p, following, reduction="none")}
    for name, log_q in zip(("sae", "zero"), others, strict=True):
        found[f"ce_{name}"] = nll_loss(log_q, following, reduction="none")
        found[f"kl_{name}"] = (p * (log_p - log_q)).sum(-1)
    return found


class TokenSums(StreamingBootstrap):
    """Sums over documents' tokens, with their resamples: scalars per token, and the activation itself."""

    def __init__(self, d_out: int, seed: int = 0):
        super().__init__(len(_SUMS) + d_out, seed=seed)
        self.d_out = d_out
        self.n_with_loss = 0  # documents on which losses were measured

    def add(
        self, doc: Int[np.ndarray, " kept"], rows: dict[str, np.ndarray], y: Float[np.ndarray, "kept d_out"]
    ) -> None:
        self.add_sums(*by_document(doc, [*(rows.get(name, np.zeros(len(doc))) for name in _SUMS), y]))
        if "n_loss" in rows:
            self.n_with_loss = self.n_clusters

    def estimates(self) -> dict[str, Estimate]:
        """Return every number of the card that is a ratio of sums over tokens."""
        n_clusters = {key: self.n_with_loss for key in STATISTICS if key.startswith(("ce_", "kl_", "delta_"))}
        return {key: self.estimate(what, n_clusters=n_clusters.get(key)) for key, what in STATISTICS.items()}


def by_document(doc: Int[np.ndarray, " kept"], columns: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents, and the sums of the columns over the tokens of each."""
    documents, index = np.unique(doc, return_inverse=True)
    of_document = np.zeros((len(documents), len(doc)))
    of_document[index, np.arange(len(doc))] = 1.0
    return documents, of_document @ np.column_stack(columns)


def _column(sums: Float[np.ndarray, "samples width"], name: str) -> Float[np.ndarray, " samples"]:
    return sums[:, _SUMS.index(name)]


def _fvu(sums: Float[np.ndarray, "samples width"]) -> Float[np.ndarray, " samples"]:
    """Return the centred unexplained fraction; the mean activation is that of the (resampled) documents themselves."""
    mean_part = (sums[:, len(_SUMS) :] ** 2).sum(axis=1) / _column(sums, "n")
    return _column(sums, "sse") / (_column(sums, "sq") - mean_part)


def _ratio(above: str, below: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda sums: _column(sums, above) / _column(sums, below)


# The numbers of the card that are ratios of sums over tokens, by key.
STATISTICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "l0": _ratio("l0", "n"),
    "explained_variance": lambda s: 1 - _fvu(s),
    "explained_variance_uncentred": lambda s: 1 - _column(s, "sse") / _column(s, "sq"),
    "fvu": _fvu,
    "cossim": _ratio("cos", "n"),
    "l2_ratio": _ratio("norm", "n"),
    "ce_loss": _ratio("ce", "n_loss"),
    "ce_loss_with_sae": _ratio("ce_sae", "n_loss"),
    "ce_loss_with_ablation": _ratio("ce_zero", "n_loss"),
    "delta_lm_loss": lambda s: (_column(s, "ce_sae") - _column(s, "ce")) / _column(s, "n_loss"),
    "ce_loss_recovered": lambda s: (
        (_column(s, "ce_zero") - _column(s, "ce_sae")) / (_column(s, "ce_zero") - _column(s, "ce"))
    ),
    "kl_div_with_sae": _ratio("kl_sae", "n_kl"),
    "kl_div_with_ablation": _ratio("kl_zero", "n_kl"),
    "kl_recovered": lambda s: 1 - _column(s, "kl_sae") / _column(s, "kl_zero"),
}


def explained_per_dimension(sums: Float[np.ndarray, "samples width"]) -> Float[np.ndarray, " samples"]:
    """Return the explained variance of each dimension on its own, averaged: none of great variance hides the others.

    1 - mean_j (sum_t (y - y^)_tj^2 / sum_t (y_tj - mean_j)^2), over the dimensions that vary; of the sums of 1, y, y^2 and
    the squared error.
    """
    total, square, error = np.split(sums[:, 1:], 3, axis=1)
    variance = square - total**2 / sums[:, :1]
    varies = variance > 1e-9 * square
    error = np.where(varies, error / variance, 0.0)
    return 1 - error.sum(axis=1) / varies.sum(axis=1)  # NaN of a resample without documents


class LatentCounts(StreamingBootstrap):
    """How often each latent fired, with resamples; what was dead after 100,000 and 1,000,000 tokens exactly."""

    def __init__(self, d_sae: int):
        # one count per latent, and the number of tokens itself
        super().__init__(d_sae + 1, n_samples=LATENT_RESAMPLES, dtype=np.float32)
        self.n_tokens = 0
        self.dead_after: dict[int, Estimate] = {100_000: NOTHING, 1_000_000: NOTHING}

    def add(self, doc: Int[np.ndarray, " kept"], active: Bool[Tensor, "kept d_sae"]) -> None:
        cuts = [mark - self.n_tokens for mark in self.dead_after if 0 < mark - self.n_tokens < len(doc)]
        for own, on in zip(np.split(doc, cuts), active.tensor_split(cuts), strict=True):
            documents, index = np.unique(own, return_inverse=True)
            counts = torch.zeros(len(documents), active.shape[1] + 1, device=active.device).float()
            counts.index_add_(0, torch.from_numpy(index).to(active.device), pad(on, (0, 1), value=1).float())
            self.add_sums(documents, counts.cpu().numpy())
            self.n_tokens += len(own)
            if self.n_tokens in self.dead_after:
                self.dead_after[self.n_tokens] = self.dead()

    def _share(self, which: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """Return the share of latents for which a statement about their density holds; intervals stay in 0 to 1."""

        def shares(counts: np.ndarray) -> np.ndarray:
            return which(counts[:, :-1] / np.maximum(counts[:, -1:], 1)).mean(axis=1)

        value, lo, hi = self.estimate(shares, centre=True)
        return Estimate(value, max(0.0, lo), min(1.0, hi)) if lo == lo else Estimate(value, lo, hi)

    def dead(self) -> Estimate:
        return self._share(lambda density: density == 0)

    def estimates(self) -> dict[str, Estimate]:
        return {
            "dead": self.dead(),
            "dead_in_100k": self.dead_after[100_000],
            "dead_in_1m": self.dead_after[1_000_000],
            "ultra_active": self._share(lambda density: density > ULTRA_ACTIVE),
        }

    def density(self) -> tuple[DensityBin, ...]:
        """Return the histogram of log10 density of the latents that fired; what is rarer falls into the first bin."""

        def bin_share(low: float, high: float) -> Estimate:
            floor = -np.inf if low == DENSITY_EDGES[0] else low
            return self._share(lambda density: (density > 10**floor) & (density <= 10**high))

        pairs = zip(DENSITY_EDGES[:-1].tolist(), DENSITY_EDGES[1:].tolist(), strict=True)
        return tuple(DensityBin(low, high, bin_share(low, high)) for low, high in pairs)
