"""The short table of a run: one list of metrics for the terminal, the README and the report's first page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sae_italian.base.labels import label
from sae_italian.browser.schema import Record


class Metric(NamedTuple):
    """A number of the run: its name, the part of the results and the key it stands under there, and its label."""

    name: str
    part: str
    key: str
    label: str
    unit: str = ""


_TABLES = {
    "metrics": (
        Metric("l0", "card", "l0", "card.l0"),
        Metric("explained_variance", "card", "explained_variance", "card.explained_variance", "%"),
        Metric(
            "explained_variance_uncentred",
            "card",
            "explained_variance_uncentred",
            "card.explained_variance_uncentred",
            "%",
        ),
        Metric("ce_loss_recovered", "card", "ce_loss_recovered", "card.ce_loss_recovered", "%"),
        Metric("dead", "card", "dead", "metrics.dead", "%"),
        Metric("share_detected", "autointerp", "share_detected", "metrics.share_detected", "%"),
        Metric("detection", "autointerp", "detection", "metrics.detection"),
        Metric("fuzzing", "autointerp", "fuzzing", "metrics.fuzzing"),
    ),
    "controls": (
        Metric("shuffled_detection", "autointerp", "shuffled_detection", "controls.shuffled_detection"),
        Metric("lookup_share_detected", "autointerp", "lookup_share_detected", "controls.lookup_share_detected", "%"),
        Metric("gain_over_lookup", "autointerp", "gain_over_lookup", "controls.gain_over_lookup"),
        Metric("random_share_detected", "random", "share_detected", "controls.random_share_detected", "%"),
        Metric("random_detection", "random", "detection", "controls.random_detection"),
    ),
}


def records(results: dict[str, Any], which: str) -> list[Record]:
    """Return the `metrics` or `controls` of a run as records; numbers that a run does not have are left out.

    `results` holds the parts `card`, `autointerp`, `random` (dicts of {value, lo, hi}) and counts for the notes.
    """
    found = []
    for metric in _TABLES[which]:
        estimate = (results.get(metric.part) or {}).get(metric.key)
        if not estimate or estimate["value"] is None:
            continue
        scale = 100.0 if metric.unit == "%" else 1.0
        ends = [estimate[end] for end in ("lo", "hi")]
        lo, hi = (None, None) if None in ends else (scale * end for end in ends)
        record: Any = {"name": metric.name, "value": scale * estimate["value"], "lo": lo, "hi": hi}
        labels = {f"label_{language}": label(metric.label, language) for language in ("it", "en")}
        note_it, note_en = _note(metric.name, results)
        found.append(record | labels | {"note_it": note_it, "note_en": note_en, "unit": metric.unit})
    return found


def _note(name: str, results: dict[str, Any]) -> tuple[str, str]:
    """Return the Italian and the English note of a metric; thousands are separated as each language does."""
    card, auto = results.get("card") or {}, results.get("autointerp") or {}
    if name == "dead":
        note = f"su {card['n_tokens']:,} token", f"in {card['n_tokens']:,} tokens"
    elif name == "share_detected":
        explained, all_latents = f"{auto['n_explained']:,}", f"{auto['n_latents']:,}"
        note = f"{explained} spiegati di {all_latents}", f"{explained} explained of {all_latents}"
    elif name == "shuffled_detection":
        return "il caso dà 0,5", "chance is 0.5"
    else:
        return "", ""
    return note[0].replace(",", "."), note[1]


def text_table(metrics: Sequence[Record], extra: Sequence[tuple[str, str]] = ()) -> str:
    """Return a Markdown table of metrics with their intervals, in English, then rows of plain text."""
    lines = ["| | value | 95 % interval |", "|---|---|---|"]
    for metric in metrics:
        digits = 1 if metric["unit"] == "%" else 3
        unit = f" {metric['unit']}" if metric["unit"] else ""
        note = f" ({metric['note_en']})" if metric["note_en"] else ""
        value = f"{metric['value']:.{digits}f}{unit}"
        interval = "" if metric["lo"] is None else f"{metric['lo']:.{digits}f} to {metric['hi']:.{digits}f}"
        lines.append(f"| {metric['label_en']}{note} | {value} | {interval} |")
    lines += [f"| {name} | {value} | |" for name, value in extra]
    return "\n".join(lines)
