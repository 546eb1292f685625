"""Feature patching of several dictionaries on the same pairs: curves, single effects and their first-order estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from sae_italian.analysis.causal.patching import Patcher, Point, eliminate, patch_inputs
from sae_italian.analysis.causal.splice import edit_hooks
from sae_italian.base import pictures
from sae_italian.base.errors import UsageError
from sae_italian.base.report import plain, table
from sae_italian.base.statistics import Estimate, mean_interval

N_THRESHOLDS = 50
TOP = 20
REACHED = (0.5, 0.1)  # of the KL without any patch
_HEAD = (
    "dictionary | candidates | KL unpatched | KL all patched | patches (edit) for half the KL | for a tenth | Spearman"
)


def thresholds(n: int = N_THRESHOLDS) -> tuple[float, ...]:
    """Return n thresholds in nats, from 1e-5 to 1 evenly in the logarithm: the paper's code has 50."""
    return tuple(np.logspace(-5, 0, n).tolist())


@dataclass(frozen=True)
class Effect:
    """By how many nats patching one latent alone lowers the mean KL, measured and by gradient times difference."""

    latent: int
    exact: float
    attribution: float


@dataclass(frozen=True)
class PatchingCurve:
    """What patching one dictionary's latents does. KL in nats, means over pairs with intervals over pairs."""

    name: str
    hook_name: str
    d_sae: int
    n_candidates: int  # latents that differ between the runs
    unpatched: Estimate
    all_patched: Estimate  # what is left is the difference of the two reconstruction errors
    points: tuple[Point, ...]
    order: tuple[int, ...]  # latents, the most important first
    effects: tuple[Effect, ...]  # the largest exact ones
    spearman: float | None  # of exact effects and attributions over all candidates; None where one of them is constant

    def reached(self, share: float) -> Point | None:
        """Return the point with the fewest patches whose KL is at most `share` of the unpatched one."""
        enough = [point for point in self.points if point.kl.value <= share * self.unpatched.value]
        return min(enough, key=lambda point: point.n_patched, default=None)


@dataclass(frozen=True)
class Patching:
    """The curves of several dictionaries on one task."""

    n_pairs: int
    curves: tuple[PatchingCurve, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON, with the number of patches and the edit's size at which a share is reached."""
        value = plain(self)
        for found, curve in zip(value["curves"], self.curves, strict=True):
            points = {str(share): curve.reached(share) for share in REACHED}
            found["reached"] = {share: point and [point.n_patched, point.magnitude] for share, point in points.items()}
        return value

    def table(self) -> str:
        """Return a Markdown table, a row per dictionary."""
        rows = []
        for curve in self.curves:
            points = [curve.reached(share) for share in REACHED]
            patches = [f"{point.n_patched} ({point.magnitude:.2f})" if point else "never" for point in points]
            spearman = "" if curve.spearman is None else f"{curve.spearman:.2f}"
            kl = f"{curve.unpatched.value:.2f}", f"{curve.all_patched.value:.3f}"
            rows.append((curve.name, curve.n_candidates, *kl, *patches, spearman))
        return table(_HEAD, rows)

    def svg(self) -> str:
        """Return the paper's figure 3: KL against the number of patches and against the edit's size, and the effects."""
        return pictures.svg(self._draw, 3, (13, 4))

    def _draw(self, axes: Any) -> None:
        colours = [pictures.OURS, *(f"C{number}" for number in range(1, 10))]
        for number, curve in enumerate(self.curves):
            colour = colours[number % len(colours)]
            points = [point for point in curve.points if point.n_patched]
            kl, low, high = zip(*(point.kl for point in points), strict=True) if points else ((), (), ())
            for axis, x in ((axes[0], [p.n_patched for p in points]), (axes[1], [p.magnitude for p in points])):
                axis.plot(x, kl, "o-", markersize=3, color=colour, label=curve.name)
                axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            label = curve.name if curve.spearman is None else f"{curve.name}: {curve.spearman:.2f}"
            effects = [(effect.attribution, effect.exact) for effect in curve.effects]
            axes[2].scatter(*np.reshape(effects, (-1, 2)).T, s=10, color=colour, label=label)
        for axis, label in ((axes[0], "patched latents"), (axes[1], "mean edit |x' - x|")):
            unpatched = self.curves[0].unpatched.value
            axis.axhline(unpatched, color=pictures.REFERENCE, linestyle=":", linewidth=1)
            axis.set(xlabel=label, ylabel="KL(patched || counterfactual), nats")
        axes[0].set_xscale("log")
        axes[0].legend(frameon=False, fontsize=8)
        axes[2].set(xlabel="gradient times difference, nats", ylabel="exact fall of the KL, nats")
        axes[2].legend(frameon=False, fontsize=8, title="Spearman, all latents", title_fontsize=8)


def patch_saes(
    model: Any,
    tokenizer: Any,
    saes: Mapping[str, Any],
    pairs: Sequence[Any],
    *,
    thresholds: Sequence[float] = thresholds(),  # noqa: B008
    seed: int = 0,
) -> Patching:
    """Return what patching each named dictionary does on the pairs (`IoiPair`, or tuples of base and counterfactual).

    Anything with SAELens' `encode`, `decode` and `cfg` is a dictionary: SAEs, and the baselines of `saes.baselines`.
    Raises: UsageError when there is none, when they do not write at the same hook, and as `patch_inputs`.
    """
    if not saes:
        raise UsageError("there is no SAE to patch. Give at least one.")
    hooks = {name: edit_hooks(sae, model)[1] for name, sae in saes.items()}
    first = next(iter(hooks))
    for name, hook in hooks.items():
        if hook != hooks[first]:
            raise UsageError(
                f"{first} writes at {hooks[first]}, {name} at {hook}; edits compare at one place only. "
                "Give SAEs of the same hook, or run once for each."
            )
    inputs = patch_inputs(tokenizer, model, pairs)
    curves = [_curve(name, Patcher(model, sae, inputs), thresholds, seed) for name, sae in saes.items()]
    return Patching(len(inputs.base), tuple(curves))


def _curve(name: str, patcher: Patcher, thresholds: Sequence[float], seed: int) -> PatchingCurve:
    exact, attribution = patcher.effects().numpy(), patcher.attribution().numpy()
    found = eliminate(patcher, thresholds, seed=seed)
    largest = np.argsort(-exact, kind="stable")[:TOP]
    varies = len(exact) > 1 and np.ptp(exact) > 0 and np.ptp(attribution) > 0
    return PatchingCurve(
        name=name,
        hook_name=patcher.hook_out,
        d_sae=int(patcher.sae.cfg.d_sae),
        n_candidates=len(exact),
        unpatched=mean_interval(patcher.unpatched.double().cpu().numpy()),
        all_patched=found.points[0].kl,
        points=found.points,
        order=found.order,
        effects=tuple(Effect(int(patcher.candidates[i]), float(exact[i]), float(attribution[i])) for i in largest),
        spearman=float(np.asarray(spearmanr(exact, attribution))[0]) if varies else None,
    )
