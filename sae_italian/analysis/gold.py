"""Which gold labels does a single latent detect?

MicroItaliano knows what every word of its text is. A latent fires on a word when it is active, above a threshold, on
any of the word's tokens. For each label the latent and threshold (0, a quarter or a half of the latent's maximum) with
the best F1 are chosen on the train and val documents; precision, recall and F1 are those on the test documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from sae_italian import micro_italiano
from sae_italian.cache import FeatureCache
from sae_italian.cache.read import PARTS
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.corpora.stream import MICRO_ITALIANO

THRESHOLDS = (0.0, 0.25, 0.5)
DETECTED = 0.8  # F1 on the test documents from which a label counts as detected
LEAST_WORDS = 30  # in either half
_FEATURES = ("upos", "gender", "number", "person", "tense", "mood", "verbform")
_COMBINED = (("gender", "number"), ("person", "number"), ("mood", "tense"))


@dataclass(frozen=True)
class GoldResult:
    """The best latent for one label. Numbers are over words of the test documents."""

    label: str
    category: str
    n: int
    latent: int
    threshold: float  # as a share of the latent's maximum
    f1: float
    precision: float
    recall: float


class GoldWords:
    """The gold words that a cache covers, their labels, and the word of each token."""

    def __init__(self, cache: FeatureCache):
        self.names: dict[tuple[str, str], int] = {}  # (category, label) -> column
        self.word_of_position = np.full(cache.n_positions, -1, dtype=np.int64)
        self.doc_of_word: list[int] = []
        pairs: list[tuple[int, int]] = []  # word, column
        order = np.argsort(cache.doc, kind="stable")
        docs, first = np.unique(cache.doc[order], return_index=True)
        for doc, positions in zip(docs.tolist(), np.split(order, first[1:]), strict=True):
            if doc != NO_DOCUMENT:
                pairs += self._add_document(cache, doc, positions)
        self.labels = zeros_and_ones(pairs, (len(self.doc_of_word), len(self.names)))

    def _add_document(
        self, cache: FeatureCache, doc: int, positions: Int[np.ndarray, " tokens"]
    ) -> Iterator[tuple[int, int]]:
        _, seed, index = cache.document(doc).doc_id.split("/")
        gold = micro_italiano.document(int(index), seed=int(seed))
        starts = np.array([word.start for word in gold.words])
        base = len(self.doc_of_word)
        # A token belongs to the word that its last character lies in.
        self.word_of_position[positions] = (
            base + np.searchsorted(starts, cache.whole("end")[positions], side="left") - 1
        )
        for number, word in enumerate(gold.words, base):
            inside = [span.labels["construction"] for span in gold.constructions if span.start <= word.start < span.end]
            for key in _labels(word.labels, inside, gold.register):
                yield number, self.names.setdefault(key, len(self.names))
        self.doc_of_word += [doc] * len(gold.words)

    def activations(self, cache: FeatureCache) -> scipy.sparse.csr_array:
        """Return the largest activation of every latent on any token of each word, [words, latents]."""
        rows, columns, values = [], [], []
        for latent in range(cache.manifest.d_sae):
            position, value = cache.latent(latent)
            word = self.word_of_position[position]
            found, inverse = np.unique(word[word >= 0], return_inverse=True)
            largest = np.zeros(len(found), dtype=np.float32)
            np.maximum.at(largest, inverse, value[word >= 0])
            rows.append(found)
            columns.append(np.full(len(found), latent))
            values.append(largest)
        places = np.concatenate(rows), np.concatenate(columns)
        return scipy.sparse.csr_array((np.concatenate(values), places), shape=(len(self.doc_of_word), latent + 1))


def _labels(labels: dict[str, str], constructions: list[str], register: str) -> list[tuple[str, str]]:
    """Return the (category, label) pairs of one word."""
    found = [(name, f"{name}={labels[name]}") for name in _FEATURES if name in labels]
    for names in _COMBINED:
        if all(name in labels for name in names):
            found.append(("+".join(names), " ".join(f"{name}={labels[name]}" for name in names)))
    if "upos" in labels and {"gender", "number"} <= set(labels):
        found.append(("upos+gender+number", f"{labels['upos']} {labels['gender']} {labels['number']}"))
    if labels.get("upos") != "PUNCT":
        found.append(("lemma", f"lemma={labels['lemma']}"))
    found += [("construction", f"construction={name}") for name in dict.fromkeys(constructions)]
    return [*found, ("register", f"register={register}")]


def gold_table(cache: FeatureCache) -> list[GoldResult]:
    """Return the best latent for every gold label with enough words, sorted by category and F1; [] for other corpora."""
    if cache.manifest.corpus != MICRO_ITALIANO:
        return []
    words = GoldWords(cache)
    labels, acts, maxima = words.labels, words.activations(cache), cache.statistics["max"]
    test = cache.document_parts()[np.array(words.doc_of_word)] == PARTS.index("test")
    covered = np.zeros(len(test), dtype=bool)
    covered[words.word_of_position[words.word_of_position >= 0]] = True
    choose, report = np.flatnonzero(covered & ~test), np.flatnonzero(covered & test)
    fired = {threshold: firing(acts, threshold * maxima) for threshold in THRESHOLDS}
    chosen = {threshold: detection_counts(found[choose], labels[choose])[0] for threshold, found in fired.items()}
    outcome = {threshold: detection_counts(found[report], labels[report]) for threshold, found in fired.items()}
    n_choose, n_report = np.asarray(labels[choose].sum(axis=0)), np.asarray(labels[report].sum(axis=0))
    results = []
    for (category, label), column in words.names.items():
        if min(n_choose[column], n_report[column]) < LEAST_WORDS:
            continue
        best = ((int(np.argmax(f1[:, column])), threshold) for threshold, f1 in chosen.items())
        latent, threshold = max(best, key=lambda pair: (float(chosen[pair[1]][pair[0], column]), *pair))
        f1, precision, recall = (float(table[latent, column]) for table in outcome[threshold])
        results.append(GoldResult(label, category, int(n_report[column]), latent, threshold, f1, precision, recall))
    return sorted(results, key=lambda result: (result.category, -result.f1, result.label))


def firing(acts: scipy.sparse.csr_array, above: Float[np.ndarray, " latents"]) -> scipy.sparse.csr_array:
    """Return 0 or 1 for words and latents, [words, latents]: where a latent is above its threshold."""
    entries = acts.tocoo()
    keep = entries.data > above[entries.col]
    return zeros_and_ones(np.stack([entries.row[keep], entries.col[keep]], axis=1), (len(acts.indptr) - 1, len(above)))


def zeros_and_ones(ones: Any, shape: tuple[int, int]) -> scipy.sparse.csr_array:
    """Return a matrix that is 1 at the places (row, column) given, and 0 elsewhere."""
    places = np.array(ones, dtype=np.int64).reshape(-1, 2)
    matrix = scipy.sparse.csr_array((np.ones(len(places), dtype=np.float32), tuple(places.T)), shape=shape)
    matrix.data[:] = 1  # a place that was given twice is still a 1
    return matrix


def detection_counts(
    fired: scipy.sparse.csr_array, labels: scipy.sparse.csr_array
) -> tuple[Float[np.ndarray, "latents labels"], ...]:
    """Return F1, precision and recall of every latent for every label; 0 where a latent never fires."""
    both = (fired.T @ labels).toarray()
    n_fired, present = fired.sum(axis=0)[:, None], labels.sum(axis=0)[None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = 2 * both / (n_fired + present), both / n_fired, both / present
    return tuple(np.nan_to_num(numbers) for numbers in found)
