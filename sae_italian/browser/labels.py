"""Which gold or UD labels each latent detects: those of the store, and the gold labels of the run's results."""

from __future__ import annotations

from typing import Any

from sae_italian.autointerp.store import Store
from sae_italian.browser.schema import LabelRecord

SHOWN = 0.5  # F1 from which a gold label is shown on a latent's card
N_LABELS = 10  # of one latent, best first
_NUMBERS = ("f1", "lo", "hi", "precision", "recall", "n")


def labels_of(store: Store | None, gold: list[dict[str, Any]]) -> dict[int, list[LabelRecord]]:
    """Return the labels of each latent, best first. `gold` are the rows of `analysis.gold_table` as plain dicts."""
    found: dict[int, list[LabelRecord]] = {}
    stored = getattr(store, "labels", None)
    rows = [row._asdict() for row in stored()] if stored else []
    rows += [{**row, "source": "gold"} for row in gold if row["latent"] is not None and (row["f1"] or 0) >= SHOWN]
    for row in rows:
        numbers = {name: row.get(name) for name in _NUMBERS}
        record = LabelRecord(label=row["label"], source=row["source"], **numbers)  # pyright: ignore[reportArgumentType]
        found.setdefault(row["latent"], []).append(record)
    for records in found.values():
        records.sort(key=lambda record: -(record["f1"] or 0.0))
        del records[N_LABELS:]
    return found
