"""Probes on planted labels reach 1.0, on shuffled ones chance; a single latent is found, and one that says yes to all is not."""

import types
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.sparse
import torch

from sae_italian.analysis import treebank as treebank_module
from sae_italian.analysis.detect import (
    ProbeTask,
    always_yes,
    best_cut,
    dense_probes,
    probe,
    single_latents,
    sparse_probes,
)
from sae_italian.analysis.treebank import (
    Treebank,
    Words,
    detection_counts,
    encode_words,
    read_treebank,
    read_words,
    zeros_and_ones,
)
from sae_italian.base.errors import UsageError
from sae_italian.models.activations import read_activations

NAMES = ["Gender=Fem", "Number=Plur", "UPOS=NOUN", "UPOS=X"]
D_SAE = 40


@pytest.fixture(scope="module")
def planted():
    """1,500 words. Gender=Fem is latent 3 and a direction; Number=Plur is 4 or 5; UPOS=X is on too few words."""
    rng = np.random.default_rng(0)
    n = 1500
    labels = np.zeros((n, len(NAMES)), np.float32)
    labels[:, 0], labels[:, 1], labels[:, 2] = rng.random(n) < 0.3, rng.random(n) < 0.2, rng.random(n) < 0.5
    labels[:20, 3] = 1
    acts = np.where(rng.random((n, D_SAE)) < 0.1, rng.random((n, D_SAE)) + 0.1, 0).astype(np.float32)
    acts[:, 3] = labels[:, 0] * (1 + rng.random(n))
    half = rng.random(n) < 0.5
    acts[:, 4], acts[:, 5] = labels[:, 1] * half, labels[:, 1] * ~half
    acts[:, 6] = 1  # always on
    x = rng.normal(size=(n, 8)).astype(np.float32)
    x[:, 0] = 6 * labels[:, 0] + rng.normal(size=n)
    sentence = np.arange(n) // 10
    words = Words("A", NAMES, scipy.sparse.csr_array(labels), sentence, sentence % 2 == 0, x)
    return words, scipy.sparse.csr_array(acts)


def column(words, name):
    return words.labels[:, [words.names.index(name)]].toarray().ravel()


def by_label(detections):
    return {(item["label"], item["method"]): types.SimpleNamespace(**item) for item in detections}


def test_a_planted_latent_is_found_and_reaches_one(planted):
    words, acts = planted
    found = by_label(single_latents(ProbeTask(words, words), acts, acts, "sae"))
    best = found["Gender=Fem", "single latent"]
    assert (
        best.latents == [3]
        and best.f1.value == 1 == best.f1.hi
        and (best.auroc.value, best.precision, best.recall) == (1, 1, 1)
    )
    assert best.threshold == 0  # of several that do as well the lowest
    assert best.n == int(column(words, "Gender=Fem")[~words.train].sum())
    assert ("UPOS=X", "single latent") not in found  # too few words
    split = found["Number=Plur", "single latent"]
    assert split.latents[0] in (4, 5) and split.precision == 1 and 0.5 < split.f1.lo < split.f1.value < 0.8


def test_a_latent_that_is_always_on_detects_nothing(planted):
    """It would have the best F1 for a label that half of the words bear."""
    words, acts = planted
    noun = by_label(single_latents(ProbeTask(words, words), acts, acts, "sae"))["UPOS=NOUN", "single latent"]
    assert noun.latents != [6] and noun.f1.value < always_yes(noun.share)


def test_a_probe_on_planted_labels_reaches_one(planted):
    words, acts = planted
    found = by_label(sparse_probes(ProbeTask(words, words), acts, acts, "sae"))
    assert found["Gender=Fem", "sparse 1"].f1.value == 1 and found["Gender=Fem", "sparse 1"].latents == [3]
    assert found["Number=Plur", "sparse 1"].f1.value < 0.8
    assert found["Number=Plur", "sparse 5"].f1.value > 0.98 and {4, 5} <= set(found["Number=Plur", "sparse 5"].latents)
    turned = acts.tolil()
    turned[:, 3] = 1 - column(words, "Gender=Fem")  # what falls silent on a label tells it too
    found = by_label(sparse_probes(ProbeTask(words, words), turned.tocsr(), turned.tocsr(), "sae"))
    assert found["Gender=Fem", "sparse 1"].f1.value == 1 and found["Gender=Fem", "sparse 1"].latents == [3]
    dense = by_label(dense_probes(ProbeTask(words, words)))
    assert dense["Gender=Fem", "dense"].f1.value > 0.98 and dense["Gender=Fem", "dense"].auroc.value > 0.999
    assert abs(dense["UPOS=NOUN", "dense"].auroc.value - 0.5) < 0.06


