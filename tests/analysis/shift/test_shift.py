"""Shifts whose size is known: none, none by construction, and one that was made."""

import copy
import json
import math
import shutil
from itertools import islice

import pytest
import torch

from sae_italian.analysis.shift import Condition, context_shift, default_edges, shift
from sae_italian.base.errors import UsageError
from sae_italian.corpora import iter_documents, pack
from sae_italian.evaluation import evaluate
from sae_italian.models.activations import read_activations

MICRO = "micro-italiano"


@pytest.fixture(scope="module")
def long_documents(tmp_path_factory):
    """Twelve documents of more than 128 tokens, twelve of a few."""
    path = tmp_path_factory.mktemp("long") / "lunghi.jsonl"
    texts = [document.text for document in islice(iter_documents(MICRO), 120)]
    long = [" ".join(texts[4 * i : 4 * i + 4]) for i in range(12)]
    rows = [text for pair in zip(long, (t[:40] for t in texts[:12]), strict=True) for text in pair]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
    return path


def test_a_bucket_is_the_evaluation_card(topk_sae, mini, jsonl):
    """The same tokens, the same numbers, the same intervals."""
    card = evaluate(topk_sae, mini, str(jsonl), split="all", n_tokens=900)
    conditions = [Condition(name, mini, str(jsonl), "all") for name in "ab"]
    found = shift(topk_sae, conditions, by="genre", n_tokens=900)
    bucket = found.bucket("a")
    assert (bucket.n_tokens, bucket.n_documents) == (card.n_tokens, card.n_documents)
    assert bucket.numbers == {key: getattr(card, key) for key in bucket.numbers}


def test_the_same_text_under_two_names_shifts_nothing(topk_sae, mini, jsonl):
    conditions = [Condition(name, mini, str(jsonl), "all") for name in "ab"]
    found = shift(topk_sae, conditions, by="genre", n_tokens=600)
    assert found.bucket("a").change == {} and all(value == (0, 0, 0) for value in found.bucket("b").change.values())


def test_documents_of_two_texts_are_resampled_apart(topk_sae, mini, jsonl, tmp_path):
    """A copy is another text: the difference is none, and its interval that of two draws."""
    files = jsonl, shutil.copy(jsonl, tmp_path / "copia.jsonl")
    conditions = [Condition(name, mini, str(file), "all") for name, file in zip("ab", files, strict=True)]
    change = shift(topk_sae, conditions, by="genre", n_tokens=600).bucket("b").change["ce_loss"]
    assert change.value == 0 and change.lo < 0 < change.hi


def test_an_exact_sae_shifts_nowhere(identity_sae, mini, jsonl):
    conditions = [Condition("micro", mini, MICRO, "all"), Condition("news", mini, str(jsonl), "all")]
    found = shift(identity_sae, conditions, by="genre", n_tokens=600)
    context = context_shift(identity_sae, mini, str(jsonl), split="all", n_tokens=900, packed=True)
    for bucket in [*found.buckets, *context.buckets]:
        assert bucket.numbers["explained_variance"].value == pytest.approx(1, abs=1e-6)
        assert bucket.numbers["delta_lm_loss"].value == pytest.approx(0, abs=1e-5)


def test_another_model_is_a_shift_and_the_same_one_is_none(identity_sae, mini, jsonl):
    """An SAE that knows only half of the base model's space, and a model that has moved into the other half."""
    half = copy.deepcopy(identity_sae)
    with torch.no_grad():
        half.W_dec[:, 64:] = 0
    moved = copy.deepcopy(mini)
    with torch.no_grad():
        moved.model.embed_tokens.weight[:, 64:] *= 8
    conditions = [Condition(n, m, str(jsonl), "all") for n, m in (("base", mini), ("same", mini), ("moved", moved))]
    found = shift(half, conditions, by="model", n_tokens=600)
    assert found.bucket("same").change["explained_variance_uncentred"] == (0, 0, 0)
    change = found.bucket("moved").change["explained_variance_uncentred"]
    assert change.lo <= change.value <= change.hi < -0.05
    assert change.value == pytest.approx(
        found.bucket("moved").numbers["explained_variance_uncentred"].value
        - found.bucket("base").numbers["explained_variance_uncentred"].value
    )


