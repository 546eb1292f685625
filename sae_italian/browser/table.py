"""The short table of a run: one list of metrics for the terminal, the README and the report's first page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sae_italian.base.labels import label
from sae_italian.base.report import table
from sae_italian.browser.schema import Record

# What is shown: the number's place in the run's results, and its label, which ends with its name on the page.
_TABLES = {
    "metrics": {
        **{f"card.{name}": f"card.{name}" for name in ("l0", "explained_variance", "explained_variance_uncentred")},
        "card.ce_loss_recovered": "card.ce_loss_recovered",
        "card.dead": "metrics.dead",
        **{f"autointerp.{name}": f"metrics.{name}" for name in ("share_detected", "detection", "fuzzing")},
    },
    "controls": {
        **{
            f"autointerp.{n}": f"controls.{n}"
            for n in ("shuffled_detection", "lookup_share_detected", "gain_over_lookup")
        },
        **{f"random.{name}": f"controls.random_{name}" for name in ("share_detected", "detection")},
    },
}
_SHARES = ("explained_variance", "explained_variance_uncentred", "ce_loss_recovered", "dead", "share_detected")


def records(results: dict[str, Any], which: str) -> list[Record]:
    """Return the `metrics` or `controls` of a run as records; numbers that a run does not have are left out.

    `results` holds the parts `card`, `autointerp`, `random` (dicts of {value, lo, hi}) and counts for the notes.
    """
    found = []
    for place, words in _TABLES[which].items():
        part, key = place.split(".")
        estimate = (results.get(part) or {}).get(key)
        if not estimate or estimate["value"] is None:
            continue
        name = words.split(".")[1]
        scale, unit = (100, "%") if name.endswith(_SHARES) else (1, "")
        ends = {end: None if estimate[end] is None else estimate[end] * scale for end in ("value", "lo", "hi")}
        labels = {f"label_{language}": label(words, language) for language in ("it", "en")}
        note_it, note_en = _note(name, results)
        found.append({"name": name, **ends, **labels, "unit": unit, "note_it": note_it, "note_en": note_en})
    return found


def _note(name: str, results: dict[str, Any]) -> tuple[str, str]:
    """Return the Italian and the English note of a metric; thousands are separated as each language does."""
    card, auto = results.get("card") or {}, results.get("autointerp") or {}
    if name == "dead":
        note = f"su {card['n_tokens']:,} token", f"in {card['n_tokens']:,} tokens"
    elif name == "share_detected":
        scored, all_latents = f"{auto.get('n_scored', auto['n_explained']):,}", f"{auto['n_latents']:,}"
        note = f"{scored} valutati di {all_latents}", f"{scored} scored of {all_latents}"
    elif name == "shuffled_detection":
        return "il caso dà 0,5", "chance is 0.5"
    else:
        return "", ""
    return note[0].replace(",", "."), note[1]


def text_table(metrics: Sequence[Record], extra: Sequence[tuple[str, ...]] = ()) -> str:
    """Return a Markdown table of metrics with their intervals, in English, then rows of a name, a value and an interval."""
    rows: list[tuple[str, ...]] = []
    for metric in metrics:
        digits, unit = (1, " %") if metric["unit"] else (3, "")
        note = f" ({metric['note_en']})" if metric["note_en"] else ""
        interval = "" if metric["lo"] is None else f"{metric['lo']:.{digits}f} to {metric['hi']:.{digits}f}"
        rows.append((metric["label_en"] + note, f"{metric['value']:.{digits}f}{unit}", interval))
    return table(" | value | 95 % interval", [*rows, *extra])
