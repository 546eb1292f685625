"""Exports for Neuronpedia, read back: true text, the cache's numbers, and files that its importer takes whole."""

import gzip
import json
import shutil
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from sae_italian.autointerp.run import STORE_FILE
from sae_italian.autointerp.store import Explanation, Store
from sae_italian.base.errors import UsageError
from sae_italian.browser.exports import export
from sae_italian.browser.exports.latents import tables
from sae_italian.cache import FeatureCache
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.models.activations import logit_lens

from .conftest import LATENTS
from .field_check import check_folder, checked, read_rows
from .mojibake import is_mojibake

WANTED = range(LATENTS[0], LATENTS[1] + 1)
MANY = {"features": "neuron", "activations": "activation", "explanations": "explanation"}


def features(export):
    return [row for file in sorted(export.folder.glob("batch-*")) for row in json.loads(file.read_text())["features"]]


def lines(export, name):
    return [row for file in sorted((export.folder / name).iterdir()) for row in read_rows(file)]


def live(cache):
    return next(i for i in WANTED if cache.statistics["count"][i] > 200)


# --- the batch JSON ------------------------------------------------------------------------------------------------------


def test_a_batch_holds_every_latent_with_every_field(batch, cache):
    rows = features(batch)
    assert [row["feature_index"] for row in rows] == list(WANTED)
    assert batch.n_latents == len(WANTED) and batch.lost == []
    assert all(list(row) == list(tables()["batch_feature"]["fields"]) for row in rows)
    for row in rows:
        statistics = cache.latent(row["feature_index"]).statistics
        assert row["frac_nonzero"] == pytest.approx(statistics["density"], rel=1e-5)
        assert sum(row["freq_hist_data_bar_heights"]) == statistics["count"]  # of non-zero activations only
        assert row["pos_values"] == pytest.approx(statistics["promoted_values"], rel=1e-5)
        assert len(row["logits_hist_data_bar_heights"]) == 50


def test_passages_are_true_text_with_the_caches_activations(batch, cache):
    texts = [cache.document(i).text for i in range(cache.n_documents)]
    row = next(row for row in features(batch) if row["feature_index"] == live(cache))
    value = cache.latent(live(cache)).value
    top = [p for p in row["activations"] if p["bin_min"] == -1]
    assert top[0]["values"][top[0]["qualifying_token_index"]] == pytest.approx(value.max(), rel=1e-5)
    seen = set()
    for passage in row["activations"]:
        text = "".join(passage["tokens"])
        assert any(text in document for document in texts) and all(passage["tokens"])
        assert text not in seen  # nothing is shown twice
        seen.add(text)


def test_intervals_hold_no_zeros_and_their_shares_add_up_to_the_density(batch, cache):
    for row in features(batch):
        bins = {(p["bin_min"], p["bin_max"]): p["bin_contains"] for p in row["activations"] if p["bin_min"] >= 0}
        for passage in row["activations"]:
            value = passage["values"][passage["qualifying_token_index"]]
            if passage["bin_min"] >= 0:
                assert passage["bin_min"] * 0.999 <= value <= passage["bin_max"] * 1.001 and value > 0
        assert sum(bins.values()) <= row["frac_nonzero"] * 1.001
    row = next(row for row in features(batch) if row["feature_index"] == live(cache))
    value = cache.latent(live(cache)).value
    edges = np.linspace(0, value.max(), 6)
    counts = [((value > lo) & (value <= hi)).sum() for lo, hi in zip(edges, edges[1:], strict=False)]
    n = int((cache.doc != NO_DOCUMENT).sum())
    for passage in row["activations"]:
        if passage["bin_min"] >= 0:
            at = int(np.argmin(np.abs(edges - passage["bin_min"])))
            assert passage["bin_contains"] == pytest.approx(counts[at] / n, rel=1e-4)


def test_tables_agree_with_dense_arithmetic(batch, cache, sae, mini):
    latent = live(cache)
    row = next(row for row in features(batch) if row["feature_index"] == latent)
    counted = np.flatnonzero(cache.doc != NO_DOCUMENT)
    dense = np.zeros((cache.manifest.d_sae, cache.n_positions))
    for other in range(cache.manifest.d_sae):
        position, value = cache.latent(other)
        dense[other, position] = value
    dense = dense[:, counted]
    for other, cosine, pearson in zip(
        row["correlated_features_indices"],
        row["correlated_features_l1"],
        row["correlated_features_pearson"],
        strict=True,
    ):
        a, b = dense[latent], dense[other]
        assert cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-4)
        assert pearson == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-4)
    direction = sae.W_dec[latent].detach().numpy()
    assert row["neuron_alignment_indices"] == np.argsort(-direction)[:3].tolist()
    logits = logit_lens(mini)(sae.W_dec[latent]).detach().numpy()
    assert row["logits_hist_data_bar_values"][0] == pytest.approx(
        logits.min() + (logits.max() - logits.min()) / 100, rel=1e-3
    )
    assert sum(row["logits_hist_data_bar_heights"]) == len(logits)


