"""The decompositions that an SAE is compared with, each as a SAELens SAE, so that every tool here runs on it unchanged.

Fitted on a stream of activations, as in Cunningham et al. 2023 (arXiv 2309.08600, section 3 and appendix G):

| kind | latents | encoder and decoder |
|---|---|---|
| `pca` | 2 d_in | principal components and their negatives, centred; IncrementalPCA, so any number of tokens |
| `ica` | 2 d_in | FastICA's unmixing and mixing directions and their negatives, centred |
| `nmf` | d_in | MiniBatchNMF's components H, encoder the pseudo-inverse of H; only where activations are non-negative |
| `random` | d_sae of the SAE | unit directions, tied; the decoder times the one factor that reconstructs best |
| `identity` | d_in | the neurons as they are, ReLU |

Each is there twice: with ReLU alone, as the paper's autointerp compares them, and as `KIND-topk` with top-k at the SAE's
own mean L0 (appendix G). With ReLU alone PCA and ICA reconstruct exactly but have d_in latents on at every token.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_italian.base.errors import UsageError, nearest
from sae_italian.saes.loading import weights_hash

TOPK = "-topk"
KINDS = ("pca", "ica", "nmf", "random", "identity")
DEFAULT_KINDS = ("pca", "ica", "random", "identity")
FIT_TOKENS, ICA_TOKENS = 200_000, 20_000
_LEAST = 2  # tokens per dimension
_EARLIER = ("random_twin_of", "baseline", "baseline_of", "top_k_of")  # metadata of what an SAE was made from
Rows = Float[Tensor, "tokens d_in"]


class Directions(NamedTuple):
    """Latents c = ReLU(encoder^T (x - mean)), x^ = c decoder + mean."""

    encoder: Float[Tensor, "d_in n"]
    decoder: Float[Tensor, "n d_in"]
    mean: Float[Tensor, " d_in"]


def fit_baselines(
    activations: Rows | Iterable[Rows],
    sae: Any,
    kinds: Sequence[str] = DEFAULT_KINDS,
    *,
    n_tokens: int = FIT_TOKENS,
    ica_tokens: int = ICA_TOKENS,
    k: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return for each kind two SAEs, `KIND` and `KIND-topk`, fitted on activations at the hook of `sae`.

    activations: [tokens, d_in], or an iterator of such batches in random order (an `ActivationStream`), of which
    `n_tokens` are read. ICA, NMF and the factor of the random directions take the first `ica_tokens` of them. `k` is the
    mean L0 of `sae` on these unless given. The same seed and activations give the same SAEs. Where FastICA or NMF stop
    before they converge, the metadata say `converged: False`.
    Raises: UsageError for an unknown kind, a transcoder, NMF of negative activations, or too few tokens to fit.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"baseline {kind!r} is unknown. {nearest(kind, KINDS)}")
    if getattr(sae.cfg, "d_out", sae.cfg.d_in) != sae.cfg.d_in or getattr(sae.cfg.metadata, "hook_name_out", None):
        raise UsageError("baselines decompose the activations of one hook; a transcoder has two. Give an SAE.")
    sample, pca = _read(activations, n_tokens, ica_tokens, "pca" in kinds, sae.cfg.d_in, seed)
    k = k if k is not None else max(1, round(mean_l0(sae, sample)))
    found: dict[str, Any] = {}
    for kind in kinds:
        directions, converged = _fitted(kind, sample, pca, sae, seed)
        for name, kept in ((kind, None), (kind + TOPK, k)):
            baseline = _as_sae(directions, sae, name, kept)
            baseline.cfg.metadata.converged = converged
            found[name] = rescaled(baseline, sample) if kind == "random" else baseline
    return found


@torch.no_grad()
def mean_l0(sae: Any, rows: Rows, batch: int = 4096) -> float:
    """Return how many latents of an SAE are active on a token, on average."""
    active = 0
    for part in rows.split(batch):
        latents = sae.encode(part.to(sae.device, sae.dtype))
        active += int((latents.to_dense() if latents.is_sparse else latents).count_nonzero())
    return active / max(len(rows), 1)


@torch.no_grad()
def rescaled(sae: Any, sample: Rows) -> Any:
    """Multiply the decoder by the factor that reconstructs the sample best, and return the SAE.

    Tied random directions overshoot by far without.
    """
    product = square = 0.0
    for part in sample.split(4096):
        x = part.to(sae.device, sae.dtype)
        x_hat = sae.decode(sae.encode(x))
        product += float((x * x_hat).sum())
        square += float(x_hat.square().sum())
    sae.W_dec *= product / max(square, 1e-12)
    return sae


def with_top_k(sae: Any, k: int) -> Any:
    """Return any SAE of an encoder and a decoder matrix with only its k strongest latents per token kept.

    The strength of a latent is what it writes, its activation times its decoder's norm. Latents that the SAE's own
    threshold silences stay silent only if its activation is ReLU or top-k; `top_k_of` in the metadata is its hash.
    """
    cfg = sae.cfg
    metadata = copy.deepcopy(cfg.metadata)
    metadata.top_k_of = weights_hash(sae)
    settings = {"apply_b_dec_to_input": cfg.apply_b_dec_to_input, "normalize_activations": cfg.normalize_activations}
    # SAELens' rescaling multiplies activations by the norms and divides by them when it decodes: the function is the same
    settings |= {"k": min(k, cfg.d_sae), "rescale_acts_by_decoder_norm": True}
    return _sae(sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, sae, metadata, settings)


# --- fitting ----------------------------------------------------------------------------------------------------------


def _read(
    activations: Rows | Iterable[Rows], n_tokens: int, n_sample: int, with_pca: bool, d_in: int, seed: int
) -> tuple[Rows, Any]:
    """Return the first tokens as they are, and the PCA of all that were read."""
    from sklearn.decomposition import IncrementalPCA

    if isinstance(activations, Tensor):
        order = torch.randperm(len(activations), generator=torch.Generator().manual_seed(seed))
        activations = activations[order.to(activations.device)].split(8192)
    pca = IncrementalPCA(n_components=d_in)
    sample: list[Tensor] = []
    n_sampled = n_read = 0
    for chunk in _chunks(activations, n_tokens, 8 * d_in):
        if chunk.shape[-1] != d_in:
            raise UsageError(f"the activations have {chunk.shape[-1]} dimensions, but the SAE reads {d_in}.")
        n_read += len(chunk)
        if n_sampled < n_sample:
            sample.append(chunk[: n_sample - n_sampled])
            n_sampled += len(sample[-1])
        if with_pca and n_read >= _LEAST * d_in:
            pca.partial_fit(chunk.double().numpy())
    if n_read < _LEAST * d_in:
        raise UsageError(
            f"{n_read:,} tokens are too few to fit baselines of {d_in} dimensions; give {_LEAST * d_in:,} or more."
        )
    return torch.cat(sample), pca


def _chunks(batches: Iterable[Rows], n_tokens: int, size: int) -> Iterator[Rows]:
    """Yield the first `n_tokens` rows in chunks of at least `size`; only the whole may be smaller than that."""
    ready, waiting, n_read = None, [], 0
    for batch in batches:
        waiting.append(batch[: n_tokens - n_read].detach().float().cpu())
        n_read += len(waiting[-1])
        if sum(map(len, waiting)) >= size:
            if ready is not None:
                yield ready
            ready, waiting = torch.cat(waiting), []
        if n_read >= n_tokens:
            break
    rest = ([ready] if ready is not None else []) + waiting
    if rest:
        yield torch.cat(rest)


def _fitted(kind: str, sample: Rows, pca: Any, sae: Any, seed: int) -> tuple[Directions, bool]:
    """Return the directions of a kind, and whether its fit converged."""
    d_in, zero = sae.cfg.d_in, torch.zeros(sae.cfg.d_in)
    if kind == "pca":
        components, mean = _tensors(pca.components_, pca.mean_)
        return _signed(components.T, components, mean), True
    if kind == "ica":
        return _ica(sample, seed)
    if kind == "nmf":
        return _nmf(sample, sae, seed)
    if kind == "random":
        drawn = torch.randn(sae.cfg.d_sae, d_in, generator=torch.Generator().manual_seed(seed))
        drawn /= drawn.norm(dim=-1, keepdim=True)
        return Directions(drawn.T, drawn, zero), True
    return Directions(torch.eye(d_in), torch.eye(d_in), zero), True


def _ica(sample: Rows, seed: int) -> tuple[Directions, bool]:
    from sklearn.decomposition import FastICA

    centred = (sample - sample.mean(0)).double()
    if torch.linalg.matrix_rank(centred.T @ centred, hermitian=True) < sample.shape[1]:
        raise UsageError(
            f"the activations span fewer than {sample.shape[1]} dimensions, so ICA cannot whiten them. Leave out ica."
        )
    ica: Any = FastICA(whiten="unit-variance", random_state=seed, max_iter=200, tol=1e-3)
    converged = _converges(ica, sample)
    unmixing, mixing, mean = _tensors(ica.components_, ica.mixing_, ica.mean_)
    return _signed(unmixing.T, mixing.T, mean), converged


def _nmf(sample: Rows, sae: Any, seed: int) -> tuple[Directions, bool]:
    from sklearn.decomposition import MiniBatchNMF

    if (lowest := float(sample.min())) < 0:
        raise UsageError(
            f"NMF needs activations that are never negative; at {sae.cfg.metadata.hook_name} the smallest is {lowest:.3g}. "
            "Leave out nmf."
        )
    settings: dict[str, Any] = {"n_components": sample.shape[1], "init": "nndsvda", "max_iter": 200}
    nmf: Any = MiniBatchNMF(random_state=seed, **settings)
    converged = _converges(nmf, sample)
    (components,) = _tensors(nmf.components_)
    return _unit(torch.linalg.pinv(components), components, torch.zeros(sample.shape[1])), converged


def _converges(model: Any, sample: Rows) -> bool:
    """Fit, and return whether scikit-learn says that it converged."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(sample.double().numpy())
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def _tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)).float() for array in arrays]


