"""The pages that people look at: a static latent browser, written from records that others compute."""

from __future__ import annotations

from sae_italian.browser.schema import (
    CardRecord,
    ContextRecord,
    ExplanationRecord,
    GoldRecord,
    GroupRecord,
    MetricRecord,
    RowRecord,
    RunRecord,
    ScoreRecord,
)
from sae_italian.browser.source import LatentSource
from sae_italian.browser.write import write_browser

__all__ = [
    "CardRecord",
    "ContextRecord",
    "ExplanationRecord",
    "GoldRecord",
    "GroupRecord",
    "MetricRecord",
    "RowRecord",
    "RunRecord",
    "ScoreRecord",
    "LatentSource",
    "write_browser",
]
