"""The pictures of training, as SVG: the density of the latents, and a run's curves beside those of a healthy one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sae_italian.pictures import OURS, REFERENCE, WARNING, svg

if TYPE_CHECKING:
    from sae_italian.training.card import EvaluationCard


def density_svg(card: EvaluationCard) -> str:
    """Return the histogram of the latents' density with its intervals, as SVG."""

    def draw(axes: Any) -> None:
        (axis,) = axes
        bins = card.density
        middle = [(bin.lo + bin.hi) / 2 for bin in bins]
        share = [100 * bin.share.value for bin in bins]
        below = [max(0.0, 100 * (bin.share.value - bin.share.lo)) for bin in bins]
        above = [max(0.0, 100 * (bin.share.hi - bin.share.value)) for bin in bins]
        axis.bar(middle, share, width=[bin.hi - bin.lo for bin in bins], color=OURS, alpha=0.8)
        axis.errorbar(middle, share, yerr=(below, above), fmt="none", ecolor="#222222", elinewidth=0.8)
        axis.axvline(-1, color=WARNING, linewidth=1, linestyle="--")
        axis.set_xlim(bins[0].lo, bins[-1].hi)
        axis.set_xlabel(
            "log10 of the share of tokens on which a latent fires · quota di token in cui un latente è attivo"
        )
        axis.set_ylabel("% of latents · % dei latenti")
        axis.set_title(
            f"dead · morti {100 * card.dead.value:.1f} %   ultra-active · ultra-attivi {100 * card.ultra_active.value:.1f} %"
            f"   ({card.n_tokens:,} tokens)",
            fontsize=10,
        )

    return svg(draw, 1, (7.5, 3.6))


def curves_svg(panels: Sequence[tuple[str, Any, Any, Any, Any, Any]], labels: tuple[str, str], title: str) -> str:
    """Return panels of (title, x and y of the run, x, low and high of the reference) as one SVG; arrays or lists."""

    def draw(axes: Any) -> None:
        for axis, (name, x, y, x_reference, low, high) in zip(axes, panels, strict=True):
            if len(x_reference):
                axis.fill_between(x_reference, low, high, color=REFERENCE, alpha=0.35, linewidth=0, label=labels[1])
            if len(x):
                axis.plot(x, y, color=OURS, linewidth=1.5, label=labels[0])
            axis.set_title(name, fontsize=10)
            axis.set_xlabel("share of the training · quota dell'addestramento", fontsize=8)
        axes[0].legend(frameon=False, fontsize=8)
        axes[0].figure.suptitle(title, fontsize=10)

    return svg(draw, len(panels), (3.4 * len(panels), 3.2))
