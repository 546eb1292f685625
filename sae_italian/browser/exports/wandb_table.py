"""The latents as a W&B table, and the browser's folder as an artifact beside it. Offline unless asked otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.browser.exports.fields import Check, columns, in_order
from sae_italian.browser.exports.latents import Latents

ARTIFACT, TABLE = "latent-browser", "latents"
_ROW = (
    "latent", "density", "max", "n_active", "explanation_it", "explanation_en", "kind", "detection", "detection_lo",
    "detection_hi", "fuzzing", "gain", "status",
)  # fmt: skip


def rows(latents: Latents, records: Callable[[int], Any], wanted: range) -> Iterator[dict[str, Any]]:
    """Yield a table row for each latent: its row in the browser's list, its logits, and its strongest passage."""
    for latent in wanted:
        record, logits = records(latent), latents.logits(latent)
        example = next(iter(latents.passages.top(latent, 1)), None)
        row = {
            **{key: record[key] for key in _ROW},
            "top_tokens": _list(record["top_tokens"]),
            "promoted": _list(logits["pos_str"]),
            "suppressed": _list(logits["neg_str"]),
            "example": "" if example is None else example.text,
        }
        yield in_order("wandb_latent", row)


def _list(tokens: list[str]) -> str:
    return " ".join(f"«{token.strip()}»" for token in tokens)


def write(out: Path, table: list[dict[str, Any]], browser: Path, *, project: str, online: bool, name: str) -> Path:
    """Log table and artifact as one W&B run below `out`; return the run's folder, which `wandb sync` sends.

    Raises: UsageError without the package wandb, DataError when the table does not fit the table of fields.
    """
    check(table)
    try:
        import wandb
    except ImportError:
        raise UsageError("W&B is not installed; it comes with pip install 'sae-italian[sweeps]'.") from None
    out.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(console="off", silent=True, reinit="create_new")
    mode: Any = "online" if online else "offline"
    with wandb.init(
        project=project, job_type="latents", name=name, dir=str(out.resolve()), mode=mode, settings=settings
    ) as run:
        names = columns("wandb_latent")
        run.log({TABLE: wandb.Table(columns=[*names], data=[[row[key] for key in names] for row in table])})
        artifact = wandb.Artifact(ARTIFACT, type="html", description="open index.html")
        artifact.add_dir(str(browser))
        run.log_artifact(artifact)
        return Path(run.dir).parent


def check(table: list[dict[str, Any]]) -> dict[str, int]:
    """Check the table's rows. Raises: DataError at the first that does not fit."""
    checked = Check()
    for row in table:
        checked("wandb_latent", row)
    return checked.finish()
