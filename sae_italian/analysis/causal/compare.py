"""Feature patching of several dictionaries on the same pairs: curves, single effects and their first-order estimate."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from sae_italian.analysis.causal.elimination import Point, eliminate
from sae_italian.analysis.causal.patching import BATCH_ROWS, Patcher, patch_inputs
from sae_italian.analysis.causal.splice import hooks_of
from sae_italian.base import pictures
from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import Estimate, mean_interval

N_THRESHOLDS = 50
TOP = 20
REACHED = (0.5, 0.1)  # of the KL without any patch


def thresholds(n: int = N_THRESHOLDS) -> tuple[float, ...]:
    """Return n thresholds in nats, from 1e-5 to 1 evenly in the logarithm: the paper's code has 50."""
    return tuple(np.logspace(-5, 0, n).tolist())


THRESHOLDS = thresholds()


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
    visits: int
    prompt_forwards: int
    original_prompt_forwards: int  # what one visit at a time, all prompts each, would take
    passes: int
    seconds: float

    def reached(self, share: float) -> Point | None:
        """Return the point with the fewest patches whose KL is at most `share` of the unpatched one."""
        enough = [point for point in self.points if point.kl.value <= share * self.unpatched.value]
        return min(enough, key=lambda point: point.n_patched, default=None)

    def as_dict(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in vars(self).items() if name not in ("points", "effects")},
            "unpatched": self.unpatched.as_dict(),
            "all_patched": self.all_patched.as_dict(),
            "points": [point._asdict() | {"kl": point.kl.as_dict()} for point in self.points],
            "effects": [vars(effect) for effect in self.effects],
            "reached": {str(share): (p := self.reached(share)) and [p.n_patched, p.magnitude] for share in REACHED},
        }


@dataclass(frozen=True)
class Patching:
    """The curves of several dictionaries on one task."""

    n_pairs: int
    curves: tuple[PatchingCurve, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"n_pairs": self.n_pairs, "curves": [curve.as_dict() for curve in self.curves]}

    def table(self) -> str:
        """Return a Markdown table, a row per dictionary."""
        lines = [
            "| dictionary | candidates | KL unpatched | KL all patched | patches (edit) for half the KL | for a tenth "
            "| Spearman | prompts run, of | passes | s |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for c in self.curves:
            cells = [f"{p.n_patched} ({p.magnitude:.2f})" if (p := c.reached(share)) else "never" for share in REACHED]
            rank = "" if c.spearman is None else f"{c.spearman:.2f}"
            lines.append(
                f"| {c.name} | {c.n_candidates} | {c.unpatched.value:.2f} | {c.all_patched.value:.3f} | {cells[0]} "
                f"| {cells[1]} | {rank} | {c.prompt_forwards:,} of {c.original_prompt_forwards:,} | {c.passes:,} "
                f"| {c.seconds:.1f} |"
            )
        return "\n".join(lines)

    def svg(self) -> str:
        """Return the paper's figure 3: KL against the number of patches and against the edit's size, and the effects."""
        return pictures.svg(self._draw, 3, (13, 4))

    def _draw(self, axes: Any) -> None:
        from matplotlib import colormaps

        others = colormaps["tab10"].colors[1:]  # pyright: ignore[reportAttributeAccessIssue]
        for number, curve in enumerate(self.curves):
            colour = pictures.OURS if number == 0 else others[(number - 1) % len(others)]
            points = [point for point in curve.points if point.n_patched]
            kl = [point.kl.value for point in points]
            low, high = ([getattr(point.kl, end) for point in points] for end in ("lo", "hi"))
            for axis, x in ((axes[0], [p.n_patched for p in points]), (axes[1], [p.magnitude for p in points])):
                axis.plot(x, kl, "o-", markersize=3, color=colour, label=curve.name)
                axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            axes[2].scatter(
                [effect.attribution for effect in curve.effects],
                [effect.exact for effect in curve.effects],
                s=10,
                color=colour,
                label=curve.name if curve.spearman is None else f"{curve.name}: {curve.spearman:.2f}",
            )
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
    thresholds: Sequence[float] = THRESHOLDS,
    seed: int = 0,
    batch_rows: int = BATCH_ROWS,
) -> Patching:
    """Return what patching each named dictionary does on the pairs (`IoiPair`, or tuples of base and counterfactual).

    Anything with SAELens' `encode`, `decode` and `cfg` is a dictionary: SAEs, and the baselines of `saes.baselines`.
    Raises: UsageError when there is none, when they do not write at the same hook, and as `patch_inputs`.
    """
    if not saes:
        raise UsageError("there is no SAE to patch. Give at least one.")
    hooks = {name: hooks_of(sae, model)[1] for name, sae in saes.items()}
    first = next(iter(hooks))
    for name, hook in hooks.items():
        if hook != hooks[first]:
            raise UsageError(
                f"{first} writes at {hooks[first]}, {name} at {hook}; edits compare at one place only. "
                "Give SAEs of the same hook, or run once for each."
            )
    inputs = patch_inputs(tokenizer, model, pairs)
    curves = [_curve(name, Patcher(model, sae, inputs, batch_rows), thresholds, seed) for name, sae in saes.items()]
    return Patching(len(inputs.base), tuple(curves))


def _curve(name: str, patcher: Patcher, thresholds: Sequence[float], seed: int) -> PatchingCurve:
    start = time.perf_counter()
    exact, attribution = patcher.effects().numpy(), patcher.attribution().numpy()
    before = patcher.cost.prompt_forwards, patcher.cost.passes
    found = eliminate(patcher, thresholds, seed=seed)
    largest = np.argsort(-exact, kind="stable")[:TOP]
    varies = len(exact) > 1 and np.ptp(exact) > 0 and np.ptp(attribution) > 0
    return PatchingCurve(
        name=name,
        hook_name=patcher.hook_out,
        d_sae=int(patcher.sae.cfg.d_sae),
        n_candidates=len(exact),
        unpatched=_mean(patcher.unpatched),
        all_patched=found.points[0].kl,
        points=found.points,
        order=found.order,
        effects=tuple(Effect(int(patcher.candidates[i]), float(exact[i]), float(attribution[i])) for i in largest),
        spearman=float(np.asarray(spearmanr(exact, attribution))[0]) if varies else None,
        visits=found.visits,
        prompt_forwards=patcher.cost.prompt_forwards - before[0],
        original_prompt_forwards=found.visits * patcher.n_pairs,
        passes=patcher.cost.passes - before[1],
        seconds=time.perf_counter() - start,
    )


def _mean(values: Any) -> Estimate:
    return mean_interval(values.double().cpu().numpy())
