"""A shift as a record: one bucket a row, written as JSON, Markdown and picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_italian.base.pictures import OURS, REFERENCE, svg
from sae_italian.base.statistics import Estimate
from sae_italian.base.storage import utc_now, write_json, write_text

RESULT, MARKDOWN, PICTURE = "shift.json", "shift.md", "shift.svg"
# key of the evaluation card: heading
HEADINGS = {
    "l0": "L0",
    "explained_variance": "explained variance, centred",
    "explained_variance_uncentred": "uncentred",
    "ce_loss": "CE loss",
    "delta_lm_loss": "delta LM loss",
    "ce_loss_recovered": "CE recovered",
}
KEYS = tuple(HEADINGS)
SHOWN = ("l0", "explained_variance", "explained_variance_uncentred", "delta_lm_loss")  # of the picture
_LEGEND = (
    "Means per token, special tokens left out; losses in nats. 95 % intervals, bootstrapped over documents. Changes are "
    "against the bucket in bold; where both hold the same documents these are resampled together.",
    "Medie per token, senza token speciali; perdite in nat. Intervalli al 95 %, bootstrap sui documenti. Le differenze sono "
    "rispetto al gruppo in grassetto; se i documenti sono gli stessi, sono ricampionati insieme.",
)


@dataclass(frozen=True)
class Bucket:
    """The card's numbers of one bucket, and their difference from the reference's (empty for the reference itself)."""

    name: str
    n_tokens: int
    n_documents: int
    numbers: dict[str, Estimate]
    change: dict[str, Estimate] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "n_tokens": self.n_tokens,
            "n_documents": self.n_documents,
            **{key: value.as_dict() for key, value in self.numbers.items()},
            "change": {key: value.as_dict() for key, value in self.change.items()},
        }


@dataclass(frozen=True)
class Shift:
    """Buckets of one kind (`by`) and the one that the others are compared with."""

    by: str
    sae: str
    model: str
    corpus: str
    context_size: int
    reference: str
    buckets: list[Bucket]

    def bucket(self, name: str) -> Bucket:
        """Return a bucket by name. Raises: KeyError."""
        return {bucket.name: bucket for bucket in self.buckets}[name]

    def as_dict(self) -> dict[str, Any]:
        plain = {key: value for key, value in vars(self).items() if key != "buckets"}
        return {**plain, "buckets": [bucket.as_dict() for bucket in self.buckets], "created": utc_now()}

    def notes(self) -> list[str]:
        """Return what a reader should know: that a TopK SAE's L0 cannot move."""
        fixed = len({bucket.numbers["l0"] for bucket in self.buckets}) == 1
        return (
            ["L0 is k by construction (TopK); `export SAE --to jumprelu` gives an SAE whose L0 moves."] if fixed else []
        )

    def table(self) -> list[str]:
        """Return the lines of a Markdown table of all numbers."""
        return self._table(lambda bucket: bucket.numbers, "{:.4g}")

    def changes(self) -> list[str]:
        """Return the lines of a Markdown table of the changes from the reference."""
        return self._table(lambda bucket: bucket.change, "{:+.3g}")

    def _table(self, numbers: Callable[[Bucket], dict[str, Estimate]], form: str) -> list[str]:
        lines = [
            "| " + " | ".join([self.by, "tokens", "documents", *HEADINGS.values()]) + " |",
            "|---" * (3 + len(KEYS)) + "|",
        ]
        for bucket in self.buckets:
            found = numbers(bucket)
            if not found:
                continue
            name = f"**{bucket.name}**" if bucket.name == self.reference else bucket.name
            cells = [_shown(found[key], form) for key in KEYS]
            lines.append("| " + " | ".join([name, f"{bucket.n_tokens:,}", f"{bucket.n_documents:,}", *cells]) + " |")
        return lines

    def markdown(self) -> str:
        lines = [
            f"# Shift by {self.by}: {self.sae or self.model}",
            "",
            f"{self.model}; {self.corpus}; windows of {self.context_size} tokens.",
            "",
            *self.table(),
            "",
            f"Changes against {self.reference} · Differenze rispetto a {self.reference}",
            "",
            *self.changes(),
            "",
            f"![shift]({PICTURE})",
            "",
            *(note + "\n" for note in self.notes()),
            *(paragraph + "\n" for paragraph in _LEGEND),
        ]
        return "\n".join(lines).rstrip() + "\n"

    def svg(self) -> str:
        """Return the numbers of all buckets with their intervals, a panel per number; dotted: the reference."""

        def draw(axes: Any) -> None:
            places = list(range(len(self.buckets)))[::-1]
            for axis, key in zip(axes, SHOWN, strict=True):
                for place, bucket in zip(places, self.buckets, strict=True):
                    value, lo, hi = bucket.numbers[key]
                    if value != value:
                        continue
                    colour = REFERENCE if bucket.name == self.reference else OURS
                    if lo == lo:
                        axis.plot([lo, hi], [place, place], color=colour, linewidth=2)
                    axis.plot([value], [place], "o", color=colour, markersize=5)
                reference = self.bucket(self.reference).numbers[key].value
                axis.axvline(reference, color=REFERENCE, linewidth=0.8, linestyle=":")
                axis.set_yticks(
                    places, [bucket.name for bucket in self.buckets] if axis is axes[0] else [""] * len(places)
                )
                axis.set_ylim(-0.6, len(places) - 0.4)
                axis.set_title(HEADINGS[key] + (" explained variance" if key.endswith("uncentred") else ""), fontsize=9)

        return svg(draw, len(SHOWN), (12, 1.2 + 0.35 * len(self.buckets)))

    def save(self, folder: Path) -> None:
        """Write shift.json, shift.md and shift.svg."""
        write_json(folder / RESULT, self.as_dict())
        write_text(folder / MARKDOWN, self.markdown())
        write_text(folder / PICTURE, self.svg())


def _shown(value: Estimate, form: str) -> str:
    """Return a value and its interval, as far as they are known."""
    if value.value != value.value:
        return "-"
    if value.lo != value.lo:
        return form.format(value.value)
    return "{} ({} to {})".format(*(form.format(x) for x in value))
