"""The short table of a run: one list of metrics for the terminal, the README and the report's first page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sae_italian.browser.schema import MetricRecord

# name, Italian, English, unit, where the number is: (part, key)
_METRICS = (
    ("l0", "L0 (latenti attivi per token)", "L0 (active latents per token)", "", ("card", "l0")),
    (
        "explained_variance",
        "Varianza spiegata, centrata (SAELens)",
        "Explained variance, centred (SAELens)",
        "%",
        ("card", "explained_variance"),
    ),
    (
        "explained_variance_uncentred",
        "Varianza spiegata, non centrata (Llama Scope)",
        "Explained variance, uncentred (Llama Scope)",
        "%",
        ("card", "explained_variance_uncentred"),
    ),
    ("ce_loss_recovered", "Perdita CE recuperata", "CE loss recovered", "%", ("card", "ce_loss_recovered")),
    ("dead", "Latenti morti", "Dead latents", "%", ("card", "dead")),
    (
        "share_detected",
        "Latenti spiegati con detection ≥ 0,8",
        "Explained latents with detection ≥ 0.8",
        "%",
        ("autointerp", "share_detected"),
    ),
    (
        "detection",
        "Detection, accuratezza bilanciata media",
        "Detection, mean balanced accuracy",
        "",
        ("autointerp", "detection"),
    ),
    (
        "fuzzing",
        "Fuzzing, accuratezza bilanciata media",
        "Fuzzing, mean balanced accuracy",
        "",
        ("autointerp", "fuzzing"),
    ),
)
_CONTROLS = (
    (
        "shuffled_detection",
        "Spiegazioni scambiate: detection media",
        "Shuffled explanations: mean detection",
        "",
        ("autointerp", "shuffled_detection"),
    ),
    (
        "lookup_share_detected",
        "Solo il token: latenti con detection ≥ 0,8",
        "Token lookup: latents with detection ≥ 0.8",
        "%",
        ("autointerp", "lookup_share_detected"),
    ),
    (
        "gain_over_lookup",
        "Guadagno medio sul solo token",
        "Mean gain over token lookup",
        "",
        ("autointerp", "gain_over_lookup"),
    ),
    (
        "random_share_detected",
        "SAE casuale: latenti con detection ≥ 0,8",
        "Random SAE: latents with detection ≥ 0.8",
        "%",
        ("random", "share_detected"),
    ),
    ("random_detection", "SAE casuale: detection media", "Random SAE: mean detection", "", ("random", "detection")),
)


def records(results: dict[str, Any], which: str) -> list[MetricRecord]:
    """Return the `metrics` or `controls` of a run as records; numbers that a run does not have are left out.

    `results` holds the parts `card`, `autointerp`, `random` (dicts of {value, lo, hi}) and counts for the notes.
    """
    found = []
    for name, label_it, label_en, unit, (part, key) in _METRICS if which == "metrics" else _CONTROLS:
        estimate = (results.get(part) or {}).get(key)
        if not estimate or estimate["value"] is None:
            continue
        scale = 100.0 if unit == "%" else 1.0
        lo, hi = estimate["lo"], estimate["hi"]
        note_it, note_en = _note(name, results)
        found.append(
            MetricRecord(
                name=name,
                label_it=label_it,
                label_en=label_en,
                value=scale * estimate["value"],
                lo=None if lo is None or hi is None else scale * lo,
                hi=None if lo is None or hi is None else scale * hi,
                note_it=note_it,
                note_en=note_en,
                unit=unit,  # pyright: ignore[reportArgumentType]
            )
        )
    return found


def _note(name: str, results: dict[str, Any]) -> tuple[str, str]:
    """Return the Italian and the English note of a metric; thousands are separated as each language does."""
    card, auto = results.get("card") or {}, results.get("autointerp") or {}
    if name == "dead":
        note = f"su {card['n_tokens']:,} token", f"in {card['n_tokens']:,} tokens"
    elif name == "share_detected":
        numbers = f"{auto['n_explained']:,}", f"{auto['n_latents']:,}"
        note = "{} spiegati di {}".format(*numbers), "{} explained of {}".format(*numbers)
    elif name == "shuffled_detection":
        return "il caso dà 0,5", "chance is 0.5"
    else:
        return "", ""
    return note[0].replace(",", "."), note[1]


def text_table(metrics: Sequence[MetricRecord], extra: Sequence[tuple[str, str]] = ()) -> str:
    """Return a Markdown table of metrics with their intervals, in English, then rows of plain text."""
    lines = ["| | value | 95 % interval |", "|---|---|---|"]
    for metric in metrics:
        digits = 1 if metric["unit"] == "%" else 3
        unit = f" {metric['unit']}" if metric["unit"] else ""
        note = f" ({metric['note_en']})" if metric["note_en"] else ""
        value = f"{metric['value']:.{digits}f}{unit}"
        interval = "" if metric["lo"] is None else f"{metric['lo']:.{digits}f} to {metric['hi']:.{digits}f}"
        lines.append(f"| {metric['label_en']}{note} | {value} | {interval} |")
    lines += [f"| {label} | {value} | |" for label, value in extra]
    return "\n".join(lines)
