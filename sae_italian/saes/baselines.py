"""The decompositions that an SAE is compared with, each as a SAELens SAE, so that every tool here runs on it unchanged.

Fitted on a stream of activations, as in Cunningham et al. 2023 (arXiv 2309.08600, section 3 and appendix G):

| kind | latents | encoder and decoder |
|---|---|---|
| `pca` | 2 d_in | principal components and their negatives, centred; of any number of tokens |
| `ica` | 2 d_in | FastICA's unmixing and mixing directions and their negatives, centred |
| `nmf` | d_in | MiniBatchNMF's components H, encoder the pseudo-inverse of H; only where activations are non-negative |
| `random` | d_sae of the SAE | unit directions, tied; the decoder times the one factor that reconstructs best |
| `identity` | d_in | the neurons as they are, ReLU |

Each is there twice: with ReLU alone, as the paper's autointerp compares them, and as `KIND-topk` with top-k at the SAE's
own mean L0 (appendix G). With ReLU alone PCA and ICA reconstruct exactly but have d_in latents on at every token.
The random twin of an SAE is the other control: its own architecture with random weights, whose latents fire as often.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_italian.base.errors import UsageError, check_known
from sae_italian.saes.fit import encoded, firing_counts, mean_l0
from sae_italian.saes.loading import weights_hash

TOPK = "-topk"
KINDS = ("pca", "ica", "nmf", "random", "identity")
DEFAULT_KINDS = ("pca", "ica", "random", "identity")
FIT_TOKENS, ICA_TOKENS = 200_000, 20_000
CALIBRATION_TOKENS = 131_072  # on which the random twin is made to fire as often as the SAE
_LEAST = 2  # tokens per dimension
_LATENTS = 128  # whose pre-activations on all calibration tokens are held at a time
Rows = Float[Tensor, "tokens d_in"]

# Latents c = ReLU(encoder^T (x - mean)), x^ = c decoder + mean: encoder [d_in, n], decoder [n, d_in], mean [d_in], and
# whether the fit converged.
Directions = tuple[Tensor, Tensor, Tensor, bool]


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
    check_known("baseline", KINDS, *kinds)
    if sae.cfg.metadata.hook_name_out:
        raise UsageError("baselines decompose the activations of one hook; a transcoder has two. Give an SAE.")
    sample, mean, covariance = _read(activations, n_tokens, ica_tokens, sae.cfg.d_in, seed)
    k = k if k is not None else max(1, round(mean_l0(sae, sample)))
    found: dict[str, Any] = {}
    for kind in kinds:
        encoder, decoder, centre, converged = _fitted(kind, sample, mean, covariance, sae, seed)
        weights = {"W_enc": encoder, "W_dec": decoder, "b_enc": torch.zeros(len(decoder)), "b_dec": centre}
        for name, top in ((kind, {}), (kind + TOPK, {"k": min(k, len(decoder))})):
            metadata = copy.deepcopy(sae.cfg.metadata)
            for key in ("random_twin_of", "top_k_of"):  # of the making of `sae`
                vars(metadata).pop(key, None)
            metadata.baseline, metadata.baseline_of, metadata.converged = name, weights_hash(sae), converged
            baseline = _sae(weights, sae, metadata, apply_b_dec_to_input=True, **top)
            found[name] = rescaled(baseline, sample) if kind == "random" else baseline
    return found


@torch.no_grad()
def rescaled(sae: Any, sample: Rows) -> Any:
    """Multiply the decoder by the factor that reconstructs the sample best, and return the SAE.

    Tied random directions overshoot by far without.
    """
    product = square = 0.0
    for x, z in encoded(sae, sample):
        x_hat = sae.decode(z)
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
    # SAELens' rescaling multiplies activations by the norms and divides by them when it decodes: the function is the same
    same = {key: getattr(cfg, key) for key in ("apply_b_dec_to_input", "normalize_activations")}
    weights = {name: getattr(sae, name).detach().clone() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    silent = ~weights["W_dec"].any(dim=1)  # what writes nothing never fires, so that nothing is divided by a norm of 0
    weights["W_enc"][:, silent], weights["b_enc"][silent], weights["W_dec"][silent, 0] = 0, -1, 1
    return _sae(weights, sae, metadata, k=min(k, cfg.d_sae), rescale_acts_by_decoder_norm=True, **same)


# --- the random twin --------------------------------------------------------------------------------------------------


def random_twin(sae: Any, seed: int = 0, activations: Callable[[], Rows] | None = None) -> Any:
    """Return an SAE of the same class and configuration with random weights: the untrained control.

    Encoder and decoder are tied random unit directions; the decoder bias is kept, so that inputs are centred alike. Where
    a threshold or a bias decides what fires, each latent gets the bias with which it fires as often as the same latent of
    the SAE on `activations` [tokens, d_in] at its hook; a top-k needs none, and they are not asked for.
    Raises: UsageError where they are needed and not given.
    """
    twin = copy.deepcopy(sae)
    (d_sae, d_out), d_in, generator = twin.W_dec.shape, sae.cfg.d_in, torch.Generator().manual_seed(int(seed))
    with torch.no_grad():
        tied = _directions(d_sae, d_in, generator)
        twin.W_enc.copy_(tied.T)
        twin.W_dec.copy_(tied if d_out == d_in else _directions(d_sae, d_out, generator))
        if hasattr(sae.cfg, "k"):
            twin.b_enc.zero_()
        elif activations is None:
            raise UsageError(
                f"the random twin of a {sae.cfg.architecture()} SAE is calibrated on activations; none are given."
            )
        else:
            _fire_alike(twin, sae, activations())
    twin.cfg.metadata.random_twin_of = weights_hash(sae)
    return twin


def _directions(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    rows = torch.randn(n, d, generator=generator, dtype=torch.float32)  # the same ones under any default
    return torch.nn.functional.normalize(rows, dim=-1)


def _fire_alike(twin: Any, sae: Any, x: Rows) -> None:
    """Set the twin's biases so that each latent fires on as many of the tokens as the SAE's."""
    counts, bias = firing_counts(sae, x), torch.zeros(sae.cfg.d_sae)
    x = torch.cat([twin.process_sae_in(part.to(sae.device)) for part in x.split(4096)])
    for some in torch.arange(len(bias)).split(_LATENTS):
        values = (x @ twin.W_enc[:, some]).T.float().cpu().numpy()
        told = [_cutoff(row, n) for row, n in zip(values, counts[some].tolist(), strict=True)]
        bias[some] = -torch.tensor(told, dtype=bias.dtype)
    above = getattr(twin, "threshold", torch.zeros(1)).clamp(min=0).cpu()
    # a gated SAE has no b_enc; where a gate opens, its magnitude is the same pre-activation
    values = {"b_enc": bias + above, "b_gate": bias, "b_mag": bias, "r_mag": torch.zeros_like(bias)}
    for name, value in values.items():
        if getattr(twin, name, None) is not None:
            getattr(twin, name).copy_(value)


def _cutoff(values: Float[np.ndarray, " tokens"], count: int) -> float:
    """Return a number above which `count` of the values lie: just under the last of them.

    On other tokens a share of about count / tokens is above it. Above all of them, by their spread, where it is 0.
    """
    n = len(values)
    last, after, middle = (n - 1 - min(max(at, 0), n - 1) for at in (count - 1, count, n // 2))
    ordered = np.partition(values, (last, after, middle))  # these three places are as if sorted
    if 0 < count < n:
        return float(0.9 * ordered[last] + 0.1 * ordered[after])
    return float(2 * ordered[last] - ordered[middle])


# --- fitting ----------------------------------------------------------------------------------------------------------


def _read(
    activations: Rows | Iterable[Rows], n_tokens: int, n_sample: int, d_in: int, seed: int
) -> tuple[Rows, Float[Tensor, " d_in"], Float[Tensor, "d_in d_in"]]:
    """Return the first tokens as they are, and mean and covariance of all that were read."""
    if isinstance(activations, Tensor):
        order = torch.randperm(len(activations), generator=torch.Generator().manual_seed(int(seed)))
        activations = activations[order.to(activations.device)].split(8192)
    sample: list[Tensor] = []
    total, products, n = torch.zeros(d_in).double(), torch.zeros(d_in, d_in).double(), 0
    for batch in activations:
        rows = batch[: n_tokens - n].detach().float().cpu()
        if rows.shape[-1] != d_in:
            raise UsageError(f"the activations have {rows.shape[-1]} dimensions, but the SAE reads {d_in}.")
        sample.append(rows[: max(0, n_sample - n)])
        n += len(rows)
        total += rows.double().sum(0)
        products += rows.double().T @ rows.double()
        if n >= n_tokens:
            break
    if n < _LEAST * d_in:
        raise UsageError(f"{n:,} tokens are too few for baselines of {d_in} dimensions; {_LEAST * d_in:,} are needed.")
    mean = total / n
    return torch.cat(sample), mean.float(), products / n - mean.outer(mean)


def _fitted(kind: str, sample: Rows, mean: Tensor, spread: Tensor, sae: Any, seed: int) -> Directions:
    """Return the directions of a kind; those of PCA, ICA and NMF have decoder rows of unit norm.

    So a latent's size is what it writes. Where the scores of components have a sign there are 2 n latents, v_1 .. v_n and
    then -v_1 .. -v_n; together the two reconstruct what the component does, as ReLU(s) - ReLU(-s) = s. Cunningham et al.
    2023 do this for PCA and ICA under top-k (`to_topk_dict` in their code: the components and their negatives).
    """
    if kind in ("random", "identity"):
        d_in, generator = sae.cfg.d_in, torch.Generator().manual_seed(int(seed))
        rows = torch.eye(d_in) if kind == "identity" else _directions(sae.cfg.d_sae, d_in, generator)
        return rows.T, rows, torch.zeros(d_in), True
    if kind == "pca":
        decoder, converged = torch.linalg.eigh(spread).eigenvectors.flip(1).T.float(), True
        # the sign is that which makes the largest entry positive, as scikit-learn's
        decoder *= decoder.gather(1, decoder.abs().argmax(1, keepdim=True)).sign()
        encoder = decoder.T
    else:
        encoder, decoder, mean, converged = (_ica if kind == "ica" else _nmf)(sample, sae, seed)
    if kind != "nmf":
        encoder, decoder = torch.cat([encoder, -encoder], dim=1), torch.cat([decoder, -decoder], dim=0)
    norm = decoder.norm(dim=-1).clamp_min(1e-12)
    return encoder * norm, decoder / norm[:, None], mean, converged


def _ica(sample: Rows, _sae: Any, seed: int) -> Directions:
    from sklearn.decomposition import FastICA

    if torch.linalg.matrix_rank(sample.double().T.cov(), hermitian=True) < sample.shape[1]:
        raise UsageError(
            f"the activations span fewer than {sample.shape[1]} dimensions, so ICA cannot whiten them. Leave out ica."
        )
    ica: Any = FastICA(whiten="unit-variance", random_state=seed % 2**32, max_iter=200, tol=1e-3)
    converged = _converges(ica, sample)
    unmixing, mixing, mean = (torch.tensor(each).float() for each in (ica.components_, ica.mixing_, ica.mean_))
    return unmixing.T, mixing.T, mean, converged


def _nmf(sample: Rows, sae: Any, seed: int) -> Directions:
    from sklearn.decomposition import MiniBatchNMF

    if (lowest := float(sample.min())) < 0:
        raise UsageError(
            f"NMF needs activations that are never negative; at {sae.cfg.metadata.hook_name} the smallest is {lowest:.3g}. "
            "Leave out nmf."
        )
    n: Any = sample.shape[1]
    nmf: Any = MiniBatchNMF(n_components=n, init="nndsvda", max_iter=200, random_state=seed % 2**32)
    converged = _converges(nmf, sample)
    components = torch.tensor(nmf.components_).float()
    return torch.linalg.pinv(components), components, torch.zeros(n), converged


def _converges(model: Any, sample: Rows) -> bool:
    """Fit, and return whether scikit-learn says that it converged."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(sample.double().numpy())
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def _sae(weights: dict[str, Tensor], like: Any, metadata: Any, **settings: Any) -> Any:
    """Return weights as a SAELens `StandardSAE`, or with a `k` as a `TopKSAE`, of the kind of numbers that `like` has."""
    from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

    settings |= dict(zip(("d_sae", "d_in"), weights["W_dec"].shape, strict=True))
    settings |= {"dtype": like.cfg.dtype, "device": str(like.device), "metadata": metadata}
    sae: Any = TopKSAE(TopKSAEConfig(**settings)) if "k" in settings else StandardSAE(StandardSAEConfig(**settings))
    sae.load_state_dict(weights)
    return sae.eval()
