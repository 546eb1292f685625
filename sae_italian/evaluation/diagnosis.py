"""Activations on held-out text, and what the doctor measures on a sample: an SAE as it is, and after each possible repair.

A fault is named by the repair that undoes it: if the SAE reconstructs far better when its input is scaled, when another
layer is read, when its decoder is laid out otherwise or when each latent gets another gain, that is what is wrong.
Shapes: x [tokens, d_in] the SAE's input, y [tokens, d_out] its target (x itself for an SAE), z [tokens, d_sae] latents.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse.linalg import LinearOperator, lsqr
from torch import Tensor

from sae_italian.corpora import PackedBlock, Split, iter_documents, pack
from sae_italian.corpora.packing import special_mask, take_tokens
from sae_italian.models.activations import check_context, read_many
from sae_italian.models.hooks import parse_hook_name
from sae_italian.saes.fit import Fit, check_free, decoded, explained, fit, save_sae
from sae_italian.saes.jumprelu import Thresholds, check_exportable, to_jumprelu
from sae_italian.saes.loading import check_fits, check_hooks, check_sae, hooks_of

SCALES = tuple(2.0**power for power in range(-7, 8))
JUMPRELU_TOKENS = 40_960  # about 32,768 of them, as many as Llama Scope took, set the thresholds; the rest checks


class Sample(NamedTuple):
    """Activations of some windows at the SAE's hooks, special tokens left out."""

    tokens: Int[Tensor, "windows context"]
    keep: Bool[Tensor, "windows context"]
    x: Float[Tensor, "tokens d_in"]
    y: Float[Tensor, "tokens d_out"]


@torch.no_grad()
def take_sample(sae: Any, model: Any, tokens: Int[Tensor, "windows context"], keep: Tensor) -> Sample:
    hook_in, hook_out = hooks_of(sae)
    acts = read_many(model, tokens.to(model.device), [hook_in, hook_out])
    return Sample(tokens, keep, *(acts[hook][keep].to(sae.device, sae.dtype) for hook in (hook_in, hook_out)))


def activations(
    sae: Any, model: Any, blocks: Iterable[Int[np.ndarray, "windows context"]]
) -> tuple[Float[Tensor, "tokens d_in"], Float[Tensor, "tokens d_out"]]:
    """Return the SAE's input and target on windows, no special tokens. Raises: UsageError where SAE and model do not fit."""
    check_sae(sae)
    check_hooks(sae, model)
    x, y = [], []
    for tokens in blocks:
        keep = torch.from_numpy(~special_mask(tokens, model.tokenizer))
        sample = take_sample(sae, model, torch.from_numpy(tokens), keep)
        x.append(sample.x.cpu())
        y.append(sample.y.cpu())
    return torch.cat(x), torch.cat(y)


def blocks_of(
    model: Any, corpus: str, split: Split, n_tokens: int, context_size: int, text_column: str = "text"
) -> list[PackedBlock]:
    """Return so many tokens of a corpus as blocks of whole windows. Raises: UsageError where there are fewer."""
    context = check_context(int(context_size), model.config)
    packed = pack(iter_documents(corpus, split, text_column=text_column), model.tokenizer, context)
    return list(take_tokens(packed, n_tokens, f"the {split} split of {corpus}"))


def held_out_activations(
    sae: Any, model: Any, corpus: str, n_tokens: int, *, context_size: int | None = None, text_column: str = "text"
) -> tuple[Float[Tensor, "tokens d_in"], Float[Tensor, "tokens d_out"], Int[Tensor, " tokens"]]:
    """Return the SAE's input and target on text it was not trained on, no special tokens, and each token's document's number.

    Raises: UsageError.
    """
    context = context_size or sae.cfg.metadata.context_size or 128
    blocks = blocks_of(model, corpus, "heldout", n_tokens, context, text_column)
    x, y = activations(sae, model, (block.tokens for block in blocks))
    documents = [block.doc[~special_mask(block.tokens, model.tokenizer)] for block in blocks]
    return x[:n_tokens], y[:n_tokens], torch.from_numpy(np.concatenate(documents))[:n_tokens]


def export_jumprelu(
    sae: Any,
    model: Any,
    corpus: str,
    out: str | Path,
    *,
    n_tokens: int = JUMPRELU_TOKENS,
    thresholds: Thresholds = "calibrated",
    **reading: Any,
) -> dict[str, Any]:
    """Write the JumpReLU of a TopK SAE or transcoder to the new folder `out` and return what `to_jumprelu` notes.

    `reading` is what `held_out_activations` takes of it. Raises: UsageError for another architecture, an SAE that does not
    fit the model, a corpus that is too short, and a folder that is not empty; before anything is written.
    """
    check_free(out)
    check_exportable(sae)
    check_fits(sae, model)
    x, y, documents = held_out_activations(sae, model, corpus, n_tokens, **reading)
    exported = to_jumprelu(sae, x, y, documents=documents, thresholds=thresholds)
    save_sae(exported, out)
    return exported.cfg.metadata.jumprelu_export


