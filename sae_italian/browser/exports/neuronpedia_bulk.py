"""Neuronpedia's bulk-import folder: a file of rows for each table of its database.

    <out>/<model>/<source>/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl        one line each
    <out>/<model>/<source>/{features,activations,explanations}/batch-<k>.jsonl.gz

The importer takes the columns of a file from its first line and drops rows whose id it has seen, so every line has the
same keys here, and ids are unique and the same at every export of a cache.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sae_italian.autointerp.store import Store
from sae_italian.base.errors import DataError
from sae_italian.base.storage import atomic_path, write_text
from sae_italian.browser.exports.bulk_rows import About, Explained, activations, neuron, one_line
from sae_italian.browser.exports.fields import Check
from sae_italian.browser.exports.latents import Latents
from sae_italian.browser.exports.names import Names
from sae_italian.browser.exports.neuronpedia_batch import check_activity

BATCH, MAX_FILES = 128, 1000  # the importer sees 1000 files of a folder
ONE_LINE = ("release", "model", "sourceset", "source")
MANY = {"features": "neuron", "activations": "activation", "explanations": "explanation"}


def write(folder: Path, latents: Latents, names: Names, wanted: range, about: About, store: Path | None, bar: Any):
    """Write the rows of the wanted latents into `folder`; batches that are there already are kept."""
    for name, row in one_line(latents, names, about).items():
        write_text(folder / f"{name}.jsonl", _line(row))
    size = max(BATCH, -(-len(wanted) // MAX_FILES))
    with Store(store, {}) if store else nullcontext() as opened:
        explained = Explained(opened, names, about.created) if opened else None
        for number, first in enumerate(range(wanted.start, wanted.stop, size)):
            batch = range(first, min(first + size, wanted.stop))
            if not (folder / "features" / _file(number)).is_file():
                _write(folder / "explanations" / _file(number), explained.rows(batch) if explained else ())
                drawn = (row for latent in batch for row in activations(latents, latent, names, about.created))
                _write(folder / "activations" / _file(number), drawn)
                _write(folder / "features" / _file(number), (neuron(latents, i, names, about.created) for i in batch))
            bar.update(len(batch))


def _file(number: int) -> str:
    return f"batch-{number}.jsonl.gz"


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with (
        atomic_path(file) as temporary,
        temporary.open("wb") as handle,
        gzip.GzipFile(fileobj=handle, mode="wb", mtime=0, compresslevel=6, filename="") as packed,
    ):
        for row in rows:
            packed.write(_line(row).encode())


# --- the check -----------------------------------------------------------------------------------------------------------


def check(folder: Path) -> dict[str, int]:
    """Check every line of an export: the table of fields, foreign keys, neighbours, and that nothing active is bare.

    Raises: DataError naming the first thing that does not fit.
    """
    checked = Check()
    one = {}
    for name in ONE_LINE:
        one[name] = json.loads((folder / f"{name}.jsonl").read_text(encoding="utf-8"))
        checked(name, one[name])
    _check_names(one)
    files = {name: sorted(path.name for path in (folder / name).glob("*.jsonl.gz")) for name in MANY}
    if files["features"] != files["activations"] or files["features"] != files["explanations"]:
        raise DataError(f"{folder}: features, activations and explanations hold different batches. Write it again.")
    if not 0 < len(files["features"]) <= MAX_FILES:
        raise DataError(f"{folder}/features holds {len(files['features'])} files; the importer sees 1 to {MAX_FILES}.")
    for file in files["features"]:
        _check_batch(checked, folder, file, one["source"])
    return checked.finish()


def _check_names(one: dict[str, dict[str, Any]]) -> None:
    release, model, source_set, source = (one[name] for name in ONE_LINE)
    links = {
        "sourceset.releaseName": (source_set["releaseName"], release["name"]),
        "sourceset.modelId": (source_set["modelId"], model["id"]),
        "source.modelId": (source["modelId"], model["id"]),
        "source.setName": (source["setName"], source_set["name"]),
        "source.id": (source["id"].partition("-")[2].partition("__")[0], source_set["name"]),
        "release.defaultSourceId": (release["defaultSourceId"], source["id"]),
    }
    for link, (given, wanted) in links.items():
        if given != wanted:
            raise DataError(f"{link} is {given!r}, which names nothing here; {wanted!r} was expected.")


def _check_batch(checked: Check, folder: Path, file: str, source: dict[str, Any]) -> None:
    rows = {name: list(read(folder / name / file)) for name in MANY}
    for name, table in MANY.items():
        for number, row in enumerate(rows[name]):
            where = f"{name}/{file}, line {number + 1}"
            checked(table, row, where)
            if (row["modelId"], row["layer"]) != (source["modelId"], source["id"]):
                raise DataError(f"{where}: {row['modelId']}/{row['layer']} is not the source of this export.")
    known = {row["index"] for row in rows["features"]}
    shown: dict[str, list[dict[str, Any]]] = {}
    for name in ("activations", "explanations"):
        for row in rows[name]:
            if row["index"] not in known:
                raise DataError(f"{name}/{file}: latent {row['index']} has no line in features/{file}.")
            if name == "activations":
                shown.setdefault(row["index"], []).append(row)
    for row in rows["features"]:
        where = f"features/{file}, latent {row['index']}"
        check_activity(where, row["frac_nonzero"], shown.get(row["index"], []))
        if row["sourceSetName"] != source["setName"]:
            raise DataError(f"{where}: sourceSetName is {row['sourceSetName']!r}, not {source['setName']!r}.")
        for passage in shown.get(row["index"], []):
            _check_peak(where, passage)


def _check_peak(where: str, row: dict[str, Any]) -> None:
    largest = max(row["values"])
    if row["maxValue"] != largest or row["values"][row["maxValueTokenIndex"]] != largest:
        raise DataError(f"{where}: maxValue or maxValueTokenIndex of {row['id']} is not that of its values.")
    if row["qualifyingTokenIndex"] >= len(row["values"]):
        raise DataError(f"{where}: qualifyingTokenIndex of {row['id']} is beyond its {len(row['values'])} tokens.")


def read(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file."""
    with gzip.open(file, "rt", encoding="utf-8") as handle:
        for line in handle:
            yield json.loads(line)