def test_on_shuffled_labels_everything_is_chance(planted):
    words, acts = planted
    task = ProbeTask(words, words, seed=3, shuffled=True)
    found = [*single_latents(task, acts, acts, "sae"), *sparse_probes(task, acts, acts, "sae"), *dense_probes(task)]
    assert len(found) == 3 * 5
    for item in found:
        assert item["shuffled"] and abs(item["auroc"].value - 0.5) < 0.08, item
        assert item["f1"].value <= always_yes(item["share"]) + 0.02, item


def test_what_holds_in_one_treebank_is_tried_on_the_other(planted):
    """In the other treebank latent 3 fires on half of the feminine words only."""
    words, acts = planted
    other = words._replace(source="B")
    changed = acts.tolil()
    feminine = np.flatnonzero(column(words, "Gender=Fem"))
    changed[feminine[::2], 3] = 0
    found = by_label(single_latents(ProbeTask(words, other), acts, scipy.sparse.csr_array(changed), "sae"))
    crossed = found["Gender=Fem", "single latent"]
    assert (crossed.trained, crossed.tested) == ("A", "B") and crossed.precision == 1
    assert crossed.recall == pytest.approx(0.5, abs=0.05) and crossed.f1.lo < 2 / 3 < crossed.f1.hi


def test_counts_of_a_latent_and_a_label_by_hand():
    """Two words fire, three bear the label, one does both; a place that is given twice is one."""
    fired = zeros_and_ones([(0, 0), (0, 0), (1, 0)], (5, 1))
    labels = zeros_and_ones([(1, 0), (2, 0), (3, 0)], (5, 1))
    assert [float(each[0, 0]) for each in detection_counts(fired, labels)] == pytest.approx([2 / 5, 1 / 2, 1 / 3])


def test_the_cut_is_that_of_the_best_f1():
    truth = np.array([1, 1, 0, 1, 0, 0], bool)
    assert best_cut(np.array([6.0, 5, 4, 3, 2, 1]), truth) == 3  # F1 6/7, against 4/5 at 5
    assert best_cut(np.array([2.0, 2, 2, 0, 0, 0]), truth) == 2  # equal scores go together


# --- the whole way -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def micro(mini):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(treebank_module, "MICRO_DOCUMENTS", 24)
        return read_treebank("micro-italiano")


def test_words_have_the_activation_of_their_own_sentence(mini, micro, topk_sae):
    """By hand: the first sentence alone, and its third word's last token."""
    names = ["UPOS=NOUN", "Gender=Fem"]
    words = read_words(mini, "blocks.2.hook_resid_post", micro, names, context_size=128)
    first = micro.sentences[0]
    found = np.flatnonzero(words.sentence == 0)
    assert len(found) == len(first.words)
    encoded = mini.tokenizer(first.text, return_offsets_mapping=True, return_tensors="pt")
    last = int(np.flatnonzero(encoded.offset_mapping[0, :, 1].numpy() == first.words[2].end)[-1])
    x = read_activations(mini, encoded.input_ids, "blocks.2.hook_resid_post")[0, last]
    assert np.allclose(words.x[found[2]], x.numpy(), atol=1e-4)
    assert column(words, "UPOS=NOUN")[found].tolist() == ["UPOS=NOUN" in word.labels for word in first.words]
    with torch.no_grad():
        latents = topk_sae.encode(torch.from_numpy(words.x[found]))
    assert np.allclose(encode_words(topk_sae, words.x[found]).toarray(), latents.numpy(), atol=1e-5)


def test_words_beyond_the_context_are_counted(mini, micro):
    words = read_words(mini, "blocks.2.hook_resid_post", micro, ["UPOS=NOUN"], context_size=16)
    assert 0 < len(words.sentence) < sum(len(s.words) for s in micro.sentences)
    empty = Treebank("vuoto", micro.sentences[:1])
    with pytest.raises(UsageError, match="has no word within 1 tokens"):
        read_words(mini, "blocks.2.hook_resid_post", empty, ["UPOS=NOUN"], context_size=1)


