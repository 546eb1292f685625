"""A TopK SAE or transcoder as SAELens' JumpReLU: with one threshold for all latents, or with one fitted to each.

TopK compares the latents of one token with each other; JumpReLU compares each with its own number, the same for all
tokens, so rich tokens keep many latents and poor ones few. Decoder rows become unit directions and the input's scale goes
into the weights, so the result reads raw activations and is a plain `jumprelu` (or `jumprelu_transcoder`). Thresholds are

one         the number above which k latents lie per token on average (Llama Scope, arXiv 2410.20526, section 2.4);
calibrated  from there each latent's in turn is put where the squared error, and a price for each firing, is least on the
            calibration tokens, all others as they are: an exact search over the sorted tokens, without a step size. The
            price is moved between sweeps, and at last all thresholds by one factor, so that k fire on average.

What loses most is that a TopK's bar, the k-th largest pre-activation, is higher for some tokens than for others. It is
nearly linear in x (R^2 0.78 on ita-5m, layer 2), so the search may take a multiple of that linear function off a latent's
pre-activation, which moves its encoder; it also fits a gain to each latent and, at last, b_dec. Decoder rows stay.

Shapes: x [tokens, d_in] the SAE's input, y [tokens, d_out] its target (x itself for an SAE).
"""

import copy
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_italian.base.errors import UsageError, check_known
from sae_italian.base.pace import paced
from sae_italian.saes.fit import CHUNK, fit, threshold_for

CHECK_EVERY = 5  # of the documents: every fifth checks the thresholds that the others set
SWEEPS = 4  # over all latents; twice as many explain less than 0.01 more
TILTS = (0.0, 0.3, -0.3)  # what a sweep may take off a latent, times the token's own level
PRIOR = 5  # firings for which a latent's gain is 1
NOTED = ("l0", "explained_variance", "dead")  # of an export, before and after
BLOCK = 128  # latents whose pre-activations are held at once, for all tokens
Thresholds = Literal["calibrated", "one"]


def export_text(report: dict[str, Any]) -> str:
    """Return in four lines what an export did, as `to_jumprelu` noted it."""
    lines = (
        "thresholds          {thresholds}: {threshold:.4f}, so that {k} latents fire on average over {n_tokens:,} tokens",
        "L0                  {l0_before:.2f} -> {l0:.2f} over {n_tokens_checked:,} tokens of other documents",
        "explained variance  {explained_variance_before:.4f} -> {explained_variance:.4f} ({kept:.1%})",
        "dead latents        {dead_before:.1%} -> {dead:.1%}",
    )
    kept = report["explained_variance"] / report["explained_variance_before"]
    return "\n".join(lines).format(**report, kept=kept)


@torch.no_grad()
def to_jumprelu(
    sae: Any,
    x: Float[Tensor, "tokens d_in"],
    y: Float[Tensor, "tokens d_out"] | None = None,
    *,
    documents: Int[Tensor, " tokens"] | None = None,
    thresholds: Thresholds = "calibrated",
) -> Any:
    """Return the JumpReLU of a TopK SAE or transcoder; what changed is noted as `metadata.jumprelu_export`.

    `x` are activations at its hook, `y` a transcoder's target, `documents` the number of each token's document: every
    fifth document (without the numbers: every fifth token) is kept for the check, the others set the thresholds. Noted
    are `threshold` (of all latents, or the median of theirs), the tokens that set it (`n_tokens`) and that checked it,
    and of these L0 (before: below k where fewer latents are positive), centred explained variance, and the share of
    latents that never fired.
    Raises: UsageError for another architecture, fewer than 10 tokens, arrays of other lengths, a check that would have no
    token, or thresholds of each latent where the SAE rescales each token.
    """
    check_exportable(sae)
    check_known("thresholds", get_args(Thresholds), thresholds)
    y = x if y is None else y
    checks = _checks(x, y, documents)
    raw = copy.deepcopy(sae).to(dtype=torch.float32).eval()
    if raw.cfg.normalize_activations == "expected_average_only_in":
        raw.fold_activation_norm_scaling_factor(raw.cfg.d_in**0.5 / x.float().norm(dim=-1).mean().item())
    if thresholds == "calibrated" and (mode := raw.cfg.normalize_activations) != "none":
        raise UsageError(f"normalize_activations is {mode!r}: each token has a scale of its own. Use thresholds=one.")
    theta = threshold_for(raw, x[~checks], sae.cfg.k)
    folded = _with_threshold(raw, theta)
    folded.fold_W_dec_norm()
    if thresholds == "calibrated" and theta > 0:  # 0: all positive latents fire, and they are fewer than k
        calibrate(folded, x[~checks], y[~checks], sae.cfg.k)
    fits = {end: fit(each, x[checks], y[checks]) for end, each in (("_before", raw), ("", folded))}
    folded.cfg.metadata.jumprelu_export = {
        "thresholds": thresholds,
        "threshold": theta if thresholds == "one" else folded.threshold.median().item(),
        "k": sae.cfg.k,
        "n_tokens": int((~checks).sum()),
        "n_tokens_checked": int(checks.sum()),
        **{name + end: getattr(found, name) for end, found in fits.items() for name in NOTED},
    }
    folded.cfg.metadata.l0 = fits[""].l0
    return folded


