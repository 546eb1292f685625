"""A cache's latents in the formats of other tools: claim a folder, write it latent by latent, check all of it.

neuronpedia        <out>/<model>_<set>_<hook_name>_<d_sae>[_<suffix>]/batch-<k>.json, run_settings.json,
                   skipped_indexes.json: the folder that SAEDashboard's runner writes, without its pickle of tokens.
neuronpedia-bulk   <out>/<model>/<source>/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl (one line each) and
                   {features,activations,explanations}/batch-<k>.jsonl.gz. The importer takes the columns of a file from
                   its first line and drops rows whose id it has seen, so every line has the same keys, and ids are
                   unique and the same at every export of a cache.
circuit-tracer     <out>/features/<scan>/<Cantor pair of layer and latent>.json, which graph pages read beside a graph.
wandb              the table `latents` and the browser's folder as an artifact, in one run that is offline unless asked.

Token strings come from character offsets, intervals hold no zeros, and no passage of a latent is there twice.
`fields.yaml` says what every field of every format is and what fills it; `latents.py` makes the facts.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.autointerp.run import EXPLAINER, LOOKUP
from sae_italian.autointerp.scorers.binary import HEADLINE
from sae_italian.autointerp.store import NOW, Store
from sae_italian.base.errors import DataError, UsageError, nearest
from sae_italian.base.hub import WandbRun
from sae_italian.base.pace import progress
from sae_italian.base.storage import atomic_path, claimed, read_json, write_text
from sae_italian.browser.contexts import storable
from sae_italian.browser.directions import rounded
from sae_italian.browser.exports.latents import Facts, FieldCheck, Latents, facts_of, make_row, names_of, row_id, tables
from sae_italian.browser.source import LatentSource
from sae_italian.browser.widget import card_html, list_html
from sae_italian.browser.write import write_browser
from sae_italian.cache import FeatureCache, Manifest
from sae_italian.circuits.show import cantor
from sae_italian.models import load_model_config

BATCH, MAX_FILES = 128, 1000  # latents of a file; the bulk importer sees 1000 files of a folder
N_CARDS = 20  # of the latents with the best scores, on the page that W&B shows
ONE_LINE = ("release", "model", "sourceset", "source")
# The tables of each format by the files that hold their rows, and the one that has a row for each latent.
TABLES = {
    "neuronpedia": (
        {"batch-*": "batch", "run_settings": "run_settings", "skipped_indexes": "skipped_indexes"},
        "batch_feature",
    ),
    "neuronpedia-bulk": (
        {name: name for name in ONE_LINE}
        | {"features/*": "neuron", "activations/*": "activation", "explanations/*": "explanation"},
        "neuron",
    ),
    "circuit-tracer": ({"[0-9]*": "circuit_feature"}, "circuit_feature"),
}


NO_DECODER = (
    "logit histograms, neuron alignment and correlated neurons: the SAE or its model is not at hand (give --sae)"
)


class Export(NamedTuple):
    """What was written: the folder, how many rows of each table fit, and what could not be filled."""

    to: str
    folder: Path
    rows: dict[str, int]
    lost: list[str]

    def text(self) -> str:
        counts = ", ".join(f"{n:,} {name}" for name, n in self.rows.items())
        lines = [f"written: {self.folder}", f"checked against the table of fields: {counts}"]
        return "\n".join([*lines, *(f"left empty: {what}" for what in self.lost)])


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


def check_folder(folder: Path, to: str, n_latents: int) -> dict[str, int]:
    """Check every row of an export against the table of fields; return the rows of each table.

    Raises: DataError at the first that does not fit, and when a latent is missing.
    """
    (names, latents), checked = TABLES[to], FieldCheck()
    for pattern, table in names.items():
        for file in sorted(folder.glob(f"{pattern}.json*")):
            for number, row in enumerate(read_rows(file), 1):
                checked(table, row, f"{file.relative_to(folder)}, line {number}")
    if checked.n_rows[latents] != n_latents:
        raise DataError(f"{folder} holds {checked.n_rows[latents]} of {n_latents} latents. Write the export again.")
    return dict(checked.n_rows)


def read_rows(file: Path) -> Iterator[Facts]:
    """Yield the rows of one file."""
    if file.suffix == ".json":
        yield read_json(file)
        return
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as handle:
        yield from map(json.loads, handle)


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


# --- Neuronpedia's bulk-import folder ----------------------------------------------------------------------------------


def write_bulk(task: ExportTask) -> None:
    for name in ONE_LINE:
        write_text(task.folder / f"{name}.jsonl", _line(make_row(name, task.facts)))
    store = task.latents.source.store()
    scores = _scores(store) if store else {}
    for number, batch in task.batches(max(BATCH, -(-len(task.wanted) // MAX_FILES))):
        explanations, activations, features = (
            task.folder / name / f"batch-{number}.jsonl.gz" for name in ("explanations", "activations", "features")
        )
        if not features.is_file():
            _write_rows(explanations, _explanations(task, store, scores, batch) if store else ())
            _write_rows(activations, _activations(task, batch))
            records = ({**task.facts, **task.latents.record(latent)} for latent in batch)
            _write_rows(features, (make_row("neuron", record) for record in records))


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
    test: dict[str, Any] = {"control": "", "scorer": "detection", "metric": "balanced_accuracy"}
    return {
        name: store.values(
            explainer=name,
            judge="rule" if name.removesuffix(NOW) == EXPLAINER else llm,
            negatives=HEADLINE["detection"],
            **test,
        )
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


# --- circuit-tracer's feature files ------------------------------------------------------------------------------------


def write_features(task: ExportTask) -> None:
    for _, (latent,) in task.batches(1):
        file = task.folder / f"{cantor(task.facts['layer'], latent)}.json"
        if not file.is_file():
            write_text(file, _json(circuit_feature(task.latents, latent)))


def circuit_feature(latents: Latents, latent: int) -> Facts:
    """Return a latent's passages by quantile and its tokens, as circuit-tracer's page wants them."""
    quantiles = []
    for (lo, hi), passages in groupby(latents.passages(latent, digits=17), key=itemgetter("lo", "hi")):
        name = f"Activations from {lo:.3g} to {hi:.3g}" if lo >= 0 else "Top activations"
        examples = [make_row("circuit_example", passage) for passage in passages]
        quantiles.append({"quantile_name": name, "examples": examples})
    value = latents.cache.latent(latent).value
    bounds = {"smallest": rounded(value.min() if len(value) else 0.0), "largest": rounded(value.max(initial=0.0))}
    facts = {"latent": latent, **latents.logits(latent), **bounds, "examples_quantiles": quantiles}
    return make_row("circuit_feature", facts)


# --- W&B ---------------------------------------------------------------------------------------------------------------


def wandb_row(latents: Latents, latent: int) -> Facts:
    """Return a row of the table: the latent's row in the browser's list, its logits, and its strongest passage."""
    record, logits = latents.source.row(latent), latents.logits(latent)
    lists = {"top_tokens": record["top_tokens"], "promoted": logits["pos_str"], "suppressed": logits["neg_str"]}
    joined = {name: " ".join(f"«{token.strip()}»" for token in tokens) for name, tokens in lists.items()}
    return make_row("wandb_latent", {**record, **joined, "example": latents.strongest(latent)})


def _wandb(
    out: Path, latents: Latents, wanted: range, project: str | None, online: bool
) -> tuple[Path, dict[str, int]]:
    """Log table, a page and the browser as one W&B run below `out`; return the run's folder, which `wandb sync` sends.

    It joins project and group of the run that trained the SAE and, online, uses that run's artifact. Raises: UsageError
    without the package wandb.
    """
    try:
        import wandb
    except ImportError:
        raise UsageError("W&B is not installed; it comes with pip install 'sae-italian[sweeps]'.") from None
    table, checked = [wandb_row(latents, latent) for latent in wanted], FieldCheck()
    for row in table:
        checked("wandb_latent", row)
    write_browser(out / "browser", latents.source)
    source, trained = latents.source, WandbRun.of(latents.cache.manifest.sae)
    trained = trained._replace(project=project or trained.project)
    best = sorted(table, key=lambda row: -(row["detection"] or 0.0))[:N_CARDS]
    cards = (card_html(source.row(row["latent"]), source.card(row["latent"])) for row in best)
    page = "".join([list_html(source.run(), source.rows()), *cards])
    settings: Any = {"settings": wandb.Settings(console="off", silent=True, reinit="create_new")}
    settings["mode"] = "online" if online else "offline"
    with wandb.init(job_type="latents", name=source.run()["title"], **settings, **trained.joined(out)) as run:
        if trained.id and online:
            run.use_artifact(f"sae-{trained.id}:latest")  # what training sent: the lineage of these latents
        names = list(tables()["wandb_latent"]["fields"])
        run.log({"latents": wandb.Table(columns=[*names], data=[list(row.values()) for row in table])})
        run.log({"strongest": wandb.Html(page, inject=False)})  # in one piece
        artifact = wandb.Artifact("latent-browser", type="html", description="open index.html")
        artifact.add_dir(str(out / "browser"))
        run.log_artifact(artifact)
        return Path(run.dir).parent, dict(checked.n_rows)


# --- the export ----------------------------------------------------------------------------------------------------------

WRITERS = {"neuronpedia": write_batches, "neuronpedia-bulk": write_bulk, "circuit-tracer": write_features}
FORMATS = (*WRITERS, "wandb")


def export(
    cache: FeatureCache,
    tokenizer: Any,
    out: str | Path,
    to: str,
    *,
    sae: Any = None,
    model: Any = None,
    latents: tuple[int, int] | None = None,
    names: dict[str, Any] | None = None,
    project: str | None = None,
    online: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> Export:
    """Write a cache's latents (first, last, inclusive; default all) into `out` in another tool's format, and check it.

    `to` is one of FORMATS. `names` are `model`, `source_set`, `suffix`, `creator` and `creator_name` for Neuronpedia.
    `sae` and `model` fill what is read off the weights; without them these fields are empty and named in `lost`.
    Raises: UsageError for another format, names that Neuronpedia refuses, latents that are not there, and a folder that
    holds something else; DataError when what was written does not fit the table of fields.
    """
    if to not in FORMATS:
        raise UsageError(f"{to!r} is no format for an export. {nearest(to, FORMATS)}")
    out, manifest = Path(out), cache.manifest
    first, last = manifest.latent_bounds(latents)
    called, wanted = names_of(manifest, **(names or {})), range(first, last + 1)
    here = sae is not None and model is not None
    spec = {"to": to, "manifest": manifest.identity(), "latents": [first, last], "names": called, "with_sae": here}
    with claimed(out, "export", spec, resume=resume, overwrite=overwrite):
        source = Latents(LatentSource(cache, tokenizer, sae=sae, model=model), model)
        with progress(to, total=len(wanted), unit="latent") as bar:
            if to == "wandb":
                return Export(to, *_wandb(out, source, wanted, project, online), [])
            config = None if to != "neuronpedia-bulk" else model.config if model else load_model_config(manifest.model)
            facts = facts_of(manifest, called, config, sae)
            facts["created"] = read_json(out / "run.json")["created"]  # a resumed export keeps its date
            folder = _folder(out, to, facts, manifest)
            WRITERS[to](ExportTask(folder, source, facts, wanted, bar))
        rows = check_folder(folder, to, len(wanted))
        return Export(to, folder, rows, [] if here or to == "circuit-tracer" else [NO_DECODER])


def _folder(out: Path, to: str, facts: Facts, manifest: Manifest) -> Path:
    ending = f"_{facts['suffix']}" if facts["suffix"] else ""
    folders = {
        "neuronpedia": f"{facts['model']}_{facts['source_set']}_{manifest.hook_name}_{manifest.d_sae}{ending}",
        "neuronpedia-bulk": f"{facts['model']}/{facts['source']}",
        "circuit-tracer": f"features/{facts['release']}",
    }
    return out / folders[to]