def test_neurons_are_correlated_over_the_whole_vocabulary_of_dimensions(batch, cache, mini):
    import torch

    from sae_italian.models.activations import read_activations

    latent = live(cache)
    row = next(row for row in features(batch) if row["feature_index"] == latent)
    shard = cache.shard_tokens(0)
    tokens = torch.from_numpy(shard["tokens"].astype(np.int64)).reshape(-1, cache.manifest.context_size)
    x = read_activations(mini, tokens, cache.manifest.hook_name).flatten(0, 1).numpy()
    f = np.zeros(len(x))
    position, value = cache.latent(latent)
    inside = position < len(x)
    f[position[inside]] = value[inside]
    keep = shard["doc"] != NO_DOCUMENT
    pearson = np.array([np.corrcoef(x[keep, j], f[keep])[0, 1] for j in range(x.shape[1])])
    assert row["correlated_neurons_indices"] == np.argsort(-pearson)[:3].tolist()
    assert row["correlated_neurons_pearson"] == pytest.approx(np.sort(pearson)[::-1][:3].tolist(), rel=1e-3)


# --- the bulk-import folder ------------------------------------------------------------------------------------------------


def test_every_line_has_the_same_keys_and_ids_are_unique(bulk, cache):
    for name, table in MANY.items():
        rows = lines(bulk, name)
        assert rows and all(list(row) == list(tables()[table]["fields"]) for row in rows)
        if name != "features":
            assert len({row["id"] for row in rows}) == len(rows)
    for row in lines(bulk, "features"):
        statistics = cache.latent(int(row["index"])).statistics
        assert row["sourceSetName"] == "res-it-256" and row["layer"] == "1-res-it-256"
        assert row["topkCosSimIndices"] == statistics["decoder_ids"] and len(row["topkCosSimValues"]) == 10
        assert row["hookName"] == cache.manifest.hook_name
        assert row["maxActApprox"] == pytest.approx(statistics["max"], rel=1e-5)


def test_explanations_come_in_both_languages_with_their_score(bulk, cache):
    with Store(cache.folder / STORE_FILE, {}) as store:
        known = {i: e for i, e in store.explanations("rules").items() if e.status == "ok" and i in WANTED}
    rows = lines(bulk, "explanations")
    assert known and {(int(row["index"]), row["description"]) for row in rows} == {
        (i, text) for i, e in known.items() for text in (e.text_it, e.text_en)
    }
    notes = [json.loads(row["notes"]) for row in rows]
    assert {note["language"] for note in notes} == {"it", "en"}
    assert all(0 <= note["detection_balanced_accuracy"] <= 1 for note in notes)


def test_the_same_cache_gives_the_same_rows_and_a_stopped_export_goes_on(bulk, cache, sae, mini, tmp_path):
    arguments = (cache, mini.tokenizer, tmp_path / "again", "neuronpedia-bulk")
    options = {"sae": sae, "model": mini, "latents": LATENTS}
    again = export(*arguments, **options)
    first = lines(again, "activations")
    ids = [row["id"] for row in lines(bulk, "activations")]
    assert [row["id"] for row in first] == ids
    for name in ("features", "explanations"):
        shutil.rmtree(again.folder / name)
    with pytest.raises(UsageError, match="--resume"):
        export(*arguments, **options)
    assert lines(export(*arguments, **options, resume=True), "activations") == first


def test_rows_of_other_explanations_are_not_put_beside_those_of_before(cache, sae, mini, tmp_path):
    folder = shutil.copytree(cache.folder, tmp_path / "cache")
    arguments = (FeatureCache.open(folder), mini.tokenizer, tmp_path / "again", "neuronpedia-bulk")
    options = {"sae": sae, "model": mini, "latents": LATENTS}
    export(*arguments, **options)
    with closing(sqlite3.connect(folder / STORE_FILE)) as store, store:
        assert store.execute("UPDATE explanation SET text_en = 'other'").rowcount
    with pytest.raises(UsageError, match="explained was '.*', is now '.*--overwrite"):
        export(*arguments, **options, resume=True)
    assert {row["description"] for row in lines(export(*arguments, **options, overwrite=True), "explanations")} >= {
        "other"
    }


def damage(folder, name, change):
    """Rewrite the first file of a table with `change` applied to its rows."""
    file = folder / name / "batch-0.jsonl.gz"
    rows = list(read_rows(file))
    change(rows)
    with gzip.open(file, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("features", lambda rows: rows[3].pop("umap_x"), "umap_x"),
        ("features", lambda rows: rows[3].update(maxActApprox=None), "maxActApprox"),
        ("features", lambda rows: rows[3].update(index=rows[2]["index"]), "twice"),
        ("features", lambda rows: rows.pop(), "holds 11 of 12 latents"),
        ("features", lambda rows: rows[3]["pos_values"].reverse(), "pos_values"),
        ("features", lambda rows: rows[3]["topkCosSimIndices"].pop(), "equal"),
        ("features", lambda rows: rows[3].update(frac_nonzero=1.5), "frac_nonzero"),
        ("activations", lambda rows: rows[1].update(id=rows[0]["id"]), "twice"),
        ("activations", lambda rows: rows[1]["values"].pop(), "equal"),
        ("activations", lambda rows: rows[1].update(maxValueTokenIndex=2**31), "int"),
        ("activations", lambda rows: rows[1]["tokens"].__setitem__(0, "a\x00"), "NUL"),
    ],
)
def test_what_does_not_fit_is_refused(bulk, tmp_path, name, change, message):
    folder = shutil.copytree(bulk.folder, tmp_path / "copy")
    damage(folder, name, change)
    with pytest.raises(AssertionError, match=message):
        check_folder(folder, "neuronpedia-bulk", len(WANTED))