def check_exportable(sae: Any) -> None:
    """Raise UsageError for an architecture that has no k."""
    architecture = sae.cfg.architecture()
    if architecture not in ("topk", "topk_transcoder"):
        raise UsageError(
            f"the SAE's architecture is {architecture!r}; only topk and topk_transcoder have a k to make a threshold of."
        )


def _checks(x: Tensor, y: Tensor, documents: Tensor | None) -> Bool[Tensor, " tokens"]:
    """Return which tokens check the thresholds: those of every fifth document. Raises: UsageError as `to_jumprelu`."""
    if len(x) < 10:
        raise UsageError(f"{len(x)} tokens are too few to set a threshold; give 32,768 or more.")
    numbers = torch.arange(len(x)) if documents is None else documents.unique(return_inverse=True)[1]
    if not len(x) == len(y) == len(numbers):
        raise UsageError(f"x has {len(x)} rows, y {len(y)}, documents {len(numbers)}; all need as many.")
    checks = numbers % CHECK_EVERY == CHECK_EVERY - 1
    if not checks.any():
        n = int(numbers.max()) + 1
        raise UsageError(f"the tokens are of {n} documents; at least {CHECK_EVERY} are needed. Ask for more tokens.")
    return checks


def _with_threshold(sae: Any, theta: float) -> Any:
    """Return a JumpReLU SAE of the same weights, in which a latent fires when its score is above theta."""
    from sae_lens import SAE

    values, state = sae.cfg.to_dict(), sae.state_dict()
    rescaled, architecture = values.pop("rescale_acts_by_decoder_norm", False), values["architecture"]
    skips = bool("W_skip" in state and state["W_skip"].any())
    if not skips:
        state.pop("W_skip", None)
    transcoder = "jumprelu_skip_transcoder" if skips else "jumprelu_transcoder"
    values["architecture"] = "jumprelu" if architecture == "topk" else transcoder
    values["metadata"] = {**sae.cfg.metadata.to_dict(), "k": values.pop("k"), "exported_from": architecture}
    jumprelu, norm = SAE.from_dict(values), sae.W_dec.norm(dim=-1).clamp(min=1e-8)
    state["threshold"] = theta / norm if rescaled else torch.full_like(norm, theta)
    jumprelu.load_state_dict(state)
    return jumprelu.eval()


# --- one threshold for each latent --------------------------------------------------------------------------------------


@torch.no_grad()
def calibrate(sae: Any, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], k: int) -> None:
    """Fit the encoder of a JumpReLU with unit decoder rows to y, at k latents per token; decoder rows stay as they are.

    `sae` is changed: threshold, W_enc, b_enc and b_dec. The search starts at the thresholds that are there, and costs
    about SWEEPS * tokens * d_sae * (d_in + 2 d_out) multiplications and the sorting of as many numbers as fire.
    """
    x, y = x.to(sae.device, torch.float32), y.to(sae.device, torch.float32)
    search = _Search(sae, x, y, k)
    price = sae.threshold.pow(2).mean().item()  # worth of a firing at the threshold, nothing overlapping
    generator = torch.Generator().manual_seed(0)
    for _ in range(SWEEPS):
        blocks = torch.randperm(sae.cfg.d_sae, generator=generator).to(sae.device).split(BLOCK)
        fired = sum(search.place(latents, price) for latents in paced(blocks, "thresholds", len(blocks), "block"))
        price *= fired / (k * len(x))
    sae.threshold *= threshold_for(sae, x, k, 1 / sae.threshold.clamp(min=1e-6))
    moved = _rest(sae, x, y).mean(0)
    if sae.cfg.apply_b_dec_to_input:  # pre-activations stay
        sae.b_enc += moved @ sae.W_enc
    sae.b_dec += moved


