"""Many documents in one call give each the tokens and offsets that it has alone."""

from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sae_italian.base.errors import UsageError
from sae_italian.corpora import TextDocument, pack, packing
from sae_italian.corpora.packing import NO_DOCUMENT, corpus_stats, special_mask, tokenise, tokenised
from tests.corpora.test_packing import HARD, TOKENIZERS

ALPHABET = "aàeé'’ ,.  \n\t\u00a0\u200be\u03016«»🙂日▁Ġ-"
SPACES = [
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


def assert_whole(tokenizer, texts):
    assert_same(tokenizer, texts, tokenise(tokenizer, texts))


def assert_same(tokenizer, texts, batch):
    for text, (ids, start, end) in zip(texts, batch, strict=True):
        whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
        assert ids.tolist() == whole["input_ids"]
        assert list(zip(start.tolist(), end.tolist(), strict=True)) == whole["offset_mapping"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_batch_is_its_documents_one_by_one(kind, monkeypatch):
    assert_whole(TOKENIZERS[kind], HARD + SPACES + [" ".join(HARD)])
    assert_whole(TOKENIZERS[kind], [])
    monkeypatch.setattr(packing, "MAX_BATCH", 100)  # several batches, some of one long document
    texts = ["", "x", *HARD, " ".join(HARD), "a" * 99, "b" * 101, "", "fine"]
    found = list(tokenised((TextDocument(text, "", "") for text in texts), TOKENIZERS[kind], 4))
    assert [document.text for batch, _ in found for document in batch] == texts and len(found) > len(texts) / 4
    for batch, tokens in found:
        assert_same(TOKENIZERS[kind], [document.text for document in batch], tokens)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(ALPHABET, max_size=40), max_size=5))
def test_any_text_is_tokenised_as_alone(kind, texts):
    assert_whole(TOKENIZERS[kind], texts)


def test_truncation_and_padding_left_from_an_earlier_call_are_not_used():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["metaspace"].backend_tokenizer, pad_token="</s>")
    tokenizer(HARD, truncation=True, max_length=2, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation
    assert len(tokenise(tokenizer, [HARD[0], "x"])[0][0]) > 10
    with pytest.raises(UsageError, match="a slow tokenizer"):
        tokenise(object(), ["x"])  # pyright: ignore


TYPED = "Un testo <s>barrato</s> e <|endoftext|> di nuovo."


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_special_token_that_is_typed_is_characters(kind):
    """In a corpus, in what a loaded model's tokenizer is given, and in the statistics."""
    tokenizer = TOKENIZERS[kind]
    (ids, start, end), *_ = tokenise(tokenizer, [TYPED])
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)
    assert min(start) == 0 and max(end) == len(TYPED)
    block = next(pack([TextDocument(TYPED * 9, "0", "t")], tokenizer, 32))
    assert np.array_equal(special_mask(block.tokens, tokenizer), block.doc == NO_DOCUMENT)


def test_the_tokenizer_of_a_model_takes_text_as_text_and_text_without_it_as_before(mini):
    from transformers import AutoTokenizer

    bos, *rest = mini.tokenizer(TYPED).input_ids
    assert bos == mini.tokenizer.bos_token_id and not set(rest) & set(mini.tokenizer.all_special_ids)
    stock = AutoTokenizer.from_pretrained(mini.tokenizer.name_or_path)
    assert all(mini.tokenizer(text).input_ids == stock(text).input_ids for text in HARD + SPACES[:-1])


def test_typed_special_tokens_are_counted(mini, tmp_path):
    (tmp_path / "a.txt").write_text("<s>uno</s> e <s>\n\ndue\n\ntre </s>\n")
    stats = corpus_stats(tmp_path / "a.txt", mini.tokenizer)
    assert stats["typed_special_tokens"] == 2 and corpus_stats(tmp_path / "a.txt", None)["typed_special_tokens"] is None


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_marks_and_soft_hyphens_part_no_word(form, tmp_path):
    (tmp_path / "a.txt").write_text(normalize(form, "È un’altra cit\u00adtà, perch\u00adé no? dell''Aquila"), "utf-8")
    assert corpus_stats(tmp_path / "a.txt", None)["words"] == 7


def test_accents_that_follow_their_letter_belong_to_its_token():
    """A tokenizer that composes letters, as Qwen's, leaves the accent out of its spans: text ended as «perche»."""
    tokenizer = Tokenizer(models.WordLevel({"perché": 1, "città": 2, "e": 3, "?": 0}, unk_token="?"))
    tokenizer.normalizer = normalizers.NFC()  # pyright: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    composing = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    texts = [normalize(form, "e perché  città") for form in ("NFC", "NFD")] + ["", "e\u0301\u0302", "\u0301 e"]
    for text, (ids, start, end) in zip(texts, tokenise(composing, texts), strict=True):
        assert [text[a:b] for a, b in zip(start, end, strict=True)] == text.split()
        assert ids.tolist() == [3, 1, 2] or "perch" not in text
