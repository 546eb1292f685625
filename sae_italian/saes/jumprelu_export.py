"""TopK to JumpReLU after training, as Llama Scope does it (arXiv 2410.20526, section 2.4).

TopK compares the latents of one token with each other; JumpReLU compares each with one number, the same for all tokens,
chosen so that on average k latents fire. Decoder rows are made unit directions and the input's scale goes into the
weights, so the result reads raw activations and is a plain SAELens `jumprelu` (or `jumprelu_transcoder`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import atomic_path
from sae_italian.saes.fit import CHUNK, fit, threshold_for

CHECK_EVERY = 5
# What a transcoder becomes, without and with a skip connection.
_TRANSCODERS = {False: "jumprelu_transcoder", True: "jumprelu_skip_transcoder"}


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
    raw = _on_raw_activations(sae, x)
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
    if out.exists():
        out.rmdir()
    with atomic_path(out) as temporary:
        sae.save_model(temporary)
    return out


def check_free(out: str | Path) -> Path:
    """Return the folder if nothing would be overwritten in it. Raises: UsageError otherwise."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already and not empty. Give another --out.")
    return out


def _on_raw_activations(sae: Any, x: Tensor) -> Any:
    """Return a float32 copy that reads raw activations; an input scale is sqrt(d_in) over the mean norm of x."""
    from sae_lens import SAE

    copied = SAE.from_dict(sae.cfg.to_dict())
    copied.load_state_dict(sae.state_dict())
    copied = copied.to(dtype=torch.float32)
    if copied.cfg.normalize_activations == "expected_average_only_in":
        mean_norm = x.float().norm(dim=-1).mean().item()
        copied.fold_activation_norm_scaling_factor(copied.cfg.d_in**0.5 / mean_norm)
    return copied.eval()


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
