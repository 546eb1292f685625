"""A store's tables for others: Parquet or JSON Lines files, and W&B tables in an artifact."""

from __future__ import annotations

import json
from pathlib import Path

from sae_italian.autointerp.store import TABLES, Store
from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.storage import atomic_path, write_text

FORMATS = ("parquet", "jsonl", "wandb")


def export(path: Path, out: Path, to: str, *, project: str = "sae-italian") -> list[Path]:
    """Write every table of a store into the folder `out`; return the files (for `wandb` the run's folder).

    `wandb` logs one table per table, with the Parquet files as an artifact; with WANDB_MODE=offline nothing leaves the
    machine until `wandb sync`. Raises: UsageError for an unknown format or when there is no store.
    """
    import pyarrow
    import pyarrow.parquet

    if to not in FORMATS:
        raise UsageError(f"{to!r} is no format for an export. {nearest(to, FORMATS)}")
    if not path.is_file():
        raise UsageError(f"{path} does not exist: run `sae-italian autointerp` on the cache first.")
    files, tables = [], {}
    with Store(path, {}) as store:
        for name, table in TABLES.items():
            cursor = store.connection.execute(f"SELECT * FROM {name}")
            names, rows = [column[0] for column in cursor.description], cursor.fetchall()
            tables[name] = pyarrow.table({key: [row[i] for row in rows] for i, key in enumerate(names)})
            files.append(out / f"{name}.{'jsonl' if to == 'jsonl' else 'parquet'}")
            if to == "jsonl":
                dicts = tables[name].to_pylist()
                for values in dicts:
                    values |= {key: values[key] and json.loads(values[key]) for key in table.json_columns}
                write_text(files[-1], "".join(json.dumps(values, ensure_ascii=False) + "\n" for values in dicts))
            else:
                with atomic_path(files[-1]) as temporary:
                    pyarrow.parquet.write_table(tables[name], temporary)
    if to != "wandb":
        return files
    import wandb

    with wandb.init(project=project, job_type="autointerp", dir=str(out), config={"store": path.name}) as run:
        for name in ("explanation", "score"):
            run.log({name: wandb.Table(dataframe=tables[name].to_pandas())})
        artifact = wandb.Artifact("autointerp", type="autointerp")
        for file in files:
            artifact.add_file(str(file))
        run.log_artifact(artifact)
        return [Path(run.dir).parent]