def best_scale(sae: Any, sample: Sample) -> tuple[float, Fit]:
    """Return the factor on the activations with which the SAE explains them best, to about a tenth, and that fit."""
    fits, best = {}, 1.0
    for factors in (SCALES, (2**-0.5, 2**-0.25, 2**0.25, 2**0.5)):
        fits |= {best * factor: fit(sae, sample.x, sample.y, best * factor) for factor in factors}
        best = max(fits, key=lambda scale: fits[scale].explained_variance_uncentred)
    return best, fits[best]


def best_output_scale(sae: Any, sample: Sample) -> tuple[float, float]:
    """Return the factor on what the decoder adds to its bias that explains y best, and the gain in explained variance."""
    z = sae.encode(sample.x)
    written = (decoded(sae, latents, sample.x) for latents in (torch.zeros_like(z), z))
    base, whole, y = (each.cpu().double() for each in (*written, sample.y))
    added, wanted = whole - base, y - base
    factor = ((added * wanted).sum() / added.pow(2).sum().clamp_min(1e-12)).item()
    centred = (y - y.mean(0)).pow(2).sum()
    gain = ((wanted - added).pow(2).sum() - (wanted - factor * added).pow(2).sum()) / centred
    return factor, gain.item()


def fit_by_layer(sae: Any, model: Any, sample: Sample, n_tokens: int) -> dict[int, float]:
    """Return the centred explained variance of the SAE on the activations of each layer at its site."""
    hook_in, hook_out = (parse_hook_name(name) for name in hooks_of(sae))
    layers = range(model.config.num_hidden_layers)
    names = {layer: [f"blocks.{layer}.{hook.legacy}" for hook in (hook_in, hook_out)] for layer in layers}
    every = [name for pair in names.values() for name in pair]
    n_windows = max(1, n_tokens // sample.tokens.shape[1])
    keep = sample.keep[:n_windows]
    tokens = sample.tokens[:n_windows].to(model.device)
    acts = {name: each[keep].to(sae.dtype) for name, each in read_many(model, tokens, every).items()}
    return {layer: fit(sae, acts[x], acts[y]).explained_variance for layer, (x, y) in names.items()}


def _repaired(sae: Any) -> Any:
    """Return a shallow copy whose parameters and settings can be replaced without touching the SAE."""
    twin = copy.copy(sae)
    twin._parameters = dict(sae._parameters)
    twin.cfg = copy.copy(sae.cfg)
    return twin


def fit_relaid(sae: Any, sample: Sample) -> Fit:
    """Return the fit with the decoder's numbers read in the other order: what undoes a transposed W_dec."""
    twin = _repaired(sae)
    relaid = sae.W_dec.detach().reshape(sae.W_dec.T.shape).T.contiguous()
    twin.W_dec = torch.nn.Parameter(relaid, requires_grad=False)
    return fit(twin, sample.x, sample.y)


def fit_reselected(sae: Any, sample: Sample) -> Fit | None:
    """Return the fit when a TopK's selection (not) counts the decoder's norm, the opposite of now; None otherwise."""
    if not hasattr(sae.cfg, "rescale_acts_by_decoder_norm"):
        return None
    twin = _repaired(sae)
    twin.cfg.rescale_acts_by_decoder_norm = not sae.cfg.rescale_acts_by_decoder_norm
    return fit(twin, sample.x, sample.y)


def best_gains(sae: Any, sample: Sample, steps: int = 30) -> tuple[Float[Tensor, " latents"], Fit]:
    """Return the factor each active latent would need (least squares, scipy's LSQR), and the fit with them.

    Gains start from 1, and latents that never fire in the sample are left out. The fit's L0 is the SAE's own.
    """
    z = sae.encode(sample.x)
    active = (z != 0).sum(0) >= 2
    rows = sae.W_dec[active]
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):  # decode divides by the norms
        rows = rows / rows.norm(dim=-1, keepdim=True)
    added = sample.y - decoded(sae, torch.zeros_like(z), sample.x)
    acts, directions, wanted = (each.detach().float().cpu().numpy() for each in (z[:, active], rows, added))
    operator: Any = LinearOperator  # its stubs know no functions
    written = operator(
        (wanted.size, len(rows)),
        matvec=lambda gains: ((acts * gains.astype(acts.dtype)) @ directions).ravel(),
        rmatvec=lambda y: (acts * (y.astype(acts.dtype).reshape(wanted.shape) @ directions.T)).sum(axis=0),
    )
    start = np.ones(len(rows))
    gains, _, _, residual, *_ = lsqr(written, wanted.ravel(), atol=0, btol=0, conlim=0, iter_lim=steps, x0=start)
    return torch.from_numpy(gains), Fit(*explained(residual**2, sample.y), float("nan"), float("nan"))
