"""Latents of one language: entropies known by hand, none between copies of one text, counts by hand."""

import json
from itertools import islice

import numpy as np
import pytest
import scipy.sparse
import torch

from sae_italian.analysis.labels import Languages, _count, examples_in, language_latents, owners, parallel_overlap
from sae_italian.analysis.shift import corpus_windows
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import time_bound
from sae_italian.cache import FeatureCache
from sae_italian.cli import named
from sae_italian.corpora import iter_documents, pack
from sae_italian.models.activations import read_activations

PROBABILITY = np.array([[0.2, 0.1, 0.0, 0.0, 0.0005], [0.0, 0.1, 0.3, 0.0, 0.0], [0.01, 0.1, 0.3, 0.0, 0.0]])


def test_entropies_and_owners_by_hand():
    found = Languages(["it", "en", "fr"], [1000, 900, 800], PROBABILITY, dict.fromkeys(("it", "en", "fr"), 0.0))
    (first,) = found.as_dict()["it"]["latents"]
    by_hand = -(20 / 21) * np.log(20 / 21) - (1 / 21) * np.log(1 / 21)
    assert first == {"latent": 0, "probability": 0.2, "entropy": pytest.approx(by_hand)}
    assert owners(PROBABILITY).tolist() == [0, -1, -1, -1, -1]  # the last fires too rarely


def test_rows_for_the_store():
    found = Languages(["it", "en", "fr"], [1000, 900, 800], PROBABILITY, dict.fromkeys(("it", "en", "fr"), 0.0))
    (row,) = found.labels()
    assert (row.latent, row.label, row.n) == (0, "Language=it", 1000)
    assert row.precision == pytest.approx(0.2 / 0.21) and row.recall == pytest.approx(0.2)
    assert found.share("it").value == pytest.approx(1 / 3) and found.latents("en").tolist() == []


def test_copies_of_one_text_share_all_latents(topk_sae, mini, jsonl):
    corpora = {"uno": str(jsonl), "due": str(jsonl)}
    found = language_latents(topk_sae, mini, corpora, n_tokens=600)
    assert (owners(found.probability) == -1).all() and np.array_equal(found.probability[0], found.probability[1])


def test_probabilities_are_shares_of_tokens_and_chance_is_below_what_is_there(topk_sae, mini, jsonl, tmp_path):
    """By hand on the same windows; the other language is digits only."""
    other = tmp_path / "cifre.jsonl"
    rows = [" ".join(str(7 * i + j) for j in range(60)) for i in range(30)]
    other.write_text("".join(f'{{"text": "{row}"}}\n' for row in rows), encoding="utf-8")
    found = language_latents(topk_sae, mini, {"it": str(jsonl), "cifre": str(other)}, n_tokens=900)
    block = next(pack(iter_documents(jsonl), mini.tokenizer, 128, windows_per_block=8))
    tokens = torch.from_numpy(block.tokens)
    keep = tokens != mini.tokenizer.bos_token_id
    with torch.no_grad():
        active = topk_sae.encode(read_activations(mini, tokens, "blocks.2.hook_resid_post")[keep]) != 0
    assert found.n_tokens[0] == int(keep.sum())
    assert np.allclose(found.probability[0], active.float().mean(0).numpy(), atol=1e-3)
    assert (owners(found.probability) >= 0).sum() > 3 * sum(found.by_chance.values())
    assert "| cifre |" in found.table()


def test_documents_times_latents_are_never_held_whole(topk_sae, mini, jsonl):
    """Of thousands of short documents and a wide SAE they are gigabytes, copied at each of the twenty shuffles."""
    windows = corpus_windows(mini, str(jsonl), 64, 600)
    counts, tokens = _count(topk_sae, mini, topk_sae.cfg.metadata.hook_name, windows)
    assert scipy.sparse.issparse(counts) and counts.shape == (len(tokens), topk_sae.cfg.d_sae)


def test_a_corpus_that_is_not_there_is_told_before_the_others_are_read(topk_sae, mini, jsonl, monkeypatch):
    monkeypatch.setattr("sae_italian.analysis.labels._count", lambda *_: pytest.fail("a corpus was read to its end"))
    with pytest.raises(UsageError, match="corpus '400' is neither"):
        language_latents(topk_sae, mini, {"it": str(jsonl), "parallel": "400"})
    with pytest.raises(UsageError, match="'parallel=400' is no text or model; .* before --languages"):
        named("--languages NAME=CORPUS", [f"it={jsonl}", "parallel=400"])


def test_a_translation_shares_more_latents_than_another_text(topk_sae, mini, tmp_path):
    """Stand-ins for translations: the same sentences with their words turned round."""
    texts = [document.text[:200] for document in islice(iter_documents("micro-italiano", "all"), 12)]
    for name, rows in (("a", texts), ("b", [" ".join(reversed(text.split())) for text in texts]), ("c", texts[:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    corpora = {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}
    found = parallel_overlap(topk_sae, mini, corpora)
    fired = []
    for texts in zip(*(iter_documents(path, "all") for path in corpora.values()), strict=True):
        ids = [mini.tokenizer(document.text, return_tensors="pt").input_ids for document in texts]
        reads = [read_activations(mini, own, "blocks.2.hook_resid_post")[0, 1:] for own in ids]  # without the BOS
        fired.append([(topk_sae.encode(x) != 0).any(0) for x in reads])
    by_hand = [float((a & b).sum() / (a | b).sum()) for a, b in fired]
    assert found.jaccard.value == pytest.approx(np.mean(by_hand), abs=1e-3)
    assert found.n_pairs == 12 and found.jaccard.lo > found.chance.hi
    same = parallel_overlap(topk_sae, mini, {"a": corpora["a"], "x": corpora["a"]})
    assert same.jaccard.value == 1 and same.chance.value < 1 and "12 pairs" in same.text()
    with time_bound(1e-9):  # each has as many pairs as the time was enough for
        first = parallel_overlap(topk_sae, mini, corpora)
    assert first.n_pairs == 1 and first.jaccard.value == pytest.approx(by_hand[0], abs=1e-3)
    assert "no translations -" in first.text()
    with pytest.raises(UsageError, match="a has 12 documents and c 5"):
        parallel_overlap(topk_sae, mini, {"a": corpora["a"], "c": str(tmp_path / "c.jsonl")})


def test_the_language_of_a_caches_examples_is_told(small_cache):
    found = examples_in(FeatureCache.open(small_cache))
    assert found["it"] > 0.8 and sum(found.values()) == pytest.approx(1)
