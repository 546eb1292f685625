"""Which gold labels does a single latent detect?

MicroItaliano knows what every word of its text is. A latent fires on a word when it is active, above a threshold, on
any of the word's tokens. For each label the latent and threshold (0, a quarter or a half of the latent's maximum) with
the best F1 are chosen on the train and val documents; precision, recall and F1 are those on the test documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from sae_italian import micro_italiano
from sae_italian.cache import FeatureCache
from sae_italian.cache.read import PARTS
from sae_italian.corpora.documents import MICRO_ITALIANO
from sae_italian.corpora.packing import NO_DOCUMENT

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


class _Words:
    """The gold words that a cache covers, their labels, and the word of each token."""

    def __init__(self, cache: FeatureCache):
        self.labels: dict[tuple[str, str], int] = {}  # (category, label) -> column
        self.word_of_position = np.full(cache.n_positions, -1, dtype=np.int64)
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.doc_of_word: list[int] = []
        order = np.argsort(cache.doc, kind="stable")
        docs, first = np.unique(cache.doc[order], return_index=True)
        for doc, positions in zip(docs.tolist(), np.split(order, first[1:]), strict=True):
            if doc != NO_DOCUMENT:
                self._add_document(cache, doc, positions)

    def _add_document(self, cache: FeatureCache, doc: int, positions: Int[np.ndarray, " tokens"]) -> None:
        _, seed, index = cache.document(doc).doc_id.split("/")
        gold = micro_italiano.document(int(index), seed=int(seed))
        starts = np.array([word.start for word in gold.words])
        base = len(self.doc_of_word)
        # A token belongs to the word that its last character lies in.
        self.word_of_position[positions] = (
            base + np.searchsorted(starts, cache.whole("end")[positions], side="left") - 1
        )
        for offset, word in enumerate(gold.words):
            inside = [span.labels["construction"] for span in gold.constructions if span.start <= word.start < span.end]
            for key in _labels(word.labels, inside, gold.register):
                self.rows.append(base + offset)
                self.columns.append(self.labels.setdefault(key, len(self.labels)))
        self.doc_of_word += [doc] * len(gold.words)

    def matrix(self) -> scipy.sparse.csr_array:
        """Return the labels as a boolean matrix [words, labels]."""
        shape = (len(self.doc_of_word), len(self.labels))
        ones = np.ones(len(self.rows), dtype=np.float32)
        matrix = scipy.sparse.csr_array((ones, (self.rows, self.columns)), shape=shape)
        matrix.data[:] = 1
        return matrix


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
    found.append(("register", f"register={register}"))
    return found


def gold_table(cache: FeatureCache, *, seed: int = 0) -> list[GoldResult]:
    """Return the best latent for every gold label with enough words, sorted by category and F1; [] for other corpora."""
    if cache.manifest.corpus != MICRO_ITALIANO:
        return []
    words = _Words(cache)
    labels = words.matrix()
    test = cache.document_parts(seed)[np.array(words.doc_of_word)] == PARTS.index("test")
    covered = np.zeros(len(test), dtype=bool)
    covered[words.word_of_position[words.word_of_position >= 0]] = True
    choose, report = np.flatnonzero(covered & ~test), np.flatnonzero(covered & test)
    best: dict[int, tuple[float, int, float]] = {}  # column -> F1, latent, threshold
    firings = {threshold: _firing(cache, words, threshold) for threshold in THRESHOLDS}
    for threshold, firing in firings.items():
        f1 = detection_counts(firing[choose], labels[choose])[0]
        for column in range(len(words.labels)):
            latent = int(np.argmax(f1[:, column]))
            best[column] = max(best.get(column, (-1.0, 0, 0.0)), (float(f1[latent, column]), latent, threshold))
    outcome = {threshold: detection_counts(firing[report], labels[report]) for threshold, firing in firings.items()}
    n_choose, n_report = np.asarray(labels[choose].sum(axis=0)), np.asarray(labels[report].sum(axis=0))
    results = []
    for (category, label), column in words.labels.items():
        if min(n_choose[column], n_report[column]) < LEAST_WORDS:
            continue
        _, latent, threshold = best[column]
        f1, precision, recall = (float(table[latent, column]) for table in outcome[threshold])
        results.append(GoldResult(label, category, int(n_report[column]), latent, threshold, f1, precision, recall))
    return sorted(results, key=lambda result: (result.category, -result.f1, result.label))


def _firing(cache: FeatureCache, words: _Words, threshold: float) -> scipy.sparse.csr_array:
    """Return a boolean matrix [words, latents]: active above the threshold on any token of the word."""
    maxima = cache.statistics["max"]
    rows, columns = [], []
    for latent in range(cache.manifest.d_sae):
        position, value = cache.latent(latent)
        word = words.word_of_position[position[value > threshold * maxima[latent]]]
        word = np.unique(word[word >= 0])
        rows.append(word)
        columns.append(np.full(len(word), latent))
    row, column = np.concatenate(rows), np.concatenate(columns)
    shape = (len(words.doc_of_word), cache.manifest.d_sae)
    return scipy.sparse.csr_array((np.ones(len(row), dtype=np.float32), (row, column)), shape=shape)


def detection_counts(
    firing: scipy.sparse.csr_array, labels: scipy.sparse.csr_array
) -> tuple[
    Float[np.ndarray, "latents labels"], Float[np.ndarray, "latents labels"], Float[np.ndarray, "latents labels"]
]:
    """Return F1, precision and recall of every latent for every label; 0 where a latent never fires."""
    both = (firing.T @ labels).toarray()
    fired, present = firing.sum(axis=0)[:, None], labels.sum(axis=0)[None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = both / fired, both / present
        f1 = 2 * both / (fired + present)
    return tuple(np.nan_to_num(table) for table in (f1, precision, recall))  # pyright: ignore[reportReturnType]


def n_detected(results: list[GoldResult]) -> int:
    """Return how many labels a single latent detects: F1 of 0.8 or more on the test documents."""
    return sum(result.f1 >= DETECTED for result in results)
