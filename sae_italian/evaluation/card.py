"""The evaluation card as a record: its numbers with intervals, and how they are written as JSON, Markdown and picture.

It also names what stands out in the activations: tokens of massive norm, dimensions of massive variance, a mean that is
nearly all. In Gemma 3 270M the beginning of a text has 16 times the norm of another token, one dimension 2,232 times the
variance of the median one, and the mean's norm is 0.99 of a token's. Such activations spoil a scale, a start, or an explained
variance without a word, so card and `train --dry-run` name them (Sun et al. 2024, Massive Activations in LLMs, arXiv
2402.17762).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from jaxtyping import Bool, Float, Int
from pydantic import BeforeValidator, TypeAdapter
from torch import Tensor

from sae_italian.base.labels import Language, filled, label, labels
from sae_italian.base.report import INK, OURS, WARNING, framed, plain, shown, svg
from sae_italian.base.statistics import NOTHING, Estimate
from sae_italian.base.storage import read_json, understood, write_json, write_text

CARD_JSON, CARD_MARKDOWN, DENSITY_PICTURE = "card.json", "card.md", "density.svg"
SEEDS_FILE = "seeds.json"  # which latents the other seeds of a training find (analysis/geometry.py), beside the card
ULTRA_ACTIVE = 0.1  # of the tokens (Llama Scope, fig. 4)

NUMBERS = tuple(labels("card"))  # the keys of the numbers with intervals, in the card's order
_SHARES = {"dead", "dead_in_100k", "dead_in_1m", "ultra_active", "ce_loss_recovered", "kl_recovered"}
MASSIVE_NORM = 4.0  # times the median norm: a token that stands out
MASSIVE_VARIANCE = 20.0  # times the median variance: a dimension that stands out
AT_MOST = 5  # of each are named


class Outlier(NamedTuple):
    """A token, or a dimension by its number, and how many times the median it has."""

    name: str
    times: float


class Outliers(NamedTuple):
    """Of one hook, over a sample of text; norms in the model's units."""

    median_norm: float  # of tokens that are neither special nor padding
    mean_norm: float  # norm of the mean vector of those that do not stand out
    bos_norm: float | None  # None where no text begins with a BOS
    tokens: tuple[Outlier, ...]  # by norm, special ones among them
    dimensions: tuple[Outlier, ...]  # by variance

    def text(self) -> str:
        """Return one line: `BOS norm 83,046, ...`."""
        bos = "" if self.bos_norm is None else f"BOS norm {_norm(self.bos_norm)}, "
        mean = f"norm of the mean {self.mean_norm / self.median_norm:.2f} of it"
        tokens = ", ".join(f"{name!r} {times:,.1f}x the norm" for name, times in self.tokens)
        dimensions = ", ".join(f"{name} {times:,.0f}x the variance" for name, times in self.dimensions)
        return (
            f"{bos}median norm {_norm(self.median_norm)}, {mean}; "
            f"outlier tokens {tokens or 'none'}; outlier dimensions {dimensions or 'none'}"
        )


