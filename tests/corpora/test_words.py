"""Words from the memory give the tokens and offsets of the whole, whatever the text, the size or the hashes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_italian.corpora import word_memory, words
from sae_italian.corpora.words import WordTokenizer, _whole, fast_backend
from tests.corpora.test_packing import HARD, TOKENIZERS

ALPHABET = "aàeé'’ ,.  \n\t\u00a0\u200be\u03016«»🙂日▁Ġ-"


def test_words_one_by_one_are_the_whole():
    spaces = [
        "  due  spazi ",
        " inizio",
        "fine ",
        "a\u00a0b c",
        "\n\n",
        " ",
        "",
        "x \n y",
        "\u200b z",
        "</s> e <s> letterali",
    ]
    for tokenizer in TOKENIZERS.values():
        words = WordTokenizer.of(tokenizer)
        assert words.splits
        for _ in range(2):  # the second time from memory
            texts = HARD + spaces + [" ".join(HARD)]
            for text, tokens in zip(texts, words.tokenise(texts).documents(), strict=True):
                whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
                assert tokens.ids.tolist() == whole["input_ids"]
                assert list(zip(tokens.start.tolist(), tokens.end.tolist(), strict=True)) == whole["offset_mapping"]


def test_a_tokenizer_that_crosses_spaces_is_not_cut():
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "a▁": 4, "a▁b": 5}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "▁"), ("a▁", "b")], unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")  # pyright: ignore
    words = WordTokenizer.of(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert not words.splits and words.tokenise(["a b"]).flat[:, 0].tolist() == [5]


def assert_whole(tokenizer, by_words, texts):
    expected, found = _whole(fast_backend(tokenizer), texts), by_words.tokenise(texts)
    assert np.array_equal(found.bounds, expected.bounds) and np.array_equal(found.flat, expected.flat)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(batches=st.lists(st.lists(st.text(ALPHABET, max_size=40), max_size=5), min_size=1, max_size=3))
def test_any_text_is_tokenised_as_the_whole(kind, batches):
    by_words = KNOWN.setdefault(kind, WordTokenizer.of(TOKENIZERS[kind]))
    for texts in batches:
        assert_whole(TOKENIZERS[kind], by_words, texts)


KNOWN: dict[str, WordTokenizer] = {}


def test_words_with_one_hash_are_told_apart(monkeypatch):
    """Only 16 different hashes: nearly every look-up meets another word, and the tokens stay right."""
    hashes = word_memory.Hasher.__call__
    monkeypatch.setattr(word_memory.Hasher, "__call__", lambda self, found: hashes(self, found) & np.uint64(15))
    by_words = WordTokenizer(fast_backend(TOKENIZERS["metaspace"]), splits=True)
    for _ in range(3):
        assert_whole(TOKENIZERS["metaspace"], by_words, [" ".join(HARD), "la città che è più bella", *HARD])


def test_slots_next_to_each_other_are_shared(monkeypatch):
    """Hashes that differ only in high bits want one slot: each word moves on to the next free one."""
    hashes = word_memory.Hasher.__call__
    monkeypatch.setattr(word_memory.Hasher, "__call__", lambda self, found: hashes(self, found) & ~np.uint64(2**24 - 1))
    by_words = WordTokenizer(fast_backend(TOKENIZERS["metaspace"]), splits=True)
    for _ in range(2):
        assert_whole(TOKENIZERS["metaspace"], by_words, [" ".join(HARD), *HARD])
        rows = by_words.memory.find(by_words.memory.hashes[: by_words.memory.n_words])
        assert rows.tolist() == list(range(by_words.memory.n_words))


def test_a_full_memory_is_emptied_and_goes_on(monkeypatch):
    monkeypatch.setattr(word_memory, "MAX_WORDS", 60)
    by_words = WordTokenizer(fast_backend(TOKENIZERS["byte-level"]), splits=True)
    for number in range(40):
        assert_whole(TOKENIZERS["byte-level"], by_words, [f"frase numero {number} di {number * 7}", HARD[number % 5]])
        assert 0 < by_words.memory.n_words <= 60


def test_long_documents_and_batches(monkeypatch):
    monkeypatch.setattr(words, "MAX_PIECE", 100)
    by_words = WordTokenizer(fast_backend(TOKENIZERS["metaspace"]), splits=True)
    assert_whole(TOKENIZERS["metaspace"], by_words, ["", "x", *HARD, " ".join(HARD), "a" * 99, "b" * 101, "", "fine"])
    assert_whole(TOKENIZERS["metaspace"], by_words, [])
    assert_whole(TOKENIZERS["metaspace"], by_words, ["", ""])
