"""The rows of Neuronpedia's tables: one release, model, source set and source, and for each latent what its page shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.autointerp.run import EXPLAINER, LOOKUP
from sae_italian.autointerp.store import NOW, Store
from sae_italian.autointerp.summary import HEADLINE
from sae_italian.browser.exports.fields import in_order
from sae_italian.browser.exports.latents import Latents
from sae_italian.browser.exports.names import Names
from sae_italian.browser.exports.neuronpedia_batch import bounds
from sae_italian.browser.exports.passages import Interval, Passage, rounded, storable
from sae_italian.models.catalogue import config_facts


class About(NamedTuple):
    """What the rows say besides names: the model's configuration, the SAE's, and when the export was made."""

    config: Any
    sae_config: dict[str, Any] | None
    created: str


def one_line(latents: Latents, names: Names, about: About) -> dict[str, dict[str, Any]]:
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
        "tlensId": manifest.model if not Path(manifest.model).is_absolute() else None,
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


def neuron(latents: Latents, latent: int, names: Names, created: str) -> dict[str, Any]:
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


def activations(latents: Latents, latent: int, names: Names, created: str) -> Iterator[dict[str, Any]]:
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


class Explained:
    """The explanations of a store, some latents at a time, each text with the score of its own judge."""

    def __init__(self, store: Store, names: Names, created: str):
        self.store, self.names, self.created = store, names, created
        llm = next((judge for judge in store.judges() if judge != "rule" and not judge.startswith("always-")), "rule")
        self.scores = {
            explainer: store.values(
                explainer=explainer,
                control="",
                scorer="detection",
                metric="balanced_accuracy",
                judge="rule" if explainer.removesuffix(NOW) == EXPLAINER else llm,
                negatives=HEADLINE["detection"],
            )
            for explainer in store.explainers()
            if explainer.removesuffix(NOW) != LOOKUP
        }

    def rows(self, batch: range) -> Iterator[dict[str, Any]]:
        """Yield the Italian and the English text of each explanation as a row of its own."""
        query = """SELECT latent, explainer, text_it, text_en FROM explanation
                   WHERE latent BETWEEN ? AND ? AND status = 'ok' AND explainer NOT IN (?, ?) ORDER BY latent, id"""
        found = self.store.connection.execute(query, (batch.start, batch.stop - 1, LOOKUP, LOOKUP + NOW))
        for latent, explainer, *texts in found.fetchall():
            for language, text in zip(("it", "en"), texts, strict=True):
                if text:
                    yield self._row(latent, explainer, language, text)

    def _row(self, latent: int, explainer: str, language: str, text: str) -> dict[str, Any]:
        score = self.scores[explainer].get(latent)
        notes = {"explainer": explainer, "language": language, "detection_balanced_accuracy": score}
        row = {
            **_place(self.names, latent),
            "id": self.names.row_id("explanation", latent, explainer, language),
            "description": storable(text),
            "authorId": self.names.creator,
            **dict.fromkeys(("embedding", "typeName", "explanationModelName", "triggeredByUserId")),
            "notes": json.dumps(notes, ensure_ascii=False),
            "scoreV1": 0.0,
            **dict.fromkeys(("scoreV2", "umap_x", "umap_y", "umap_cluster", "umap_log_feature_sparsity")),
            "createdAt": self.created,
            "updatedAt": self.created,
        }
        return in_order("explanation", row)
