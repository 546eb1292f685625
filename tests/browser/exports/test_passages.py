"""Token strings that join to the true text, names, and the test for mangled letters."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_italian.browser.exports.latents import facts_of, names_of, pieces, row_id, storable, tables
from sae_italian.circuits.show import cantor
from tests.browser.exports.field_check import groups_of
from tests.browser.exports.mojibake import is_mojibake

COVER = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@given(lengths=COVER, gaps=st.lists(st.integers(0, 1), min_size=12, max_size=12), tail=st.integers(0, 2))
def test_pieces_join_to_the_text_and_none_is_empty(lengths, gaps, tail):
    end, spans = 0, []
    for length, gap in zip(lengths, gaps, strict=False):
        start = end + gap
        end = start + length
        spans.append((start, end))
    text = "abcdefghijklmnopqrstuvwxyzàèìòù"[:end] + "0" * (end - 31 if end > 31 else 0)
    values = np.arange(1.0, len(spans) + 1)
    found, strengths, owner = pieces(text, np.array(spans), values)
    assert "".join(found) == text and len(found) == len(strengths) and len(owner) == len(spans)
    assert all(found) or not text
    assert max(strengths) == values.max() and all(strengths[i] >= v for i, v in zip(owner, values, strict=True))


def test_a_letter_of_several_byte_tokens_is_one_piece_with_the_strongest():
    spans = np.array([[0, 1], [2, 3], [2, 3], [2, 3], [3, 4]])
    found = pieces("a 🙂b", spans, np.array([0, 1.0, 3.0, 2.0, 0]))
    assert found == (["a", " 🙂", "b"], [0, 3.0, 0], [0, 1, 1, 1, 2])


@pytest.mark.parametrize("text", ["perchÃ©", "Ġperché".replace("é", "Ã©"), "cittÃł", "Ġciao", "â€™Ã¨", "Ċ"])
def test_mangled(text):
    assert is_mojibake(text)


@pytest.mark.parametrize(
    "text", ["perché", " città", "l’aria", "Wałęsa", "Ġ Ħ ŻEJTUN", "שלום", "日本", "…", "·", "", "ÀÈÌ"]
)
def test_not_mangled(text):
    assert not is_mojibake(text)


def test_storable_keeps_letters_and_drops_what_a_database_refuses():
    assert storable("a\x00b\ud83dc🙂à") == "a b\ufffdc🙂à"


def test_names(cache):
    facts = facts_of(cache.manifest, names_of(cache.manifest))
    assert (facts["model"], facts["source_set"], facts["source"]) == ("sae-italian-mini", "res-it-256", "1-res-it-256")
    assert facts_of(cache.manifest, names_of(cache.manifest, suffix="k8"))["source"] == "1-res-it-256__k8"
    assert row_id(facts, "a", 1, 2) == row_id(facts, "a", 1, 2) != row_id(facts, "a", 12)
    minerva = cache.manifest.model_copy(update={"model": "sapienzanlp/Minerva-1B-base-v1.0"})
    assert names_of(minerva)["model"] == "minerva-1b-base-v1.0"


def test_cantor_pairs_are_circuit_tracers():
    assert [cantor(a, b) for a, b in ((0, 0), (1, 0), (0, 1), (2, 0), (20, 1454))] == [0, 1, 2, 3, 1_088_529]


def test_the_table_of_fields_speaks_of_its_own_fields():
    for name, table in tables().items():
        fields = table["fields"]
        for rule in ("range", "pattern", "one_of", "rows"):
            assert set(table.get(rule, {})) <= set(fields), name
        for group in [*groups_of(table), table.get("ascending", []), table.get("key", [])]:
            assert set(group) <= set(fields), name