# --- directions as an SAE ---------------------------------------------------------------------------------------------


def _signed(encoder: Float[Tensor, "d_in n"], decoder: Float[Tensor, "n d_in"], mean: Tensor) -> Directions:
    """Return 2 n latents, v_1 .. v_n and then -v_1 .. -v_n, of components whose scores have a sign.

    Together the two reconstruct what the component does, as ReLU(s) - ReLU(-s) = s. Cunningham et al. 2023 do this for
    PCA and ICA under top-k (`to_topk_dict` in their code: the components and their negatives).
    """
    return _unit(torch.cat([encoder, -encoder], dim=1), torch.cat([decoder, -decoder], dim=0), mean)


def _unit(encoder: Float[Tensor, "d_in n"], decoder: Float[Tensor, "n d_in"], mean: Tensor) -> Directions:
    """Return the same function with decoder rows of unit norm, so that a latent's size is what it writes."""
    norm = decoder.norm(dim=-1).clamp_min(1e-12)
    return Directions(encoder * norm, decoder / norm[:, None], mean)


def _as_sae(directions: Directions, like: Any, name: str, k: int | None) -> Any:
    """Return directions as a SAELens `StandardSAE`, or with k as a `TopKSAE`, at the place `like` was trained at.

    Metadata are those of `like` with `baseline` (the name) and `baseline_of` (the weights' hash of `like`).
    """
    metadata = copy.deepcopy(like.cfg.metadata)
    for key in _EARLIER:
        metadata.__dict__.pop(key, None)
    metadata.baseline, metadata.baseline_of = name, weights_hash(like)
    n = len(directions.decoder)
    settings = {"apply_b_dec_to_input": True} | ({} if k is None else {"k": min(k, n)})
    return _sae(directions.encoder, directions.decoder, torch.zeros(n), directions.mean, like, metadata, settings)


def _sae(
    W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, like: Any, metadata: Any, settings: dict[str, Any]
) -> Any:
    from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

    d_sae, d_in = W_dec.shape
    shared = {"d_in": d_in, "d_sae": d_sae, "dtype": like.cfg.dtype, "device": str(like.device), "metadata": metadata}
    settings = shared | settings
    sae: Any = TopKSAE(TopKSAEConfig(**settings)) if "k" in settings else StandardSAE(StandardSAEConfig(**settings))
    with torch.no_grad():
        for name, values in (("W_enc", W_enc), ("W_dec", W_dec), ("b_enc", b_enc), ("b_dec", b_dec)):
            getattr(sae, name).copy_(values)
    return sae.eval()