def test_an_sae_of_another_width_is_refused(planted):
    words, _ = planted
    other = types.SimpleNamespace(cfg=types.SimpleNamespace(d_in=64))
    with pytest.raises(UsageError, match="reads 64 dimensions .d_in., the activations have 8"):
        probe(other, [words])


def test_one_result_of_all_with_rows_for_the_store(planted, tmp_path):
    """The SAE's latents 2i and 2i + 1 are dimension i, positive and negative."""
    words, _ = planted
    eye = torch.eye(8)
    encoder = torch.stack([eye, -eye], dim=2).reshape(8, 16)
    sae = types.SimpleNamespace(
        cfg=types.SimpleNamespace(d_in=8), device="cpu", dtype=torch.float32, encode=lambda x: torch.relu(x @ encoder)
    )
    result = probe(sae, [words], name="sae", others={"other": sae})
    best = result.by_label("single latent", "A").loc["Gender=Fem"]
    assert best.latents == [0] and best.f1.value > 0.9
    assert "UPOS=X" not in result.by_label("single latent", "A").index
    rows = {(row.latent, row.label): row for row in result.labels()}
    assert rows[0, "Gender=Fem"].source == "A" and rows[0, "Gender=Fem"].f1 == best.f1.value
    assert all(row.label == "Gender=Fem" for row in rows.values())  # the others are not better than yes to all
    features = {(d.features, d.shuffled) for d in result.detections.itertuples()}
    assert features == {("sae", False), ("other", False), ("activations", False), ("sae", True), ("activations", True)}
    assert all(d.auroc.lo <= d.auroc.value <= d.auroc.hi for d in result.detections.itertuples())
    assert all(np.isnan(row["auroc"].lo) == (row["labels"] < 5) for row in result.means())  # over labels
    result.save(tmp_path)
    assert "| Gender=Fem | 0 |" in (tmp_path / "language.md").read_text()
    drawn = ElementTree.fromstring((tmp_path / "language.svg").read_text())
    parents = {child: parent for parent in drawn.iter() for child in parent}
    (axes,) = (group for group in drawn.iter() if group.get("id") == "axes_1")
    rows = [group for group in drawn.iter() if (group.get("id") or "").startswith("line2d")]
    dots = [use for line in rows if parents[line] is axes for use in line.iter() if use.tag.endswith("use")]
    assert dots and not any(parents[dot].get("clip-path") for dot in dots)  # a dot at 1.0 is whole
    (legend,) = (group for group in drawn.iter() if group.get("id") == "legend_1")
    assert parents[legend] is not axes
    heights = [float(text.get("y") or text.get("transform").split()[-1].strip(")")) for text in texts(legend)]
    ticks = [float(text.get("y") or text.get("transform").split()[-1].strip(")")) for text in texts(axes)]
    assert min(heights) > max(ticks)  # below the rows and the axis' title


def texts(group):
    return [item for item in group.iter() if item.tag.endswith("text")]


def test_labels_that_another_language_misses_are_named(planted):
    """In the second treebank the latent of the gender is silent; the number's two latents are found in neither."""
    words, _ = planted
    other = words._replace(source="B", x=words.x * np.array([0, *[1] * 7], np.float32))
    how = {"cfg": types.SimpleNamespace(d_in=8), "device": torch.device("cpu"), "dtype": torch.float32}
    sae = types.SimpleNamespace(encode=lambda x: (x > 3).float(), **how)
    result = probe(sae, [words, other])
    found = {(item["trained"], item["tested"]): item for item in result.misses()}
    assert found["A", "B"]["labels"] == ["Gender=Fem"] and found["A", "B"]["share"].value == 1
    assert found["B", "A"]["labels"] == []
    assert "misses on B: 100% (" in result.table() and "): Gender=Fem." in result.table()
    kept = {row.source: row for row in result.labels() if row.label == "Gender=Fem"}  # the store gets both
    assert kept["A"].f1 > 0.9 and kept["B"].f1 == 0 and kept["A"].latent == kept["B"].latent
