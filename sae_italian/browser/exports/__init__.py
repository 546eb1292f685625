"""A cache's latents in the formats of other tools: claim a folder, and write it latent by latent.

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
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.autointerp.choose import LOOKUP
from sae_italian.autointerp.store import NOW
from sae_italian.base.errors import UsageError
from sae_italian.base.hub import WandbRun
from sae_italian.base.pace import progress
from sae_italian.base.storage import atomic_path, claimed, fingerprint, path_of, read_json, write_text
from sae_italian.browser.contexts import storable
from sae_italian.browser.directions import rounded
from sae_italian.browser.exports.latents import Facts, Latents, facts_of, make_row, names_of, row_id, tables
from sae_italian.browser.source import LatentSource
from sae_italian.browser.widget import card_html, list_html
from sae_italian.browser.write import write_browser
from sae_italian.cache import FeatureCache
from sae_italian.circuits.show import cantor
from sae_italian.models import load_model_config

BATCH = 128  # latents of a file
N_CARDS = 20  # of the latents with the best scores, on the page that W&B shows
NO_DECODER = (
    "logit histograms, neuron alignment and correlated neurons: the SAE or its model is not at hand (give --sae)"
)


class Export(NamedTuple):
    """What was written: the folder, how many latents are in it, and what could not be filled."""

    to: str
    folder: Path
    n_latents: int
    lost: list[str]

    def text(self) -> str:
        written = f"written: {self.folder}, {self.n_latents:,} latents"
        return "\n".join([written, *(f"left empty: {what}" for what in self.lost)])


# --- files of rows -----------------------------------------------------------------------------------------------------


def write_rows(file: Path, rows: Iterable[Facts]) -> None:
    """Write the rows of one file: a .json holds one, others have one a line; the same rows give the same bytes."""
    compact = None if file.suffix == ".json" else (",", ":")
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False, separators=compact) for row in rows)
    if file.suffix != ".gz":
        write_text(file, "\n".join(lines) + "\n" * bool(compact))
        return
    with (
        atomic_path(file) as temporary,
        temporary.open("wb") as handle,
        gzip.GzipFile(fileobj=handle, mode="wb", mtime=0, compresslevel=6, filename="") as packed,
    ):
        for line in lines:
            packed.write(f"{line}\n".encode())


# --- the rows of each format: the facts that fill them, for a batch of latents ------------------------------------------


def _features(latents: Latents, batch: range) -> Iterator[Facts]:
    rows = []
    for latent in batch:
        activations = [make_row("batch_activation", passage) for passage in latents.passages(latent)]
        rows.append(make_row("batch_feature", {**latents.record(latent), "activations": activations}))
    yield {**latents.facts, "features": rows}


def _activations(latents: Latents, batch: range) -> Iterator[Facts]:
    for latent in batch:
        for number, passage in enumerate(latents.passages(latent)):
            key = row_id(latents.facts, "activation", latent, number)
            yield {**latents.facts, **passage, "index": str(latent), "row_id": key}


def _explanations(latents: Latents, batch: range) -> Iterator[Facts]:
    """Yield the Italian and the English text of each explanation as a row of its own."""
    store = latents.source.store()
    query = """SELECT latent, explainer, text_it, text_en FROM explanation
               WHERE latent BETWEEN ? AND ? AND status = 'ok' AND explainer NOT IN (?, ?) ORDER BY latent, id"""
    bounds = (batch.start, batch.stop - 1, LOOKUP, LOOKUP + NOW)
    for latent, explainer, *texts in store.connection.execute(query, bounds).fetchall() if store else ():
        score = latents.detection[explainer].get(latent)
        for language, text in zip(("it", "en"), texts, strict=True):
            if text:
                notes = {"explainer": explainer, "language": language, "detection_balanced_accuracy": score}
                key = row_id(latents.facts, "explanation", latent, explainer, language)
                own = {"index": str(latent), "row_id": key, "description": storable(text)}
                yield {**latents.facts, **own, "notes": json.dumps(notes, ensure_ascii=False, allow_nan=False)}


def circuit_feature(latents: Latents, latent: int) -> Facts:
    """Return the facts of a latent's row for circuit-tracer's page: its passages by quantile, and its tokens."""
    quantiles = []
    for (lo, hi), passages in groupby(latents.passages(latent, digits=17), key=itemgetter("lo", "hi")):
        name = f"Activations from {lo:.3g} to {hi:.3g}" if lo >= 0 else "Top activations"
        examples = [make_row("circuit_example", passage) for passage in passages]
        quantiles.append({"quantile_name": name, "examples": examples})
    value = latents.cache.latent(latent).value
    bounds = {"smallest": rounded(value.min() if len(value) else 0.0), "largest": rounded(value.max(initial=0.0))}
    return {"latent": latent, **latents.logits(latent), **bounds, "examples_quantiles": quantiles}


class Form(NamedTuple):
    """A format of files: the folder that facts name, files that are written once, and those of each batch of latents.

    Of each file is given the table of its rows, and of a batch's what yields their facts. The `{}` of its name is the
    batch's `number` (of the facts, the batch and its first latent); the last file is written last, so what is there is whole.
    """

    folder: str
    once: dict[str, str]
    batches: dict[str, tuple[str, Callable[[Latents, range], Iterable[Facts]]]]
    size: int = BATCH  # latents of a batch, more where there would be more than `most` of them
    most: int = sys.maxsize
    number: Callable[[Facts, int, int], int] = lambda facts, batch, first: batch


FORMS = {
    "neuronpedia": Form(
        "{model}_{source_set}_{hook_name}_{d_sae}{ending}",
        {f"{name}.json": name for name in ("run_settings", "skipped_indexes")},
        {"batch-{}.json": ("batch", _features)},
    ),
    "neuronpedia-bulk": Form(
        "{model}/{source}",
        {f"{name}.jsonl": name for name in ("release", "model", "sourceset", "source")},
        {
            "explanations/batch-{}.jsonl.gz": ("explanation", _explanations),
            "activations/batch-{}.jsonl.gz": ("activation", _activations),
            "features/batch-{}.jsonl.gz": ("neuron", lambda latents, batch: map(latents.record, batch)),
        },
        most=1000,  # files of a folder that its importer sees
    ),
    "circuit-tracer": Form(
        "features/{release}",
        {},
        {"{}.json": ("circuit_feature", lambda latents, batch: [circuit_feature(latents, i) for i in batch])},
        size=1,
        number=lambda facts, batch, first: cantor(facts["layer"], first),
    ),
}


def _write(folder: Path, to: str, latents: Latents, wanted: range, bar: Any) -> None:
    """Write what is not there yet of some latents."""
    form = FORMS[to]
    size = max(form.size, -(-len(wanted) // form.most))
    for file, table in form.once.items():
        write_rows(folder / file, [make_row(table, latents.facts)])
    for number, first in enumerate(range(wanted.start, wanted.stop, size)):
        batch = range(first, min(first + size, wanted.stop))
        name = form.number(latents.facts, number, first)
        files = [(folder / file.format(name), *rows) for file, rows in form.batches.items()]
        if not files[-1][0].is_file():
            for file, table, facts in files:
                write_rows(file, (make_row(table, own) for own in facts(latents, batch)))
        bar.update(len(batch))


# --- W&B ---------------------------------------------------------------------------------------------------------------


def wandb_row(latents: Latents, latent: int) -> Facts:
    """Return a row of the table: the latent's row in the browser's list, its logits, and its strongest passage."""
    record, logits = latents.source.row(latent), latents.logits(latent)
    lists = {"top_tokens": record["top_tokens"], "promoted": logits["pos_str"], "suppressed": logits["neg_str"]}
    joined = {name: " ".join(f"«{token.strip()}»" for token in tokens) for name, tokens in lists.items()}
    return make_row("wandb_latent", {**record, **joined, "example": latents.strongest(latent)})


def _wandb(out: Path, latents: Latents, wanted: range, project: str | None, online: bool) -> Path:
    """Log table, a page and the browser as one W&B run below `out`; return the run's folder, which `wandb sync` sends.

    It joins project and group of the run that trained the SAE and, online, uses that run's artifact. Raises: UsageError
    without the package wandb.
    """
    try:
        import wandb
    except ImportError:
        raise UsageError("W&B is not installed; it comes with pip install 'sae-italian[sweeps]'.") from None
    table = [wandb_row(latents, latent) for latent in wanted]
    write_browser(out / "browser", latents.source)
    source, trained = latents.source, WandbRun.of(latents.cache.manifest.sae)
    trained = trained._replace(project=project or trained.project)
    best = sorted(table, key=lambda row: -(row["detection"] or 0.0))[:N_CARDS]
    cards = (card_html(source.row(row["latent"]), source.card(row["latent"])) for row in best)
    page = "".join([list_html(source.run(), source.rows()), *cards])
    settings: Any = {
        "settings": wandb.Settings(console="off", silent=True, reinit="create_new"),
        "mode": "online" if online else "offline",
    }
    with wandb.init(job_type="latents", name=source.run()["title"], **settings, **trained.joined(out)) as run:
        if trained.id and online:
            run.use_artifact(f"sae-{trained.id}:latest")  # what training sent: the lineage of these latents
        names = list(tables()["wandb_latent"]["fields"])
        run.log({"latents": wandb.Table(columns=[*names], data=[list(row.values()) for row in table])})
        run.log({"strongest": wandb.Html(page, inject=False)})  # in one piece
        artifact = wandb.Artifact("latent-browser", type="html", description="open index.html")
        artifact.add_dir(str(out / "browser"))
        run.log_artifact(artifact)
        return Path(run.dir).parent


# --- the export ----------------------------------------------------------------------------------------------------------


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
    """Write a cache's latents (first, last, inclusive; default all) into `out` in another tool's format.

    `to` is `wandb` or one of FORMS. `names` are `model`, `source_set`, `suffix`, `creator` and `creator_name` for Neuronpedia.
    `sae` and `model` fill what is read off the weights; without them these fields are empty and named in `lost`.
    Raises: UsageError for names that Neuronpedia refuses, latents that are not there, and a folder that holds something
    else.
    """
    out, manifest = path_of(out), cache.manifest
    first, last = manifest.latent_bounds(latents)
    called, wanted = names_of(manifest, **(names or {})), range(first, last + 1)
    here = sae is not None and model is not None
    spec = {"to": to, "manifest": manifest.identity(), "latents": [first, last], "names": called, "with_sae": here}
    source = LatentSource(cache, tokenizer, sae=sae, model=model)
    # rows of before other explanations and of after them are no one export
    told = {"explained": fingerprint(str([source.explanations, source.scores, source.labels]))}
    with claimed(out, "export", spec | told, resume=resume, overwrite=overwrite, defaults=told):
        with progress(to, total=len(wanted), unit="latent") as bar:
            if to == "wandb":
                return Export(to, _wandb(out, Latents(source), wanted, project, online), len(wanted), [])
            config = None if to != "neuronpedia-bulk" else model.config if model else load_model_config(manifest.model)
            facts = facts_of(manifest, called, config, sae)
            folder = out / FORMS[to].folder.format_map(facts)
            facts |= {"n_batches": -(-len(wanted) // BATCH), "outputs_dir": str(folder.parent)}
            facts["created"] = read_json(out / "run.json")["created"]  # a resumed export keeps its date
            _write(folder, to, Latents(source, facts), wanted, bar)
        return Export(to, folder, len(wanted), [] if here or to == "circuit-tracer" else [NO_DECODER])
