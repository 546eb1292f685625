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
TOPK_TRANSCODER = "topk_transcoder"  # the module that has it imports SAELens, which takes seconds


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
        set_by = f"so that {self.k} latents fire on average over {self.n_tokens:,} tokens"
        l0, explained = (self.l0_before, self.l0), (self.explained_variance_before, self.explained_variance)
        return (
            f"threshold           {self.threshold:.4f}, {set_by}\n"
            f"L0                  {l0[0]:.2f} -> {l0[1]:.2f} over {self.n_tokens_checked:,} other tokens\n"
            f"explained variance  {explained[0]:.4f} -> {explained[1]:.4f}\n"
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
    theta = _threshold(raw, x[~checks])
    unfolded, folded = _with_threshold(raw, theta), _with_threshold(raw, theta)
    folded.fold_W_dec_norm()
    l0, explained, folding_error = _compare(raw, unfolded, folded, x[checks], y[checks])
    report = JumpReLUExport(
        threshold=theta,
        k=sae.cfg.k,
        n_tokens=int((~checks).sum()),
        n_tokens_checked=int(checks.sum()),
        l0_before=l0[0],
        l0=l0[1],
        explained_variance_before=explained[0],
        explained_variance=explained[1],
        folding_error=folding_error,
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

    W_skip = getattr(sae, "W_skip", None)
    skips, rescaled = W_skip is not None and bool(W_skip.any()), getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    values = sae.cfg.to_dict()
    architecture = values["architecture"]
    for key in ("k", "rescale_acts_by_decoder_norm"):
        values.pop(key, None)
    values["architecture"] = "jumprelu"
    if architecture == TOPK_TRANSCODER:
        values["architecture"] = "jumprelu_skip_transcoder" if skips else "jumprelu_transcoder"
    values["metadata"] = {**sae.cfg.metadata.to_dict(), "k": sae.cfg.k, "exported_from": architecture}
    jumprelu = SAE.from_dict(values)
    state = {name: tensor for name, tensor in sae.state_dict().items() if name != "W_skip" or skips}
    norm = sae.W_dec.norm(dim=-1).clamp(min=1e-8)
    state["threshold"] = theta / norm if rescaled else torch.full_like(norm, theta)
    jumprelu.load_state_dict(state)
    return jumprelu.eval()


def _compare(raw: Any, unfolded: Any, folded: Any, x: Tensor, y: Tensor) -> tuple[list[float], list[float], float]:
    """Return L0 and centred explained variance of `raw` and `folded`, and how far the latter's output is from `unfolded`'s."""
    errors, active, largest, difference = [0.0, 0.0], [0, 0], 1e-12, 0.0
    for part_x, part_y in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        part_x = part_x.to(raw.device, torch.float32)
        outputs = [sae(part_x) for sae in (raw, folded, unfolded)]
        for i, sae in enumerate((raw, folded)):
            errors[i] += (part_y - outputs[i]).double().pow(2).sum().item()
            active[i] += int((sae.encode(part_x) != 0).sum())
        largest = max(largest, outputs[2].abs().max().item())
        difference = max(difference, (outputs[1] - outputs[2]).abs().max().item())
    variance = (y.double() - y.double().mean(0)).pow(2).sum().item()
    return [n / len(x) for n in active], [1 - error / variance for error in errors], difference / largest