def _norm(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _with_nan(value: Any) -> Any:
    """Return an estimate as JSON has it, NaN for the numbers of it that were not measured."""
    return {key: nan if item is None else item for key, item in value.items()} if isinstance(value, dict) else value


Measured = Annotated[Estimate, BeforeValidator(_with_nan)]


class DensityBin(NamedTuple):
    """The share of all latents whose density, the share of tokens on which they fire, is 10**lo to 10**hi."""

    lo: float
    hi: float
    share: Measured


@dataclass(frozen=True)
class EvaluationCard:
    """Means are per token, special tokens left out; losses in nats; intervals are 95 %, bootstrapped over documents."""

    model: str
    sae: str
    hook_name: str
    hook_name_out: str  # where the reconstruction goes; hook_name except for transcoders
    corpus: str
    split: str
    context_size: int
    n_tokens: int
    n_loss_tokens: int  # of these, tokens on which losses and KL were measured
    n_documents: int
    l0: Measured
    explained_variance: Measured  # centred, as SAELens: 1 - sum|x - x^|^2 / sum|x - mean|^2 over all tokens
    explained_variance_uncentred: Measured  # as Llama Scope: 1 - sum|x - x^|^2 / sum|x|^2
    explained_variance_per_dimension: Measured  # mean over dimensions, each scaled to variance 1
    fvu: Measured  # 1 - explained_variance
    cossim: Measured
    l2_ratio: Measured
    ce_loss: Measured
    ce_loss_with_sae: Measured
    ce_loss_with_ablation: Measured  # the activation set to zero where the SAE is applied (SAELens: at BOS too)
    delta_lm_loss: Measured  # with SAE - clean
    ce_loss_recovered: Measured  # (ablated - with SAE) / (ablated - clean); SAELens' ce_loss_score
    kl_div_with_sae: Measured
    kl_div_with_ablation: Measured
    kl_recovered: Measured  # (ablated - with SAE) / ablated; SAELens' kl_div_score
    dead: Measured  # share of latents that never fired in n_tokens
    dead_in_100k: Measured  # in the first 100,000 tokens; NaN where fewer were seen
    dead_in_1m: Measured
    ultra_active: Measured  # share of latents that fire on more than ULTRA_ACTIVE of the tokens
    density: tuple[DensityBin, ...]
    d_sae: int
    created: str
    outliers: Outliers | None = None  # of hook_name_out, in the first windows
    started_from: dict[str, Any] | None = None  # another SAE, and what became of its latents

    def estimates(self) -> dict[str, Estimate]:
        """Return the numbers with intervals by key, in the card's order."""
        return {key: getattr(self, key) for key in NUMBERS}

    def __repr__(self) -> str:
        told = {
            "CE loss recovered": self.ce_loss_recovered,
            "explained variance": self.explained_variance,
            "dead": self.dead,
        }
        shares = ", ".join(f"{name} {shown(found, '.1%')}" for name, found in told.items())
        return f"card of {self.sae}: {self.d_sae:,} latents, L0 {shown(self.l0, '.1f')}, {shares}"

    def _repr_html_(self) -> str:
        return framed(repr(self), density_svg(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EvaluationCard:
        """Return the card of which `report.plain` made these values. Raises: ValueError for what is no card.

        What cards did not have before 0.1.0 was finished is not a number in them.
        """
        return TypeAdapter(cls).validate_python({"explained_variance_per_dimension": NOTHING} | values)

    def save(self, folder: str | Path) -> None:
        """Write card.json, card.md and density.svg."""
        write_json((folder := Path(folder)) / CARD_JSON, plain(self))
        write_text(folder / CARD_MARKDOWN, self.markdown())
        write_text(folder / DENSITY_PICTURE, density_svg(self))

    def markdown(self) -> str:
        where = f"`{self.hook_name}`"
        if self.hook_name_out != self.hook_name:
            where += f" to `{self.hook_name_out}`"
        lines = [
            f"# Evaluation card: {self.sae}",
            "",
            f"{self.model}, {where}, {self.d_sae:,} latents; {self.n_tokens:,} tokens of {self.n_documents:,} "
            f"{self.split} documents of {self.corpus}, context {self.context_size}; 95 % intervals over documents."
            + (f" Losses and KL on the first {self.n_loss_tokens:,}." if self.n_loss_tokens < self.n_tokens else ""),
            "",
            *self.table(),
            "",
            *([self.origin_text(), ""] if self.started_from else []),
            *([f"Activations at `{self.hook_name_out}`: {self.outliers.text()}.", ""] if self.outliers else []),
            f"![density of the latents]({DENSITY_PICTURE})",
            "",
            *(label("legends.card", language) + "\n" for language in ("en", "it")),
        ]
        return "\n".join(lines).rstrip() + "\n"

    def origin_text(self, language: Language = "en") -> str:
        """Return what became of the latents of the SAE that the training started from; without one, nothing."""
        facts = dict(self.started_from or {})
        facts["sae"] = Path(str(facts.get("sae"))).name
        return filled(label("origin.text", language), facts, language) if self.started_from else ""

    def table(self, language: Language = "en") -> list[str]:
        """Return the lines of a Markdown table; a number that was not measured says why."""
        head = {"en": ("metric", "value", "95 % interval"), "it": ("metrica", "valore", "intervallo al 95 %")}[language]
        lines = ["| " + " | ".join((*head, "")) + "|", "|---|---|---|---|"]
        for key, estimate in self.estimates().items():
            name = label(f"card.{key}", language)
            if key.startswith("dead_in") and estimate.value != estimate.value:
                reason = (
                    f"only {self.n_tokens:,} tokens seen" if language == "en" else f"visti solo {self.n_tokens:,} token"
                )
                lines.append(f"| {name} | - | {reason} | `{key}` |")
                continue
            value, lo, hi = (_shown(number, key) for number in estimate)
            lines.append(f"| {name} | {value} | {lo} {'to' if language == 'en' else 'a'} {hi} | `{key}` |")
        return lines


def read_card(folder: str | Path) -> EvaluationCard | None:
    """Return the card that lies in an SAE's folder, None where there is none. Raises: DataError for one cut short."""
    if not (file := Path(folder) / CARD_JSON).is_file():
        return None
    with understood(file, f"Make it again: sae-italian evaluate {folder}"):
        card = EvaluationCard.from_dict(read_json(file))
        card.markdown()  # what cannot be shown is no card of this version
    return card


def read_seeds(folder: Path) -> dict[str, Any] | None:
    """Return what other seeds of the training find of an SAE's latents, None where there was one seed."""
    file = folder / SEEDS_FILE
    return read_json(file) if file.is_file() else None


def _shown(number: float, key: str) -> str:
    if number != number:
        return "-"
    return f"{100 * number:.2f} %" if key in _SHARES else f"{number:.4g}"


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
        axis.errorbar(middle, share, yerr=(below, above), fmt="none", ecolor=INK, elinewidth=0.8)
        label = "ultra-active from here · ultra-attivi da qui"
        axis.axvline(-1, color=WARNING, linewidth=1, linestyle="--", label=label)
        axis.legend()
        axis.set_xlim(bins[0].lo, bins[-1].hi)
        axis.set_xlabel("share of tokens on which a latent fires, log10 · quota di token in cui è attivo, log10")
        axis.set_ylabel("% of latents · % dei latenti")
        dead, active = 100 * card.dead.value, 100 * card.ultra_active.value
        axis.set_title(
            f"{card.n_tokens:,} tokens: {dead:.1f} % dead (morti), {active:.1f} % ultra-active (ultra-attivi)"
        )

    return svg(draw, 1, (7.5, 3.6))


def outliers_of(
    acts: Float[Tensor, "batch pos d_in"],
    tokens: Int[Tensor, "batch pos"],
    keep: Bool[Tensor, "batch pos"],
    tokenizer: Any,
) -> Outliers:
    """Return what stands out in the activations of some windows; `keep` are the tokens that are neither special nor padding.

    A window holds 100 and more tokens for every BOS, so that the medians are those of ordinary tokens.
    """
    norms = acts.float().norm(dim=-1)
    median = norms[keep].median()
    stands_out = norms > MASSIVE_NORM * median
    rows = acts[keep & ~stands_out].float()
    variance = rows.var(0)
    massive: dict[int, float] = {}
    for place in stands_out.nonzero().tolist():
        token, times = int(tokens[*place]), float(norms[*place] / median)
        massive[token] = max(times, massive.get(token, 0.0))
    by_norm = sorted(massive.items(), key=lambda item: -item[1])[:AT_MOST]
    relative = variance / variance.median().clamp_min(1e-12)
    largest = relative.topk(min(AT_MOST, len(relative)))
    begins = tokens == (-1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    return Outliers(
        float(median),
        float(rows.mean(0).norm()),
        float(norms[begins].median()) if begins.any() else None,
        tuple(Outlier(tokenizer.convert_ids_to_tokens(token), times) for token, times in by_norm),
        tuple(
            Outlier(str(dimension), times)
            for dimension, times in zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
            if times > MASSIVE_VARIANCE
        ),
    )
