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
from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.autointerp.run import LOOKUP
from sae_italian.autointerp.store import Explanation, Store
from sae_italian.autointerp.summary import HEADLINE
from sae_italian.browser.exports.fields import Check, in_order
from sae_italian.browser.exports.latents import Latents
from sae_italian.browser.exports.names import Names
from sae_italian.browser.exports.neuronpedia_batch import bounds, check_activity
from sae_italian.browser.exports.passages import Interval, Passage, rounded, storable
from sae_italian.errors import DataError
from sae_italian.models.catalogue import config_facts
from sae_italian.storage import atomic_path, write_text

BATCH, MAX_FILES = 128, 1000  # the importer sees 1000 files of a folder
ONE_LINE = ("release", "model", "sourceset", "source")
MANY = {"features": "neuron", "activations": "activation", "explanations": "explanation"}


class About(NamedTuple):
    """What the one-line files say besides names: the model's configuration, the SAE's, and when the export was made."""

    config: Any
    sae_config: dict[str, Any] | None
    created: str


def write(folder: Path, latents: Latents, names: Names, wanted: range, about: About, store: Path | None, bar: Any):
    """Write the rows of the wanted latents into `folder`; batches that are there already are kept."""
    for name, row in _one_line(latents, names, about).items():
        write_text(folder / f"{name}.jsonl", _line(row))
    size = max(BATCH, -(-len(wanted) // MAX_FILES))
    for number, first in enumerate(range(wanted.start, wanted.stop, size)):
        batch = range(first, min(first + size, wanted.stop))
        if not (folder / "features" / _file(number)).is_file():
            described = _explanations(store, batch, names, about.created)
            _write(folder / "explanations" / _file(number), described)
            drawn = (row for latent in batch for row in _activations(latents, latent, names, about.created))
            _write(folder / "activations" / _file(number), drawn)
            _write(folder / "features" / _file(number), (_neuron(latents, i, names, about.created) for i in batch))
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


# --- the files of one line ---------------------------------------------------------------------------------------------


def _one_line(latents: Latents, names: Names, about: About) -> dict[str, dict[str, Any]]:
    manifest = latents.cache.manifest
    what = f"SAE of {manifest.d_sae} latents at {manifest.hook_name} of {manifest.model}, on {manifest.corpus}"
    by = {"creatorName": names.creator_name, "creatorEmail": None, "creatorId": names.creator}
    common = {"creatorId": names.creator, "visibility": "UNLISTED", "createdAt": about.created}
    rows: dict[str, dict[str, Any]] = {
        "release": {
            **common,
            **by,
            "name": names.release,
            "description": what,
            "descriptionShort": None,
            "creatorNameShort": None,
            "isNewUi": True,
            "featured": False,
            "urls": [],
            "defaultSourceSetName": names.source_set,
            "defaultSourceId": names.source,
            "defaultUmapSourceIds": [],
        },
        "model": {**common, **_model(names, about, manifest)},
        "sourceset": {
            **common,
            **by,
            "modelId": names.model,
            "name": names.source_set,
            "description": what,
            "hasDashboards": True,
            "allowInferenceSearch": False,
            "type": "",
            "urls": [],
            "releaseName": names.release,
            "hasGraphs": False,
            "graphEnabled": False,
            "similarityMatrixEnabled": False,
            "defaultOfModelId": None,
            "defaultGraphModelId": None,
            "defaultRange": 1,
            "defaultShowBreaks": False,
            "showDfa": False,
            "showCorrelated": True,
            "showHeadAttribution": False,
            "showUmap": False,
        },
        "source": {**common, **_source(names, about, manifest)},
    }
    return {name: in_order(name, row) for name, row in rows.items()}


def _model(names: Names, about: About, manifest: Any) -> dict[str, Any]:
    facts = config_facts(about.config)
    return {
        "id": names.model,
        "layers": facts["n_layers"],
        "neuronsPerLayer": facts["d_mlp"],
        "owner": manifest.model.split("/")[0] if manifest.model.count("/") == 1 else names.creator_name,
        "displayNameShort": names.model,
        "displayName": manifest.model.rstrip("/").split("/")[-1],
        "tlensId": manifest.model,
        "openRouterId": None,
        "dimension": facts["d_model"],
        "thinking": False,
        "defaultSourceSetName": names.source_set,
        "defaultSourceId": names.source,
        "defaultGraphSourceSetName": None,
        "inferenceEnabled": False,
        "instruct": False,
        "website": None,
        "updatedAt": about.created,
    }


def _source(names: Names, about: About, manifest: Any) -> dict[str, Any]:
    return {
        "id": names.source,
        "modelId": names.model,
        "setName": names.source_set,
        "hasDashboards": True,
        "inferenceEnabled": False,
        "inferenceHosts": [],
        "saelensConfig": about.sae_config,
        "saelensRelease": None,
        "saelensSaeId": None,
        "hfRepoId": None,
        "hfFolderId": None,
        "defaultOfModelId": None,
        "hasUmap": False,
        "hasUmapLogSparsity": False,
        "hasUmapClusters": False,
        "num_prompts": manifest.n_windows,
        "num_tokens_in_prompt": manifest.context_size,
        "dataset": manifest.corpus,
        "notes": None,
        "cosSimMatchModelId": None,
        "cosSimMatchSourceId": None,
    }


# --- the rows of a latent ------------------------------------------------------------------------------------------------


def _place(names: Names, latent: int) -> dict[str, Any]:
    return {"modelId": names.model, "layer": names.source, "index": str(latent)}


def _neuron(latents: Latents, latent: int, names: Names, created: str) -> dict[str, Any]:
    stats = latents.stats
    row = {
        **_place(names, latent),
        **latents.numbers(latent),
        "creatorId": names.creator,
        "createdAt": created,
        "maxActApprox": rounded(stats["max"][latent]),
        "hasVector": False,
        "vectorLabel": None,
        "vectorDefaultSteerStrength": None,
        "hookName": latents.cache.manifest.hook_name,
        "topkCosSimIndices": stats["decoder_ids"][latent].tolist(),
        "topkCosSimValues": [rounded(value) for value in stats["decoder_cosines"][latent]],
        "sourceSetName": names.source_set,
        **dict.fromkeys(("umap_cluster", "umap_log_feature_sparsity", "umap_x", "umap_y")),
    }
    return in_order("neuron", row)


def _activations(latents: Latents, latent: int, names: Names, created: str) -> Iterator[dict[str, Any]]:
    largest = rounded(latents.stats["max"][latent])
    for number, (interval, passage) in enumerate(latents.groups(latent)):
        row_id = names.row_id("activation", latent, number)
        yield _activation(interval, passage, largest, row_id, _place(names, latent), names, created)


def _activation(
    interval: Interval | None,
    passage: Passage,
    largest: float,
    row_id: str,
    place: dict[str, Any],
    names: Names,
    created: str,
) -> dict[str, Any]:
    low, high, share = bounds(interval, largest)
    row = {
        **place,
        "id": row_id,
        "tokens": passage.tokens,
        "dataIndex": passage.doc_id,
        "dataSource": passage.source,
        "maxValue": max(passage.values),
        "maxValueTokenIndex": passage.values.index(max(passage.values)),
        "minValue": min(passage.values),
        "values": passage.values,
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "creatorId": names.creator,
        "createdAt": created,
        "lossValues": [],
        "logitContributions": None,
        "binMin": low,
        "binMax": high,
        "binContains": share,
        "qualifyingTokenIndex": passage.anchor,
        "zIndices": [[], []],
        "zValues": [],
    }
    return in_order("activation", row)


def _explanations(store: Path | None, batch: range, names: Names, created: str) -> list[dict[str, Any]]:
    """Return the explanations of some latents, the Italian and the English text each a row; none without a store."""
    if store is None:
        return []
    rows = []
    with Store(store, {}) as opened:
        for explainer in opened.explainers():
            if explainer == LOOKUP:
                continue
            scores = opened.values(
                explainer=explainer,
                control="",
                scorer="detection",
                metric="balanced_accuracy",
                judge="rule" if explainer == "rules" else (opened.judges() or ["rule"])[-1],
                negatives=HEADLINE["detection"],
            )
            for latent, (_, explanation) in opened.explanations(explainer).items():
                if latent in batch and explanation.status == "ok":
                    rows += _texts(explanation, scores.get(latent), names, created)
    return rows


def _texts(explanation: Explanation, score: float | None, names: Names, created: str) -> Iterator[dict[str, Any]]:
    for language, text in (("it", explanation.text_it), ("en", explanation.text_en)):
        if not text:
            continue
        notes = {"explainer": explanation.explainer, "language": language, "detection_balanced_accuracy": score}
        row = {
            **_place(names, explanation.latent),
            "id": names.row_id("explanation", explanation.latent, explanation.explainer, language),
            "description": storable(text),
            "authorId": names.creator,
            **dict.fromkeys(("embedding", "typeName", "explanationModelName", "triggeredByUserId")),
            "notes": json.dumps(notes, ensure_ascii=False),
            "scoreV1": 0.0,
            **dict.fromkeys(("scoreV2", "umap_x", "umap_y", "umap_cluster", "umap_log_feature_sparsity")),
            "createdAt": created,
            "updatedAt": created,
        }
        yield in_order("explanation", row)


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
