"""The formats: what each writes for some latents, and what its check reads back.

neuronpedia        <out>/<model>_<set>_<hook_name>_<d_sae>[_<suffix>]/batch-<k>.json, run_settings.json,
                   skipped_indexes.json: the folder that SAEDashboard's runner writes, without its pickle of tokens.
neuronpedia-bulk   <out>/<model>/<source>/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl (one line each) and
                   {features,activations,explanations}/batch-<k>.jsonl.gz. The importer takes the columns of a file from
                   its first line and drops rows whose id it has seen, so every line has the same keys, and ids are
                   unique and the same at every export of a cache.
circuit-tracer     <out>/features/<scan>/<Cantor pair of layer and latent>.json, which graph pages read beside a graph.
wandb              the table `latents` and the browser's folder as an artifact, in one run that is offline unless asked.

Token strings come from character offsets, intervals hold no zeros, and no passage of a latent is there twice.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.autointerp.run import EXPLAINER, LOOKUP, STORE_FILE
from sae_italian.autointerp.scorers.binary import HEADLINE
from sae_italian.autointerp.store import NOW, Store
from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import atomic_path, read_json, write_text
from sae_italian.browser.contexts import storable
from sae_italian.browser.directions import rounded
from sae_italian.browser.exports.fields import FieldCheck, make_row, tables
from sae_italian.browser.exports.latents import Facts, Latents, cantor, row_id

BATCH, MAX_FILES = 128, 1000  # latents of a file; the bulk importer sees 1000 files of a folder
ONE_LINE = ("release", "model", "sourceset", "source")
MANY = {"features": "neuron", "activations": "activation", "explanations": "explanation"}
LINKS = {
    "sourceset.releaseName": "release.name",
    "sourceset.modelId": "model.id",
    "source.modelId": "model.id",
    "source.setName": "sourceset.name",
    "source.id": "sourceset.name",  # between the layer and the suffix
    "release.defaultSourceId": "source.id",
}


class ExportTask(NamedTuple):
    """Some latents to be written into a folder; files that are there already are kept."""

    folder: Path
    latents: Latents
    facts: Facts
    wanted: range
    bar: Any

    def batches(self, size: int) -> Iterator[tuple[int, range]]:
        for number, first in enumerate(range(self.wanted.start, self.wanted.stop, size)):
            batch = range(first, min(first + size, self.wanted.stop))
            yield number, batch
            self.bar.update(len(batch))


def _json(value: Any, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **how)


def _check_activity(where: str, density: float, activations: list[Facts]) -> None:
    """Raise DataError for a latent that is active but shows nothing, and for a passage in which it is silent."""
    if density > 0 and not activations:
        raise DataError(f"{where}: it is active but has no passage.")
    for row in activations:
        if max(row["values"], default=0.0) <= 0:
            raise DataError(f"{where}: a passage in which it is silent: {''.join(row['tokens'])[:60]!r}.")


# --- Neuronpedia's batch JSON ----------------------------------------------------------------------------------------


def write_batches(task: ExportTask) -> None:
    for number, batch in task.batches(BATCH):
        file = task.folder / f"batch-{number}.json"
        if not file.is_file():
            features = [_feature(task, latent) for latent in batch]
            write_text(file, _json(make_row("batch", {**task.facts, "features": features})))
    n_batches = -(-len(task.wanted) // BATCH)
    facts = {**task.facts, "n_batches": n_batches, "outputs_dir": str(task.folder.parent)}
    write_text(task.folder / "run_settings.json", _json(make_row("run_settings", facts), indent=2))
    write_text(task.folder / "skipped_indexes.json", _json(make_row("skipped_indexes", facts)))


def _feature(task: ExportTask, latent: int) -> Facts:
    record = task.latents.record(latent)
    activations = [make_row("batch_activation", passage) for passage in task.latents.passages(latent)]
    return make_row("batch_feature", {**task.facts, **record, "activations": activations})


def check_batches(folder: Path) -> dict[str, int]:
    """Check every file against the table of fields; return the rows of each table. Raises: DataError."""
    checked = FieldCheck()
    for file, batch in read_batches(folder):
        checked("batch", batch, file.name)
        for row in batch["features"]:
            _check_activity(f"{file.name}, feature {row['feature_index']}", row["frac_nonzero"], row["activations"])
    for name in ("run_settings", "skipped_indexes"):
        checked(name, read_json(folder / f"{name}.json"))
    return checked.finish()


def read_batches(folder: Path) -> Iterator[tuple[Path, Facts]]:
    """Yield every batch of a folder with its file, in order. Raises: DataError when one is missing."""
    n = read_json(folder / "run_settings.json")["end_batch"]
    for file in (folder / f"batch-{number}.json" for number in range(n)):
        if not file.is_file():
            raise DataError(f"{file} is missing; the export has {n} batches. Write it again.")
        yield file, read_json(file)


# --- Neuronpedia's bulk-import folder ----------------------------------------------------------------------------------


def write_bulk(task: ExportTask) -> None:
    for name in ONE_LINE:
        write_text(task.folder / f"{name}.jsonl", _line(make_row(name, task.facts)))
    store = task.latents.cache.folder / STORE_FILE
    with Store(store, {}) if store.is_file() else nullcontext() as opened:
        scores = _scores(opened) if opened else {}
        for number, batch in task.batches(max(BATCH, -(-len(task.wanted) // MAX_FILES))):
            files = {name: task.folder / name / f"batch-{number}.jsonl.gz" for name in MANY}
            if not files["features"].is_file():
                _write_rows(files["explanations"], _explanations(task, opened, scores, batch) if opened else ())
                _write_rows(files["activations"], _activations(task, batch))
                records = ({**task.facts, **task.latents.record(latent)} for latent in batch)
                _write_rows(files["features"], (make_row("neuron", record) for record in records))


def _line(row: Facts) -> str:
    return _json(row, separators=(",", ":")) + "\n"


def _write_rows(file: Path, rows: Iterable[Facts]) -> None:
    with (
        atomic_path(file) as temporary,
        temporary.open("wb") as handle,
        gzip.GzipFile(fileobj=handle, mode="wb", mtime=0, compresslevel=6, filename="") as packed,
    ):
        for row in rows:
            packed.write(_line(row).encode())


def _activations(task: ExportTask, batch: range) -> Iterator[Facts]:
    for latent in batch:
        for number, passage in enumerate(task.latents.passages(latent)):
            key = row_id(task.facts, "activation", latent, number)
            yield make_row("activation", {**task.facts, **passage, "index": str(latent), "row_id": key})


def _scores(store: Store) -> dict[str, dict[int, float]]:
    """Return the detection of every explainer's texts by latent, each by the judge that reads such texts."""
    llm = next((judge for judge in store.judges() if judge != "rule" and not judge.startswith("always-")), "rule")
    test: dict[str, Any] = {
        "control": "",
        "scorer": "detection",
        "metric": "balanced_accuracy",
        "negatives": HEADLINE["detection"],
    }
    return {
        name: store.values(explainer=name, judge="rule" if name.removesuffix(NOW) == EXPLAINER else llm, **test)
        for name in store.explainers()
        if name.removesuffix(NOW) != LOOKUP
    }