def test_context_buckets_are_of_their_positions(topk_sae, mini, jsonl):
    """By hand: the uncentred explained variance of positions 64 to 96 of the same windows."""
    found = context_shift(topk_sae, mini, str(jsonl), split="all", edges=[0, 64, 96, 128], n_tokens=1000, packed=True)
    block = next(pack(iter_documents(jsonl), mini.tokenizer, 128, windows_per_block=8))
    tokens = torch.from_numpy(block.tokens)
    keep = tokens != mini.tokenizer.bos_token_id
    keep[:, :64], keep[:, 96:] = False, False
    x = read_activations(mini, tokens, "blocks.2.hook_resid_post")[keep]
    with torch.no_grad():
        error = (x - topk_sae(x)).pow(2).sum()
    bucket = found.bucket("64-96")
    assert bucket.n_tokens == int(keep.sum())
    assert bucket.numbers["explained_variance_uncentred"].value == pytest.approx(
        float(1 - error / x.pow(2).sum()), rel=1e-5
    )
    assert math.isclose(sum(b.n_tokens for b in found.buckets), int((tokens != mini.tokenizer.bos_token_id).sum()))
    assert found.reference == "96-128"  # the last that the training's context of 128 knows
    beyond = context_shift(topk_sae, mini, str(jsonl), split="all", edges=[0, 192, 256], n_tokens=300, packed=True)
    assert beyond.reference == "0-192"  # it knows none of them


def test_a_corpus_without_end_is_not_searched_for_ever(topk_sae, mini):
    with pytest.raises(UsageError, match="has no document of 256 tokens.*packed=true"):
        context_shift(topk_sae, mini, "micro-italiano", edges=[0, 64, 256], split="all")


def test_only_long_documents_are_taken_each_from_its_beginning(topk_sae, mini, long_documents):
    found = context_shift(topk_sae, mini, str(long_documents), edges=[0, 64, 128], n_tokens=10_000, split="all")
    assert [bucket.n_documents for bucket in found.buckets] == [12, 12]
    assert [bucket.n_tokens for bucket in found.buckets] == [12 * 63, 12 * 64]  # the BOS does not count
    with pytest.raises(UsageError, match="has no document of 512 tokens.*packed=true"):
        context_shift(topk_sae, mini, str(long_documents), edges=[0, 64, 512], split="all", n_tokens=100)


def test_one_document_has_no_interval(topk_sae, mini, long_documents, tmp_path):
    one = tmp_path / "uno.jsonl"
    one.write_text(long_documents.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    found = context_shift(topk_sae, mini, str(one), edges=[0, 64, 128], n_tokens=100, split="all")
    value, lo, hi = found.bucket("0-64").numbers["ce_loss"]
    assert value > 0 and math.isnan(lo) and math.isnan(hi)
    change = found.bucket("64-128").change | found.bucket("0-64").change
    assert math.isnan(change["ce_loss"].lo)
    found.save(tmp_path / "out")
    assert "nan" not in (tmp_path / "out" / "shift.md").read_text() and found.svg()


def test_default_edges_end_where_the_model_does():
    assert default_edges(128, 512) == [0, 64, 128, 256, 512]
    assert default_edges(256, 1024) == [0, 128, 256, 512, 1024]
    assert default_edges(1024, None)[-1] == 8192
    assert default_edges(100, 350) == [0, 50, 100, 200, 350]


def test_a_short_corpus_gives_what_it_has(topk_sae, mini, jsonl):
    conditions = [Condition("a", mini, str(jsonl)), Condition("b", mini, str(jsonl), "all")]
    found = shift(topk_sae, conditions, by="genre", n_tokens=3000)
    assert 0 < found.bucket("a").n_tokens < 3000 <= found.bucket("b").n_tokens


def test_bad_input(topk_sae, mini):
    with pytest.raises(UsageError, match="two or more buckets"):
        shift(topk_sae, [Condition("a", mini, MICRO)], by="genre")
    with pytest.raises(UsageError, match="two or more buckets of different names; given: a, a"):
        shift(topk_sae, [Condition("a", mini, MICRO), Condition("a", mini, MICRO)], by="genre")
    for edges in ([0, 64], [0, 64, 32], [-1, 2, 3]):
        with pytest.raises(UsageError, match="three or more rising"):
            context_shift(topk_sae, mini, MICRO, edges=edges)
    with pytest.raises(UsageError, match="the model has 512 positions"):
        context_shift(topk_sae, mini, MICRO, edges=[0, 64, 1024])
