"""Packing keeps every character: text rebuilt from offsets is the document's own, for two kinds of tokenizer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sae_italian.base.errors import UsageError
from sae_italian.corpora import TextDocument, pack, packing
from sae_italian.corpora.packing import NO_DOCUMENT, Packer, layout_of, special_mask, take_tokens, tokenised
from tests.bench.train_mini import train_tokenizer

HARD = [
    "Perché la città è più bella? L'università dell'Aquila, un'altra «cosa» c'è già.",
    "e\u0301 cosi\u0300: accenti combinati",
    "emoji 🙂👩‍👩‍👧 e\r\nCRLF\te tabulazione",
    "日本語 e русский nel mezzo",
    "x",
]


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(HARD[:1] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


TOKENIZERS = {"metaspace": train_tokenizer(iter(HARD[:1] * 50), 400), "byte-level": byte_level()}


def documents(texts):
    return [TextDocument(text, str(i), "t") for i, text in enumerate(texts)]


def rebuilt(blocks) -> dict[int, list[tuple[int, int]]]:
    """Return the spans of each document's tokens, over all windows."""
    spans: dict[int, list[tuple[int, int]]] = {}
    for block in blocks:
        for doc, start, end in zip(block.doc.ravel(), block.start.ravel(), block.end.ravel(), strict=True):
            if doc != NO_DOCUMENT:
                spans.setdefault(int(doc), []).append((int(start), int(end)))
    return spans


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_offsets_cover_every_document_without_gaps(kind):
    texts = HARD * 20
    blocks = list(pack(documents(texts), TOKENIZERS[kind], 16, windows_per_block=7))
    spans = rebuilt(blocks)
    complete = sorted(spans)[:-1]  # the last may be cut by the dropped last window
    assert len(complete) > 90
    for doc in complete:
        covered = sorted(spans[doc])
        assert covered[0][0] == 0 and covered[-1][1] == len(texts[doc])
        assert all(after[0] <= before[1] for before, after in zip(covered, covered[1:], strict=False))


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(texts=st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=12), context=st.integers(4, 20))
@settings(max_examples=40, deadline=None)
def test_packing_is_the_documents_in_order_with_a_bos_before_each(kind, texts, context):
    tokenizer = TOKENIZERS[kind]
    blocks = list(Packer(context, layout_of(tokenizer)).blocks(tokenised(documents(texts), tokenizer), 3))
    tokens = np.concatenate([block.tokens for block in blocks]).ravel() if blocks else np.empty(0, int)
    doc = np.concatenate([block.doc for block in blocks]).ravel() if blocks else np.empty(0, int)
    bos = tokenizer.bos_token_id
    assert len(tokens) % context == 0
    assert (tokens[::context] == bos).all()  # every window opens with a BOS
    expected = [t for text in texts for t in tokenizer(text, add_special_tokens=False).input_ids]
    assert tokens[doc != NO_DOCUMENT].tolist() == expected[: int((doc != NO_DOCUMENT).sum())]
    changes = np.flatnonzero(np.diff(doc[doc != NO_DOCUMENT].astype(np.int64)))
    assert (np.diff(doc[doc != NO_DOCUMENT].astype(np.int64))[changes] >= 1).all()
    first = sum(block.documents != [] for block in blocks) and blocks[0].first_doc
    assert not blocks or first == 0
    names = [document.text for block in blocks for document in block.documents]
    assert names == texts[: len(names)]


def test_the_result_does_not_depend_on_how_it_is_batched(monkeypatch):
    def packed(windows, n):
        monkeypatch.setattr(packing, "MAX_BATCH", n)
        blocks = pack(documents(HARD * 30), TOKENIZERS["metaspace"], 16, windows_per_block=windows)
        return np.concatenate([block.tokens for block in blocks])

    assert np.array_equal(packed(5, 30), packed(64, 10_000))


def test_special_mask_is_the_bos():
    block = next(pack(documents(HARD * 5), TOKENIZERS["metaspace"], 16))
    assert np.array_equal(special_mask(block.tokens, TOKENIZERS["metaspace"]), block.doc == NO_DOCUMENT)


def test_take_tokens_cuts_to_windows_and_refuses_a_short_corpus():
    def packed():
        return pack(documents(HARD * 5), TOKENIZERS["metaspace"], 16, windows_per_block=4)

    assert sum(block.tokens.size for block in take_tokens(packed(), 100, "x")) == 112
    with pytest.raises(UsageError, match="fewer than the 1,000,000"):
        list(take_tokens(packed(), 1_000_000, "x"))
    with pytest.raises(UsageError, match="the text fills no window of 10000 tokens"):
        list(take_tokens(pack(documents(HARD), TOKENIZERS["metaspace"], 10_000), 100, "x", at_most=True))


def test_a_context_without_room_for_text():
    with pytest.raises(UsageError, match="context_size is 1; it must be 2 or more"):
        next(pack(documents(HARD), TOKENIZERS["metaspace"], 1))
    with pytest.raises(UsageError, match="windows_per_block is 0"):  # which would never end
        next(pack(documents(HARD), TOKENIZERS["metaspace"], 4, windows_per_block=0))


@pytest.mark.parametrize("context", [2, 3, 5, 8])
def test_a_block_brings_the_documents_that_begin_in_it(context):
    """Also a document that begins exactly where a window does."""
    tokenizer, seen = TOKENIZERS["metaspace"], set()
    for block in pack(documents(["x", *HARD, "x", "x"] * 3), tokenizer, context, windows_per_block=1):
        here = set(block.doc[block.doc != NO_DOCUMENT].tolist())
        brought = set(range(block.first_doc, block.first_doc + len(block.documents)))
        assert brought == here - seen
        seen |= here