def _explanations(task: ExportTask, store: Store, scores: dict[str, dict[int, float]], batch: range) -> Iterator[Facts]:
    """Yield the Italian and the English text of each explanation as a row of its own."""
    query = """SELECT latent, explainer, text_it, text_en FROM explanation
               WHERE latent BETWEEN ? AND ? AND status = 'ok' AND explainer NOT IN (?, ?) ORDER BY latent, id"""
    found = store.connection.execute(query, (batch.start, batch.stop - 1, LOOKUP, LOOKUP + NOW)).fetchall()
    for latent, explainer, *texts in found:
        score = scores[explainer].get(latent)
        for language, text in zip(("it", "en"), texts, strict=True):
            if text:
                notes = {"explainer": explainer, "language": language, "detection_balanced_accuracy": score}
                facts = {"index": str(latent), "description": storable(text), "notes": _json(notes)}
                facts["row_id"] = row_id(task.facts, "explanation", latent, explainer, language)
                yield make_row("explanation", {**task.facts, **facts})


def check_bulk(folder: Path) -> dict[str, int]:
    """Check every line: the table of fields, foreign keys, neighbours, and that nothing active is bare.

    Raises: DataError naming the first thing that does not fit.
    """
    checked = FieldCheck()
    one = {name: next(read_rows(folder / f"{name}.jsonl")) for name in ONE_LINE}
    for name, row in one.items():
        checked(name, row)
    for link, target in LINKS.items():
        given, wanted = (one[table][name] for table, name in (link.split("."), target.split(".")))
        if link == "source.id":
            given = given.partition("-")[2].partition("__")[0]
        if given != wanted:
            raise DataError(f"{link} is {given!r}, which names nothing here; {wanted!r} was expected.")
    files = {name: sorted(path.name for path in (folder / name).glob("*.jsonl.gz")) for name in MANY}
    if not files["features"] == files["activations"] == files["explanations"]:
        raise DataError(f"{folder}: features, activations and explanations hold different batches. Write it again.")
    if not 0 < len(files["features"]) <= MAX_FILES:
        raise DataError(f"{folder}/features holds {len(files['features'])} files; the importer sees 1 to {MAX_FILES}.")
    for file in files["features"]:
        _check_batch(checked, folder, file, one["source"])
    return checked.finish()


