"""TopK to JumpReLU after training, as Llama Scope does it (arXiv 2410.20526, section 2.4).

TopK compares the latents of one token with each other; JumpReLU compares each with one number, the same for all tokens,
chosen so that on average k latents fire. Decoder rows are made unit directions and the input's scale goes into the
weights, so the result reads raw activations and is a plain SAELens `jumprelu` (or `jumprelu_transcoder`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import atomic_path

CHUNK = 256  # tokens encoded at once: 65,536 latents of them are 67 MB
CHECK_EVERY = 5
TOPK_TRANSCODER = "topk_transcoder"  # its module imports SAELens, which takes seconds


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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        return "\n".join(
            [
                f"threshold           {self.threshold:.4f}, so that {self.k} latents fire on average over {self.n_tokens:,} tokens",
                f"L0                  {self.l0_before:.2f} -> {self.l0:.2f} over {self.n_tokens_checked:,} other tokens",
                f"explained variance  {self.explained_variance_before:.4f} -> {self.explained_variance:.4f}",
                f"folding error       {self.folding_error:.1e}",
            ]
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
    theta = _threshold(raw, x[~checks])
    unfolded, folded = _with_threshold(raw, theta), _with_threshold(raw, theta)
    folded.fold_W_dec_norm()
    before, after = (_measure(each, x[checks], y[checks]) for each in (raw, folded))
    report = JumpReLUExport(
        threshold=theta,
        k=sae.cfg.k,
        n_tokens=int((~checks).sum()),
        n_tokens_checked=int(checks.sum()),
        l0_before=before[0],
        l0=after[0],
        explained_variance_before=before[1],
        explained_variance=after[1],
        folding_error=_largest_difference(unfolded, folded, x[checks]),
    )
    folded.cfg.metadata.jumprelu_export = report.as_dict()
    folded.cfg.metadata.l0 = report.l0
    return folded, report


def check_exportable(sae: Any) -> None:
    """Raise UsageError for an architecture that has no k."""
    architecture = sae.cfg.architecture()
    if architecture not in ("topk", TOPK_TRANSCODER):
        raise UsageError(
            f"the SAE's architecture is {architecture!r}; only topk and {TOPK_TRANSCODER} have a k to make a threshold of."
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


def _scores(sae: Any, x: Tensor) -> Iterator[Float[Tensor, "chunk d_sae"]]:
    """Yield what TopK compares, chunk by chunk."""
    norm = sae.W_dec.norm(dim=-1) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else 1.0
    for part in x.split(CHUNK):
        yield (sae.process_sae_in(part.to(sae.device)) @ sae.W_enc + sae.b_enc) * norm


def _threshold(sae: Any, x: Tensor) -> float:
    """Return the number above which lie the k * tokens largest scores, or 0 when fewer than that are positive."""
    wanted = sae.cfg.k * len(x)
    largest, floor = torch.empty(0), 0.0
    for scores in _scores(sae, x):
        largest = torch.cat([largest, scores[scores > floor].cpu()])
        if len(largest) > 2 * wanted:
            largest = largest.topk(wanted + 1).values
            floor = largest[-1].item()
    if len(largest) <= wanted:
        return 0.0
    last = largest.topk(wanted + 1).values[-2:].double()
    return last.mean().item() if last[0] > last[1] else last[1].item()


def _with_threshold(sae: Any, theta: float) -> Any:
    """Return a JumpReLU SAE of the same weights, in which a latent fires when its score is above theta."""
    from sae_lens import SAE

    skips = getattr(sae, "W_skip", None)
    skips = skips is not None and bool(skips.any())
    values = {
        key: value for key, value in sae.cfg.to_dict().items() if key not in ("k", "rescale_acts_by_decoder_norm")
    }
    values["architecture"] = "jumprelu"
    if sae.cfg.architecture() == TOPK_TRANSCODER:
        values["architecture"] = "jumprelu_skip_transcoder" if skips else "jumprelu_transcoder"
    values["metadata"] = {**sae.cfg.metadata.to_dict(), "k": sae.cfg.k, "exported_from": sae.cfg.architecture()}
    jumprelu = SAE.from_dict(values)
    state = {name: tensor for name, tensor in sae.state_dict().items() if name != "W_skip" or skips}
    norm = sae.W_dec.norm(dim=-1).clamp(min=1e-8)
    rescaled = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    state["threshold"] = theta / norm if rescaled else torch.full_like(norm, theta)
    jumprelu.load_state_dict(state)
    return jumprelu.eval()


def _measure(sae: Any, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return L0 and centred explained variance."""
    error = l0 = 0.0
    for part_x, part_y in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        error += (part_y - _output(sae, part_x)).double().pow(2).sum().item()
        l0 += (sae.encode(part_x) != 0).sum().item()
    wide = y.double()
    return l0 / len(x), 1 - error / (wide - wide.mean(0)).pow(2).sum().item()


def _output(sae: Any, x: Tensor) -> Tensor:
    return sae(x.to(sae.device, torch.float32))


def _largest_difference(a: Any, b: Any, x: Tensor) -> float:
    pairs = [(_output(a, part), _output(b, part)) for part in x.split(CHUNK)]
    largest = max(first.abs().max().item() for first, _ in pairs)
    return max((first - second).abs().max().item() for first, second in pairs) / max(largest, 1e-12)