def _rest(sae: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([target - sae(part) for part, target in zip(x.split(CHUNK), y.split(CHUNK), strict=True)])


class _Search:
    """Sets thresholds, gains and tilts of some latents at a time; `rest`, y less what is written, is kept up."""

    def __init__(self, sae: Any, x: Tensor, y: Tensor, k: int):
        self.sae, self.x, self.rest = sae, sae.process_sae_in(x), _rest(sae, x, y)
        bar = [(part @ sae.W_enc + sae.b_enc).topk(k + 1).values[:, -1] for part in self.x.split(CHUNK)]
        mean, bar = self.x.mean(0), torch.cat(bar)
        centred = self.x - mean
        square = centred.T @ centred
        square.diagonal().add_(1e-4 * square.diagonal().mean())  # for fewer tokens than dimensions
        self.slope = torch.linalg.solve(square, centred.T @ (bar - bar.mean()))
        self.offset = -(mean @ self.slope)
        self.level = self.x @ self.slope + self.offset  # of a token: how far its TopK's threshold is above the mean one

    def place(self, latents: Int[Tensor, " block"], price: float) -> int:
        """Set some latents, one after the other, where the error is least, and return how often they fire."""
        sae, fired = self.sae, 0
        h = self.x @ sae.W_enc[:, latents] + sae.b_enc[latents]
        rows = sae.W_dec[latents]
        along, overlaps, change = self.rest @ rows.T, rows @ rows.T, torch.zeros_like(h)
        for j, latent in enumerate(latents.tolist()):
            now = torch.where(h[:, j] > sae.threshold[latent], h[:, j], 0.0)
            goal = along[:, j] + now  # what all the others leave for this one
            wide = min(2 * int((now > 0).sum()) + 64, len(h) - 1)  # firings at most double in a sweep
            tilted = torch.stack([h[:, j] - tilt * self.level for tilt in TILTS])
            best, gain, threshold, token, value = _best_cut(tilted, goal, wide, price)
            sae.W_enc[:, latent] = gain * (sae.W_enc[:, latent] - TILTS[best] * self.slope)
            sae.b_enc[latent] = gain * (sae.b_enc[latent] - TILTS[best] * self.offset)
            sae.threshold[latent] = gain * threshold
            moved = -now
            moved[token] += gain * value
            change[:, j], touched = moved, moved.nonzero()[:, 0]
            along[touched] -= moved[touched, None] * overlaps[j]
            fired += len(token)
        self.rest -= change @ rows
        return fired


def _best_cut(
    h: Float[Tensor, "tilts tokens"], goal: Float[Tensor, " tokens"], wide: int, price: float
) -> tuple[int, float, float, Int[Tensor, " fired"], Float[Tensor, " fired"]]:
    """Return with which tilt, gain and threshold a latent writes `goal` best, on which tokens it fires then, and their h.

    It fires on some of the `wide` largest h of a tilt, at `price` a firing: the n largest, times the gain that fits best,
    lower the squared error by (sum of h goal)^2 / sum of h^2.
    """
    value, token = h.topk(wide + 1)
    dot, square = (value * goal[token]).cumsum(-1), value.pow(2).cumsum(-1).clamp(min=1e-12)
    n = torch.arange(1, wide + 2, device=h.device)
    worth = torch.where((dot > 0) & (value > 0), dot.pow(2) / square, 0.0) - price * n
    tilt, last = divmod(int(worth[:, :wide].argmax()), wide)
    if worth[tilt, last] <= 0:
        return 0, 1.0, max(0.0, value[0, 0].item()), token[0, :0], value[0, :0]
    threshold = max(0.0, value[tilt, last : last + 2].mean().item())
    prior = PRIOR * square[tilt, last] / n[last]
    gain = ((dot[tilt, last] + prior) / (square[tilt, last] + prior)).item()
    return tilt, gain, threshold, token[tilt, : last + 1], value[tilt, : last + 1]
