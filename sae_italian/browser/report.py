"""The report of a cache: everything that lies beside it, as one folder that opens from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_italian.browser.cards import CardMaker, Report
from sae_italian.browser.schema import CardRecord, RowRecord
from sae_italian.browser.table import records
from sae_italian.browser.write import write_browser
from sae_italian.cache import FeatureCache

RESULTS = "results.json"


def write_report(cache: FeatureCache, tokenizer: Any, out: Path, *, title: str = "", model_note: str = "") -> Path:
    """Write the browser of a cache into `out` and return the path of its index.html.

    Scores are read from `autointerp.sqlite` and numbers from `results.json` in the cache's folder, where they exist.
    """
    maker = CardMaker(read_report(cache, tokenizer, title=title, model_note=model_note))
    return write_browser(out, maker.run_record(), maker.rows(), maker.cards())


def latent_card(cache: FeatureCache, tokenizer: Any, latent: int) -> tuple[RowRecord, CardRecord]:
    """Return the records of one latent. Raises: UsageError when there is no such latent."""
    cache.latent(latent)
    maker = CardMaker(read_report(cache, tokenizer))
    return maker.row(latent), maker.card(latent)


def read_report(cache: FeatureCache, tokenizer: Any, *, title: str = "", model_note: str = "") -> Report:
    """Gather what lies beside a cache."""
    file, store = cache.folder / RESULTS, cache.folder / "autointerp.sqlite"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return Report(
        cache=cache,
        tokenizer=tokenizer,
        store=store if store.is_file() else None,
        title=title or f"{cache.manifest.model} · {cache.manifest.hook_name}",
        metrics=records(results, "metrics"),
        controls=records(results, "controls"),
        gold=results.get("gold") or [],
        model_note=model_note,
    )
