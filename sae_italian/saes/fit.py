"""What an SAE does on activations: its latents, what it writes, how well that fits; and a TopK made a JumpReLU by it.

Shapes: x [tokens, d_in] the SAE's input, y [tokens, d_out] its target (x itself for an SAE), z [tokens, d_sae] latents.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import atomic_path

CHUNK = 256  # tokens encoded at once: 65,536 latents of them are 67 MB
CHECK_EVERY = 5  # of the tokens of an export: every fifth checks the threshold that the others set
# What a transcoder becomes, without and with a skip connection.
_TRANSCODERS = {False: "jumprelu_transcoder", True: "jumprelu_skip_transcoder"}


class Fit(NamedTuple):
    """How well y is explained; means over the tokens."""

    explained_variance: float  # centred: 1 - sum|y - y^|^2 / sum|y - mean|^2
    explained_variance_uncentred: float  # 1 - sum|y - y^|^2 / sum|y|^2
    l0: float
    dead: float  # share of latents that never fired


def encoded(sae: Any, x: Float[Tensor, "tokens d_in"]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield x, where the SAE is, and its latents, dense, a few tokens at a time."""
    for part in x.split(CHUNK):
        part = part.to(sae.device, sae.dtype)
        z = sae.encode(part)
        yield part, z.to_dense() if z.is_sparse else z


def decoded(sae: Any, z: Tensor, x: Tensor) -> Tensor:
    """Return what the SAE writes for latents z read from x: decode, and a transcoder's skip connection where it has one."""
    skip = getattr(sae, "W_skip", None)
    return sae.decode(z) if skip is None else sae.decode(z) + x @ skip.T


@torch.no_grad()
def fit(sae: Any, x: Tensor, y: Tensor, scale: float = 1.0) -> Fit:
    """Return how well sae(scale * x) / scale explains y; the output of one that writes elsewhere is not scaled back."""
    error, n_active, fired = 0.0, 0, 0
    metadata = sae.cfg.metadata
    elsewhere = metadata.hook_name_out not in (None, metadata.hook_name) or x.shape != y.shape
    out_scale = 1.0 if elsewhere else scale
    for (part, z), target in zip(encoded(sae, x * scale), y.split(CHUNK), strict=True):
        y_hat = decoded(sae, z, part) / out_scale
        error += (target.to(y_hat.device) - y_hat).double().pow(2).sum().item()
        n_active += int(z.count_nonzero())
        fired = fired | (z != 0).any(0)
    return Fit(*explained(error, y), n_active / len(x), 1 - torch.as_tensor(fired).double().mean().item())


def explained(error: float, y: Float[Tensor, "tokens d_out"]) -> tuple[float, float]:
    """Return centred and uncentred explained variance of an error, the squares summed over all of y."""
    wide = y.double()
    return 1 - error / (wide - wide.mean(0)).pow(2).sum().item(), 1 - error / wide.pow(2).sum().item()


@torch.no_grad()
def firing_counts(sae: Any, x: Float[Tensor, "tokens d_in"]) -> Int[Tensor, " d_sae"]:
    """Return on how many of the tokens each latent fires."""
    counts = torch.zeros(sae.cfg.d_sae, dtype=torch.long, device=sae.device)
    for _, z in encoded(sae, x):
        counts += (z != 0).sum(0)
    return counts


def mean_l0(sae: Any, x: Float[Tensor, "tokens d_in"]) -> float:
    """Return how many latents of an SAE are active on a token, on average."""
    return firing_counts(sae, x).sum().item() / max(len(x), 1)


@torch.no_grad()
def threshold_for(sae: Any, x: Float[Tensor, "tokens d_in"], k: float) -> float:
    """Return the number above which lie the k * tokens largest scores, or 0 when fewer than that are positive.

    Scores are the pre-activations that a top-k or a threshold compares.
    """
    norm = sae.W_dec.norm(dim=-1) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else 1.0
    wanted = max(1, round(k * len(x)))
    largest, floor = torch.empty(0), 0.0
    for part in x.split(CHUNK):
        scores = (sae.process_sae_in(part.to(sae.device)) @ sae.W_enc + sae.b_enc) * norm
        largest = torch.cat([largest, scores[scores > floor].cpu()])
        if len(largest) > 2 * wanted:
            largest = largest.topk(wanted + 1).values
            floor = largest[-1].item()
    if len(largest) <= wanted:
        return 0.0
    last = largest.topk(wanted + 1).values[-2:].double()
    return last.mean().item() if last[0] > last[1] else last[1].item()


# --- TopK to JumpReLU -------------------------------------------------------------------------------------------------
# As Llama Scope does it after training (arXiv 2410.20526, section 2.4). TopK compares the latents of one token with each
# other; JumpReLU compares each with one number, the same for all tokens, chosen so that on average k latents fire. Decoder
# rows are made unit directions and the input's scale goes into the weights, so the result reads raw activations and is a
# plain SAELens `jumprelu` (or `jumprelu_transcoder`).