def test_no_string_is_mangled(bulk, batch):
    rows = [row for name in MANY for row in lines(bulk, name)] + [
        p for row in features(batch) for p in row["activations"]
    ]
    texts = [text for row in rows for key in ("tokens", "pos_str", "neg_str") for text in row.get(key, ())]
    assert len(texts) > 1000 and sum(map(is_mojibake, texts)) == 0


def test_every_row_names_its_source_and_every_active_latent_has_passages_in_which_it_is_active(bulk):
    """The importer finds a row's latent and source by these names, in its database."""
    release, model, sourceset, source = (
        next(read_rows(bulk.folder / f"{name}.jsonl")) for name in ("release", "model", "sourceset", "source")
    )
    assert sourceset["releaseName"] == release["name"] and release["defaultSourceId"] == source["id"]
    assert sourceset["modelId"] == source["modelId"] == model["id"] and source["setName"] == sourceset["name"]
    assert source["id"].partition("-")[2] == sourceset["name"]
    batches = [sorted(path.name for path in (bulk.folder / name).iterdir()) for name in MANY]
    assert batches[0] == batches[1] == batches[2]
    rows = {name: lines(bulk, name) for name in MANY}
    known = {row["index"] for row in rows["features"]}
    for row in (row for name in MANY for row in rows[name]):
        assert (row["modelId"], row["layer"]) == (model["id"], source["id"]) and row["index"] in known
    assert {row["sourceSetName"] for row in rows["features"]} == {source["setName"]}
    for row in rows["activations"]:
        assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]] > 0
        assert row["qualifyingTokenIndex"] < len(row["values"])
    shown = {row["index"] for row in rows["activations"]}
    assert shown == {row["index"] for row in rows["features"] if row["frac_nonzero"] > 0}


def test_an_explanation_of_5000_letters_and_one_by_an_llm_are_there_whole(cache, mini, tmp_path):
    folder = shutil.copytree(cache.folder, tmp_path / "cache")
    long = "«perché», " * 500
    with Store(folder / STORE_FILE, {}) as store:
        latent = next(i for i in range(256) if i not in store.explanations("llm:prova:it"))
        store.add_explanations([Explanation(latent, "llm:prova:it", "ok", long, "", None, "llm")])
    only = {"latents": (latent, latent)}
    done = checked(export(FeatureCache.open(folder), mini.tokenizer, tmp_path / "out", "neuronpedia-bulk", **only))
    rows = [row for row in lines(done, "explanations") if "llm:prova:it" in row["notes"]]
    assert [row["description"] for row in rows] == [long] and json.loads(rows[0]["notes"])["language"] == "it"


# --- bad input -------------------------------------------------------------------------------------------------------------


def test_a_nasty_corpus_without_explanations_or_weights_goes_through(nasty, mini, tmp_path):
    done = checked(export(nasty, mini.tokenizer, tmp_path / "out", "neuronpedia-bulk", latents=(0, 19)))
    assert done.n_latents == 20 and not lines(done, "explanations") and done.lost
    text = "\n".join("".join(row["tokens"]) for row in lines(done, "activations"))
    assert "<script>" in text and "perché" in text and "🙂" in text and "\x00" not in text


@pytest.mark.parametrize(
    "names, message",
    [
        ({"model": "Minerva 1B"}, "model_id="),
        ({"source_set": "neurons"}, "set="),
        ({"source_set": "res--it"}, "set="),
        ({"suffix": "à"}, "suffix="),
    ],
)
def test_names_that_neuronpedia_refuses_are_refused_before_anything_is_written(cache, mini, tmp_path, names, message):
    with pytest.raises(UsageError, match=message):
        export(cache, mini.tokenizer, tmp_path / "out", "neuronpedia", names=names)
    assert not (tmp_path / "out").exists()


def test_unknown_latents_and_foreign_folders(cache, mini, tmp_path):
    with pytest.raises(UsageError, match="latents 0 to 255"):
        export(cache, mini.tokenizer, tmp_path / "out", "neuronpedia", latents=(0, 256))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tesi.txt").write_text("mia")
    with pytest.raises(UsageError, match="not empty"):
        export(cache, mini.tokenizer, tmp_path / "mine", "neuronpedia", latents=(0, 3))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["tesi.txt"]
