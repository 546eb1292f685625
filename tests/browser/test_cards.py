"""Records made from a real cache: the text is the documents' own, the numbers are the cache's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_italian.autointerp import AutointerpConfig, run_autointerp
from sae_italian.browser.cards import CardMaker, Report, split_text
from sae_italian.browser.report import write_report
from sae_italian.browser.schema import check_card, check_row, check_run
from sae_italian.cache import FeatureCache


@pytest.fixture(scope="module")
def cache(small_cache, tmp_path_factory) -> FeatureCache:
    import shutil

    return FeatureCache.open(shutil.copytree(small_cache, tmp_path_factory.mktemp("cards") / "cache"))


@pytest.fixture(scope="module")
def maker(cache, mini):
    store = run_autointerp(cache, mini.tokenizer, AutointerpConfig(latents=60))
    return CardMaker(Report(cache, mini.tokenizer, store, "prova", [], [], []))


def test_every_record_fits_the_schema(maker):
    check_run(maker.run_record())
    rows = maker.rows()
    assert len(rows) == 256 and sum(row["detection"] is not None for row in rows) > 20
    for row in rows:
        check_row(row)
    for card in maker.cards():
        check_card(card)


def test_contexts_are_true_text_with_the_caches_activations(maker, cache):
    latent = int(np.argmax(cache.statistics["count"]))
    position, value = cache.latent(latent)
    card = maker.card(latent)
    assert card["groups"][0]["contexts"][0]["max"] == pytest.approx(value.max())
    seen = set()
    for group in card["groups"]:
        for context in group["contexts"]:
            text = "".join(piece for piece, _ in context["segments"])
            index = next(i for i in range(cache.n_documents) if cache.document(i).doc_id == context["doc_id"])
            assert text in cache.document(index).text
            assert max(activation for _, activation in context["segments"]) == pytest.approx(context["max"])
            assert text not in seen
            seen.add(text)
    assert sum(card["histogram"]["counts"]) == len(position)


@given(
    text=st.text(min_size=1, max_size=40),
    cuts=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.floats(0, 9)), max_size=12),
)
def test_split_text_loses_no_character(text, cuts):
    spans = np.array([[min(a, b, len(text)), min(max(a, b), len(text))] for a, b, _ in cuts], dtype=int).reshape(-1, 2)
    pieces = split_text(text, spans, np.array([value for *_, value in cuts]))
    assert "".join(piece for piece, _ in pieces) == text
    assert all(piece for piece, _ in pieces)


def test_a_letter_of_several_byte_tokens_shows_once_with_the_strongest():
    pieces = split_text("a🙂b", np.array([[0, 1], [1, 2], [1, 2], [1, 2], [2, 3]]), np.array([0, 1.0, 3.0, 2.0, 0]))
    assert pieces == [("a", 0.0), ("🙂", 3.0), ("b", 0.0)]


def test_a_cache_without_explanations_still_has_a_report(small_cache, mini, tmp_path):
    import shutil

    bare = FeatureCache.open(
        shutil.copytree(small_cache, tmp_path / "bare", ignore=shutil.ignore_patterns("*.sqlite*", "results.json"))
    )
    index = write_report(bare, mini.tokenizer, tmp_path / "report")
    assert index.is_file() and "not explained" in (index.parent / "data" / "rows" / "0000.js").read_text(
        encoding="utf-8"
    )