@dataclass(frozen=True)
class JumpReLUExport:
    """What the export did; l0 and explained variance (centred) are over the activations that the threshold did not see."""

    threshold: float
    k: int
    n_tokens: int  # whose k * n_tokens largest latents set the threshold
    n_tokens_checked: int
    l0_before: float  # below k where fewer than k latents are positive
    l0: float
    explained_variance_before: float
    explained_variance: float
    folding_error: float  # largest change of an output by folding, over the largest output

    def text(self) -> str:
        set_by = f"so that {self.k} latents fire on average over {self.n_tokens:,} tokens"
        return (
            f"threshold           {self.threshold:.4f}, {set_by}\n"
            f"L0                  {self.l0_before:.2f} -> {self.l0:.2f} over {self.n_tokens_checked:,} other tokens\n"
            f"explained variance  {self.explained_variance_before:.4f} -> {self.explained_variance:.4f}\n"
            f"folding error       {self.folding_error:.1e}"
        )


@torch.no_grad()
def to_jumprelu(
    sae: Any, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"] | None = None
) -> tuple[Any, JumpReLUExport]:
    """Return the JumpReLU of a TopK SAE or transcoder, and what changed.

    `x` are activations at its hook: every fifth is kept for the check, the others set the threshold; `y` is a
    transcoder's target. Raises: UsageError for another architecture, or fewer than 10 tokens.
    """
    check_exportable(sae)
    if len(x) < 10:
        raise UsageError(f"{len(x)} tokens are too few to set a threshold; give 32,768 or more.")
    y = x if y is None else y
    checks = torch.arange(len(x)) % CHECK_EVERY == CHECK_EVERY - 1
    raw = copy.deepcopy(sae).to(dtype=torch.float32).eval()
    if raw.cfg.normalize_activations == "expected_average_only_in":
        raw.fold_activation_norm_scaling_factor(raw.cfg.d_in**0.5 / x.float().norm(dim=-1).mean().item())
    theta = threshold_for(raw, x[~checks], sae.cfg.k)
    unfolded, folded = _with_threshold(raw, theta), _with_threshold(raw, theta)
    folded.fold_W_dec_norm()
    before, after = (fit(each, x[checks], y[checks]) for each in (raw, folded))
    report = JumpReLUExport(
        threshold=theta,
        k=sae.cfg.k,
        n_tokens=int((~checks).sum()),
        n_tokens_checked=int(checks.sum()),
        l0_before=before.l0,
        l0=after.l0,
        explained_variance_before=before.explained_variance,
        explained_variance=after.explained_variance,
        folding_error=_largest_change(unfolded, folded, x[checks]),
    )
    folded.cfg.metadata.jumprelu_export = asdict(report)
    folded.cfg.metadata.l0 = report.l0
    return folded, report


def check_exportable(sae: Any) -> None:
    """Raise UsageError for an architecture that has no k."""
    architecture = sae.cfg.architecture()
    if architecture not in ("topk", "topk_transcoder"):
        raise UsageError(
            f"the SAE's architecture is {architecture!r}; only topk and topk_transcoder have a k to make a threshold of."
        )


def save_sae(sae: Any, out: str | Path) -> Path:
    """Write an SAE in SAELens' format to a new folder. Raises: UsageError when the folder is there and not empty."""
    out = check_free(out)
    with atomic_path(out) as temporary:
        sae.save_model(temporary)
    return out


def check_free(out: str | Path) -> Path:
    """Return the folder if nothing would be overwritten in it. Raises: UsageError otherwise."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already and not empty. Give another --out.")
    return out


def _with_threshold(sae: Any, theta: float) -> Any:
    """Return a JumpReLU SAE of the same weights, in which a latent fires when its score is above theta."""
    from sae_lens import SAE

    values, state = sae.cfg.to_dict(), sae.state_dict()
    rescaled, architecture = values.pop("rescale_acts_by_decoder_norm", False), values["architecture"]
    skips = bool("W_skip" in state and state["W_skip"].any())
    if not skips:
        state.pop("W_skip", None)
    values["architecture"] = "jumprelu" if architecture == "topk" else _TRANSCODERS[skips]
    values["metadata"] = {**sae.cfg.metadata.to_dict(), "k": values.pop("k"), "exported_from": architecture}
    jumprelu = SAE.from_dict(values)
    norm = sae.W_dec.norm(dim=-1).clamp(min=1e-8)
    state["threshold"] = theta / norm if rescaled else torch.full_like(norm, theta)
    jumprelu.load_state_dict(state)
    return jumprelu.eval()


def _largest_change(before: Any, after: Any, x: Tensor) -> float:
    """Return how far the outputs of two SAEs are apart at most, over the largest of the first."""
    difference, largest = 0.0, 1e-12
    for part in x.split(CHUNK):
        one, other = (sae(part.to(sae.device, torch.float32)) for sae in (before, after))
        largest = max(largest, one.abs().max().item())
        difference = max(difference, (one - other).abs().max().item())
    return difference / largest