def _check_batch(checked: FieldCheck, folder: Path, file: str, source: Facts) -> None:
    rows = {name: list(read_rows(folder / name / file)) for name in MANY}
    shown: dict[str, list[Facts]] = {row["index"]: [] for row in rows["features"]}
    for name, table in MANY.items():
        for number, row in enumerate(rows[name]):
            where = f"{name}/{file}, line {number + 1}"
            checked(table, row, where)
            if (row["modelId"], row["layer"]) != (source["modelId"], source["id"]):
                raise DataError(f"{where}: {row['modelId']}/{row['layer']} is not the source of this export.")
            if row["index"] not in shown:
                raise DataError(f"{where}: latent {row['index']} has no line in features/{file}.")
            if name == "features" and row["sourceSetName"] != source["setName"]:
                raise DataError(f"{where}: sourceSetName is {row['sourceSetName']!r}, not {source['setName']!r}.")
            if name == "activations":
                shown[row["index"]].append(row)
    for row in rows["features"]:
        where = f"features/{file}, latent {row['index']}"
        _check_activity(where, row["frac_nonzero"], shown[row["index"]])
        for passage in shown[row["index"]]:
            _check_peak(f"{where}, activation {passage['id']}", passage)


def _check_peak(where: str, row: Facts) -> None:
    largest = max(row["values"])
    if row["maxValue"] != largest or row["values"][row["maxValueTokenIndex"]] != largest:
        raise DataError(f"{where}: maxValue or maxValueTokenIndex is not that of its values.")
    if row["qualifyingTokenIndex"] >= len(row["values"]):
        raise DataError(f"{where}: qualifyingTokenIndex is beyond its {len(row['values'])} tokens.")


def read_rows(file: Path) -> Iterator[Facts]:
    """Yield the rows of one file."""
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as handle:
        yield from map(json.loads, handle)


# --- circuit-tracer's feature files ------------------------------------------------------------------------------------


def write_features(task: ExportTask) -> None:
    for _, (latent,) in task.batches(1):
        file = task.folder / f"{cantor(task.facts['layer'], latent)}.json"
        if not file.is_file():
            write_text(file, _json(_circuit_feature(task.latents, latent)))


def _circuit_feature(latents: Latents, latent: int) -> Facts:
    quantiles = []
    for (lo, hi), passages in groupby(latents.passages(latent, digits=17), key=itemgetter("lo", "hi")):
        name = f"Activations from {lo:.3g} to {hi:.3g}" if lo >= 0 else "Top activations"
        examples = [make_row("circuit_example", passage) for passage in passages]
        quantiles.append({"quantile_name": name, "examples": examples})
    value = latents.cache.latent(latent).value
    bounds = {"smallest": rounded(value.min() if len(value) else 0.0), "largest": rounded(value.max(initial=0.0))}
    facts = {"latent": latent, **latents.logits(latent), **bounds, "examples_quantiles": quantiles}
    return make_row("circuit_feature", facts)


def check_features(folder: Path, layer: int, wanted: range) -> dict[str, int]:
    """Check the file of each wanted latent; return the rows of each table. Raises: DataError at the first that is wrong."""
    checked = FieldCheck()
    for latent in wanted:
        file = folder / f"{cantor(layer, latent)}.json"
        if not file.is_file():
            raise DataError(f"{file} is missing: the file of latent {latent}. Write the export again.")
        row = read_json(file)
        checked("circuit_feature", row, file.name)
        if row["index"] != latent:
            raise DataError(f"{file} holds latent {row['index']}, not {latent}.")
        if row["act_max"] > 0 and not row["examples_quantiles"]:
            raise DataError(f"{file}: the latent is active but has no example.")
    return checked.finish()


# --- W&B ---------------------------------------------------------------------------------------------------------------


def wandb_row(latents: Latents, record: Any) -> Facts:
    """Return a row of the table: the latent's row in the browser's list, its logits, and its strongest passage."""
    logits = latents.logits(record["latent"])
    lists = {"top_tokens": record["top_tokens"], "promoted": logits["pos_str"], "suppressed": logits["neg_str"]}
    joined = {name: " ".join(f"«{token.strip()}»" for token in tokens) for name, tokens in lists.items()}
    return make_row("wandb_latent", {**record, **joined, "example": latents.strongest(record["latent"])})


def log_table(out: Path, table: list[Facts], browser: Path, *, project: str, online: bool, name: str) -> Path:
    """Log table and artifact as one W&B run below `out`; return the run's folder, which `wandb sync` sends.

    Raises: UsageError without the package wandb.
    """
    try:
        import wandb
    except ImportError:
        raise UsageError("W&B is not installed; it comes with pip install 'sae-italian[sweeps]'.") from None
    settings = wandb.Settings(console="off", silent=True, reinit="create_new")
    mode: Any = "online" if online else "offline"
    with wandb.init(
        project=project, job_type="latents", name=name, dir=str(out.resolve()), mode=mode, settings=settings
    ) as run:
        names = list(tables()["wandb_latent"]["fields"])
        run.log({"latents": wandb.Table(columns=[*names], data=[list(row.values()) for row in table])})
        artifact = wandb.Artifact("latent-browser", type="html", description="open index.html")
        artifact.add_dir(str(browser))
        run.log_artifact(artifact)
        return Path(run.dir).parent
