"""The words of treebanks as a model and an SAE see them: labels, activations, and latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from sae_italian.analysis.probes.treebank import Sentence, Treebank
from sae_italian.base.errors import UsageError
from sae_italian.corpora import TextDocument
from sae_italian.corpora.packing import bos_id
from sae_italian.corpora.tokens import tokenise_batches
from sae_italian.models.activations import read_activations

TOKENS_PER_BATCH = 2048
CHUNK = 1024  # words encoded at once


@dataclass(frozen=True)
class Words:
    """Words of one treebank. A word is read at the token that completes it: a causal model knows it only there."""

    source: str
    names: list[str]  # of the labels
    labels: scipy.sparse.csr_array  # [words, labels], 0 or 1
    sentence: Int[np.ndarray, " words"]
    train: Bool[np.ndarray, " words"]
    x: Float[np.ndarray, "words d_in"]
    n_cut: int = 0  # words beyond the context, left out

    def column(self, name: str) -> Float[np.ndarray, " words"]:
        """Return 1 for the words that bear a label, 0 for the others. Raises: ValueError for a label that is none of the names."""
        return self.labels[:, [self.names.index(name)]].toarray().ravel()


def label_names(treebanks: Sequence[Treebank]) -> list[str]:
    """Return every label that occurs, sorted."""
    return sorted({label for bank in treebanks for s in bank.sentences for word in s.words for label in word.labels})


@torch.no_grad()
def read_words(model: Any, hook_name: str, treebank: Treebank, names: Sequence[str], *, context_size: int) -> Words:
    """Return a treebank's words with the activations of a model (backend `hf`) at a hook.

    Each sentence is read alone after a BOS, so that no word is seen through another sentence. Words that begin beyond the
    context are counted and left out.
    Raises: UsageError when no word is left, or the model has no such hook.
    """
    tokens, spans = _tokenised(treebank.sentences, model.tokenizer, context_size)
    column = {name: i for i, name in enumerate(names)}
    rows, columns, sentence, train, n_cut, parts = [], [], [], [], 0, []
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    with tqdm(total=len(order), desc=treebank.name, unit="sentence", disable=None) as bar:
        for batch in _batches(order, tokens):
            acts = _activations(model, hook_name, [tokens[i] for i in batch])
            for place, i in enumerate(batch):
                item = treebank.sentences[i]
                last = last_tokens(item, spans[i])
                kept = [(word, at) for word, at in zip(item.words, last.tolist(), strict=True) if at >= 0]
                n_cut += len(item.words) - len(kept)
                for word, _ in kept:
                    found = [column[label] for label in word.labels if label in column]
                    rows += [len(sentence)] * len(found)
                    columns += found
                    sentence.append(i)
                    train.append(item.train)
                parts.append(acts[place, [at + 1 for _, at in kept]])  # the BOS comes first
            bar.update(len(batch))
    if not sentence:
        raise UsageError(f"treebank {treebank.name} has no word within {context_size} tokens.")
    ones = np.ones(len(rows), dtype=np.float32)
    labels = scipy.sparse.csr_array((ones, (rows, columns)), shape=(len(sentence), len(names)))
    x = torch.cat(parts).float().cpu().numpy()
    return Words(treebank.name, list(names), labels, np.array(sentence), np.array(train), x, n_cut)


def _tokenised(
    sentences: Sequence[Sentence], tokenizer: Any, context_size: int
) -> tuple[list[np.ndarray], list[Int[np.ndarray, "tokens 2"]]]:
    """Return each sentence's ids, BOS first, and the spans of the tokens after it, cut to the context."""
    documents = [TextDocument(sentence.text, str(i), "") for i, sentence in enumerate(sentences)]
    ((_, batch),) = tokenise_batches([documents], tokenizer)
    ids, spans, room = [], [], context_size - 1
    for found in batch.documents():
        token, start, end = (np.asarray(part)[:room] for part in found)
        ids.append(np.concatenate([[bos_id(tokenizer)], token]))
        spans.append(np.stack([start, end], axis=1))
    return ids, spans


def last_tokens(sentence: Sentence, spans: Int[np.ndarray, "tokens 2"]) -> Int[np.ndarray, " words"]:
    """Return for each word the token that completes it, -1 where the sentence was cut before.

    That is the last token that ends within the word, or where one token covers the word's end and more, that token.
    """
    end = np.array([word.end for word in sentence.words])
    start = np.array([word.start for word in sentence.words])
    if len(spans) == 0:
        return np.full(len(end), -1)
    within = np.searchsorted(spans[:, 1], end, side="right") - 1
    inside = (within >= 0) & (spans[within, 1] > start)
    complete = inside & (spans[within, 1] == end)
    beyond = np.minimum(within + 1, len(spans) - 1)
    straddled = ~complete & (spans[beyond, 0] < end) & (spans[beyond, 1] > end)
    return np.where(
        complete, within, np.where(straddled, beyond, np.where(inside & (within + 1 < len(spans)), within, -1))
    )


def _batches(order: list[int], tokens: list[np.ndarray]) -> list[list[int]]:
    """Return sentences of similar length together, TOKENS_PER_BATCH tokens of them."""
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(tokens[i]) > TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(i)
    return batches


def _activations(model: Any, hook_name: str, batch: list[np.ndarray]) -> torch.Tensor:
    """Return activations of sentences of different lengths; what fills the shorter ones is never looked back at."""
    longest = max(len(ids) for ids in batch)
    padded = np.stack([np.pad(ids, (0, longest - len(ids)), mode="edge") for ids in batch]).astype(np.int64)
    return read_activations(model, torch.from_numpy(padded).to(model.device), hook_name)


@torch.no_grad()
def encode_words(sae: Any, x: Float[np.ndarray, "words d_in"]) -> scipy.sparse.csr_array:
    """Return the latents' activations on words, [words, d_sae]. Raises: UsageError when d_in is not that of the words."""
    if x.shape[1] != sae.cfg.d_in:
        raise UsageError(
            f"the SAE reads {sae.cfg.d_in} dimensions (d_in), the activations have {x.shape[1]}: "
            "compare SAEs of one model and site."
        )
    parts = []
    for first in range(0, len(x), CHUNK):
        latents = sae.encode(torch.from_numpy(x[first : first + CHUNK]).to(sae.device, sae.dtype))
        latents = latents.to_dense() if latents.is_sparse else latents
        parts.append(scipy.sparse.csr_array(latents.float().cpu().numpy()))
    return scipy.sparse.csr_array(scipy.sparse.vstack(parts))
