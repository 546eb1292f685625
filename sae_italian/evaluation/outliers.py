"""What stands out in a model's activations: tokens of massive norm, dimensions of massive variance, a mean that is nearly all.

In Gemma 3 270M the beginning of a text has 16 times the norm of another token, one dimension 2,232 times the variance of
the median one, and the mean's norm is 0.99 of a token's. Such activations spoil a scale, a start, or an explained variance
without a word, so the evaluation card and `train --dry-run` name them (Sun et al. 2024, Massive Activations in LLMs,
arXiv 2402.17762).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

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
        parts = [
            f"{bos}median norm {_norm(self.median_norm)}, norm of the mean {self.mean_norm / self.median_norm:.2f} of it",
            _named("outlier tokens", [f"{name!r} {times:,.1f}x the norm" for name, times in self.tokens]),
            _named("outlier dimensions", [f"{name} {times:,.0f}x the variance" for name, times in self.dimensions]),
        ]
        return "; ".join(parts)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Outliers:
        """Return what `report.plain` made these values of."""
        lists = {key: tuple(Outlier(**each) for each in values[key]) for key in ("tokens", "dimensions")}
        return cls(**{**values, **lists})


def _norm(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _named(what: str, found: Sequence[str]) -> str:
    return f"{what} {', '.join(found) or 'none'}"


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
