"""A store's tables for others: Parquet or JSON Lines files, and W&B tables in an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_italian.autointerp.database import TABLES
from sae_italian.autointerp.store import Store
from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.storage import atomic_path, write_text

FORMATS = ("parquet", "jsonl", "wandb")
JSON_COLUMNS = {"rule", "notes", "reply"}


def export(path: Path, out: Path, to: str, *, project: str = "sae-italian") -> list[Path]:
    """Write every table of a store into the folder `out`; return the files (for `wandb` the run's folder).

    `wandb` logs one table per table, with the Parquet files as an artifact; with WANDB_MODE=offline nothing leaves the
    machine until `wandb sync`. Raises: UsageError for an unknown format or when there is no store.
    """
    if to not in FORMATS:
        raise UsageError(f"{to!r} is no format for an export. {nearest(to, FORMATS)}")
    if not path.is_file():
        raise UsageError(f"{path} does not exist: run `sae-italian autointerp` on the cache first.")
    with Store(path, {}) as store:
        tables = {name: _rows(store, name) for name in TABLES}
    if to == "jsonl":
        return [_jsonl(out / f"{name}.jsonl", *table) for name, table in tables.items()]
    files = [_parquet(out / f"{name}.parquet", *table) for name, table in tables.items()]
    return files if to == "parquet" else [_wandb(path, out, files, tables, project)]


def _rows(store: Store, table: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    cursor = store.connection.execute(f"SELECT * FROM {table} ORDER BY rowid")
    return [column[0] for column in cursor.description], cursor.fetchall()


def _jsonl(file: Path, names: list[str], rows: list[tuple[Any, ...]]) -> Path:
    lines = []
    for row in rows:
        values = dict(zip(names, row, strict=True))
        parsed = {n: json.loads(v) if n in JSON_COLUMNS and v is not None else v for n, v in values.items()}
        lines.append(json.dumps(parsed, ensure_ascii=False) + "\n")
    write_text(file, "".join(lines))
    return file


def _parquet(file: Path, names: list[str], rows: list[tuple[Any, ...]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    columns = list(zip(*rows, strict=True)) if rows else [()] * len(names)
    table = pyarrow.table({name: pyarrow.array(column) for name, column in zip(names, columns, strict=True)})
    with atomic_path(file) as temporary:
        pyarrow.parquet.write_table(table, temporary)
    return file


def _wandb(path: Path, out: Path, files: list[Path], tables: dict[str, Any], project: str) -> Path:
    import wandb

    with wandb.init(project=project, job_type="autointerp", dir=str(out), config={"store": path.name}) as run:
        for name in ("explanation", "score"):
            columns, rows = tables[name]
            run.log({name: wandb.Table(columns=columns, data=[list(row) for row in rows])})
        artifact = wandb.Artifact("autointerp", type="autointerp")
        for file in files:
            artifact.add_file(str(file))
        run.log_artifact(artifact)
        return Path(run.dir).parent
