"""Every explainer under every judge of a store, side by side, the executed token lookup beside each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_italian.autointerp.store import NOW, Store
from sae_italian.autointerp.summary import AutointerpSummary, summarise
from sae_italian.base.statistics import Estimate

COLUMNS = ("detection", "fuzzing", "simulation", "shuffled_detection", "lookup_detection", "gain_over_lookup")


def side_by_side(path: Path) -> list[AutointerpSummary]:
    """Return one summary per explainer and judge of a run, in the order they came; controls are within each.

    Of those who judge examples one by one: an encoder and the subject model only rank them.
    """
    with Store(path, {}) as store:
        pairs = store.connection.execute(
            """SELECT explainer, judge FROM score JOIN explanation ON explanation.id = score.explanation_id
               WHERE control = '' AND judge NOT LIKE 'always-%' AND explainer != 'token-lookup' AND scorer = 'detection'
                 AND explainer NOT LIKE ?
               GROUP BY explainer, judge ORDER BY min(score.rowid)""",
            ("%" + NOW,),
        ).fetchall()
    return [summarise(path, explainer=explainer, judge=judge) for explainer, judge in pairs]


def comparison_table(summaries: list[AutointerpSummary], random: list[AutointerpSummary] | None = None) -> str:
    """Return the summaries as a Markdown table, those of the randomly initialised SAE last.

    A rule's score and an LLM's are different quantities: compare within a judge only.
    """
    lines = ["| explainer | judge | latents | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |"]
    lines.append("|---|---|---:|" + "---:|" * len(COLUMNS))
    named = [(summary.explainer, summary) for summary in summaries]
    named += [(f"{summary.explainer}, random SAE", summary) for summary in random or ()]
    for name, summary in named:
        cells = " | ".join(_cell(getattr(summary, name)) for name in COLUMNS)
        lines.append(f"| {name} | {summary.judge} | {summary.n_explained} | {cells} |")
    return "\n".join(lines)


def _cell(estimate: Estimate) -> str:
    values: dict[str, Any] = estimate.as_dict()
    if values["value"] is None:
        return "-"
    interval = "" if values["lo"] is None else f" [{values['lo']:.2f}, {values['hi']:.2f}]"
    return f"{values['value']:.2f}{interval}"
