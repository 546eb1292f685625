"""Latents of one gold label, and latents of one language.

MicroItaliano knows what every word of its text is. A latent fires on a word when it is active, above a threshold, on any of
the word's tokens. For each label the latent and threshold (0, a quarter or a half of the latent's maximum) with the best F1
are chosen on the train and val documents; precision, recall and F1 are those on the test documents.

Latents of one language are told by the entropy of their activation probabilities over languages. LAPE (Tang et al. 2024,
arXiv 2402.16438) does this for neurons, SAE-LAPE (Andrylie et al. 2025, arXiv 2507.11230) for latents: P(l) is the share of
a language's tokens on which a latent fires; divided by their sum over languages these are a distribution, and a latent of
one language has a small entropy.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
import scipy.stats
import torch
from jaxtyping import Bool, Float, Int

from sae_italian import micro_italiano
from sae_italian.analysis.latent import codes
from sae_italian.analysis.shift import corpus_windows
from sae_italian.analysis.treebank import (
    COMBINED,
    FEATURES,
    THRESHOLDS,
    best_thresholds,
    detection_counts,
    firing,
    zeros_and_ones,
)
from sae_italian.autointerp.store import Label
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import cut_short, one_of, paced
from sae_italian.base.report import plain, shown, table
from sae_italian.base.statistics import Estimate, mean_interval, wilson
from sae_italian.base.storage import write_json
from sae_italian.cache import FeatureCache
from sae_italian.cache.read import PARTS
from sae_italian.corpora import iter_documents
from sae_italian.corpora.filters import MIN_ITALIAN_CHARS, language_of
from sae_italian.corpora.packing import NO_DOCUMENT, bos_id, tokenise
from sae_italian.corpora.stream import MICRO_ITALIANO, check_corpus
from sae_italian.models.activations import check_context, read_activations
from sae_italian.saes import check_fits

DETECTED = 0.8  # F1 on the test documents from which a label counts as detected
LEAST_WORDS = 30  # in either half
_FEATURES = ("upos", *(name.lower() for name in FEATURES))
_COMBINED = [*(tuple(name.lower() for name in names) for names in COMBINED), ("upos", "gender", "number")]


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
        self.word_of_position = np.full(cache.n_positions, -1, dtype=np.int64)
        self.doc_of_word: list[int] = []
        kinds: dict[Any, int] = {}  # what a word may be, of which there is far less than words -> number
        kind_of_word, ends = [], cache.whole("end")
        of_document: dict[Any, Any] = pd.Series(cache.doc).groupby(cache.doc).indices
        for doc, positions in of_document.items():
            if doc == NO_DOCUMENT:
                continue
            _, seed, index = cache.document(doc).doc_id.split("/")
            gold = micro_italiano.document(int(index), seed=int(seed))
            # A token belongs to the word that its last character lies in.
            place = np.searchsorted([word.start for word in gold.words], ends[positions]) - 1
            self.word_of_position[positions] = len(self.doc_of_word) + place
            self.doc_of_word += [doc] * len(gold.words)
            for word in gold.words:
                inside = (s.labels["construction"] for s in gold.constructions if s.start <= word.start < s.end)
                kind = tuple(word.labels.items()), tuple(dict.fromkeys(inside)), gold.register
                kind_of_word.append(kinds.setdefault(kind, len(kinds)))
        found = [_labels(dict(labels), *rest) for labels, *rest in kinds]
        # (category, label) -> column
        self.names = {key: i for i, key in enumerate(dict.fromkeys(chain.from_iterable(found)))}
        ones = [(kind, self.names[key]) for kind, keys in enumerate(found) for key in keys]
        self.labels = zeros_and_ones(ones, (len(found), len(self.names)))[kind_of_word]

    def activations(self, cache: FeatureCache) -> scipy.sparse.csr_array:
        """Return the largest activation of every latent on any token of each word, [words, latents]."""
        d_sae, parts = cache.manifest.d_sae, []
        for first, acts in cache.entries(0, d_sae - 1):
            found = acts.tocoo()
            word, latent = self.word_of_position[found.col], first + found.row
            tokens = pd.DataFrame({"word": word, "latent": latent, "value": found.data})
            parts.append(tokens[tokens.word >= 0].groupby(["word", "latent"], as_index=False).max())
        found = pd.concat(parts)
        where = found.word, found.latent
        return scipy.sparse.csr_array((found.value, where), (len(self.doc_of_word), d_sae))


def _labels(labels: dict[str, str], constructions: Sequence[str], register: str) -> list[tuple[str, str]]:
    """Return the (category, label) pairs of one word."""
    groups = [names for names in (*zip(_FEATURES), *_COMBINED) if set(names) <= set(labels)]
    found = [("+".join(names), " ".join(f"{name}={labels[name]}" for name in names)) for names in groups]
    if labels.get("upos") != "PUNCT":
        found.append(("lemma", f"lemma={labels['lemma']}"))
    found += [("construction", f"construction={name}") for name in constructions]
    return [*found, ("register", f"register={register}")]


def gold_table(cache: FeatureCache | str | Path) -> list[GoldResult]:
    """Return the best latent for every gold label with enough words, sorted by category and F1; [] for other corpora."""
    cache = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    if cache.manifest.corpus != MICRO_ITALIANO:
        return []
    words = GoldWords(cache)
    labels, acts, maxima = words.labels, words.activations(cache), cache.statistics["max"]
    test = cache.document_parts()[np.array(words.doc_of_word)] == PARTS.index("test")
    covered = np.zeros(len(test), dtype=bool)
    covered[words.word_of_position[words.word_of_position >= 0]] = True
    choose, report = np.flatnonzero(covered & ~test), np.flatnonzero(covered & test)
    n_choose, n_report = (np.asarray(labels[rows].sum(axis=0)) for rows in (choose, report))
    columns = np.flatnonzero(np.minimum(n_choose, n_report) >= LEAST_WORDS)
    f1, threshold = best_thresholds(acts[choose], labels[choose][:, columns], maxima, thresholds=THRESHOLDS[::-1])
    latents = f1.argmax(axis=0)
    threshold = threshold[latents, np.arange(len(columns))]
    said = firing(acts[report][:, latents], threshold * maxima[latents])
    # of each label's own latent
    counts = np.diagonal(detection_counts(said, labels[report][:, columns]), axis1=1, axis2=2)
    names = [list(words.names)[column] for column in columns]
    rows = zip(names, n_report[columns].astype(int), latents, threshold, *counts, strict=True)
    results = [GoldResult(label, kind, *(number.item() for number in row)) for (kind, label), *row in rows]
    return sorted(results, key=lambda result: (result.category, -result.f1, result.label))


# --- languages -------------------------------------------------------------------------------------------------------


LEAST_PROBABILITY = 1e-3  # of firing on a token of its language, for a latent to count
PURE = 0.9  # share of the probability that lies in one language, from which a latent is that language's
SHUFFLES = 20
WRITTEN = 20  # latents per language that are written down


class Languages(NamedTuple):
    """Activation probabilities by language, and the latents that belong to one."""

    names: list[str]
    n_tokens: list[int]
    probability: Float[np.ndarray, "languages d_sae"]
    by_chance: dict[str, float]  # latents per language when documents are dealt at random, mean

    def latents(self, name: str) -> Int[np.ndarray, " n"]:
        """Return the latents of a language, the ones that fire most first."""
        place = self.names.index(name)
        own = np.flatnonzero(owners(self.probability) == place)
        return own[np.argsort(-self.probability[place, own], kind="stable")]

    def share(self, name: str) -> Estimate:
        """Return the share of live latents that are a language's own, with Wilson's interval over latents."""
        return wilson(len(self.latents(name)), int((self.probability.max(axis=0) >= LEAST_PROBABILITY).sum()))

    def labels(self) -> list[Label]:
        """Return rows for the store: precision is the language's share of the probability, recall the probability."""
        found, source = [], f"LAPE {', '.join(self.names)}"
        for name, own in self.as_dict().items():
            for latent, recall in ((first["latent"], first["probability"]) for first in own["latents"]):
                precision = recall / float(self.probability[:, latent].sum())
                numbers = 2 * precision * recall / (precision + recall), None, None, precision, recall
                found.append(Label(latent, f"Language={name}", source, *numbers, own["n_tokens"]))
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON, by language: of its latents those that fire most."""
        found = {}
        for name, n_tokens, probability in zip(self.names, self.n_tokens, self.probability, strict=True):
            own = self.latents(name)
            entropy = scipy.stats.entropy(self.probability[:, own], axis=0)  # over languages, in nats
            rows = zip(own.tolist(), probability[own].tolist(), np.asarray(entropy).tolist(), strict=True)
            first = [{"latent": i, "probability": p, "entropy": nats} for i, p, nats in islice(rows, WRITTEN)]
            numbers = {"n_tokens": n_tokens, "n_latents": len(own), "share": self.share(name)}
            found[name] = numbers | {"by_chance": self.by_chance[name], "latents": first}
        return plain(found)

    def save(self, folder: Path) -> None:
        """Write languages.json: the languages, and only where a time bound has cut something short, that beside them."""
        more = {"cut_short": cut} if (cut := cut_short()) else {}
        write_json(folder / "languages.json", self.as_dict() | more)

    def table(self) -> str:
        """Return a Markdown table, one row per language."""
        rows = []
        for name, found in self.as_dict().items():
            strongest = ", ".join(f"{own['latent']} ({own['probability']:.1%})" for own in found["latents"][:5])
            counts = f"{found['n_tokens']:,}", f"{found['n_latents']:,}", shown(self.share(name), ".1%")
            rows.append((name, *counts, f"{found['by_chance']:.1f}", strongest))
        return table("language | tokens | its latents | share of live latents | by chance | strongest", rows)


class Overlap(NamedTuple):
    """Jaccard index of the latents that fire on a text and on its translation, and on another text's; means over pairs."""

    languages: tuple[str, str]
    hook_name: str
    n_pairs: int
    jaccard: Estimate
    chance: Estimate  # with the translations dealt out anew

    def text(self) -> str:
        """Return both in a sentence."""
        return (
            f"Latents of parallel text, {' and '.join(self.languages)}, {self.n_pairs:,} pairs, {self.hook_name}: "
            f"Jaccard {shown(self.jaccard)}, of texts that are no translations {shown(self.chance)}."
        )


def owners(probability: Float[np.ndarray, "languages d_sae"]) -> Int[np.ndarray, " d_sae"]:
    """Return the language of each latent: it fires there often enough, and hardly elsewhere; else -1."""
    best = probability.max(axis=0)
    own = (best >= LEAST_PROBABILITY) & (best >= PURE * probability.sum(axis=0))
    return np.where(own, probability.argmax(axis=0), -1)


def language_latents(
    sae: Any,
    model: Any,
    corpora: Mapping[str, str],
    *,
    n_tokens: int = 20_000,
    context_size: int | None = None,
    text_columns: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Languages:
    """Return activation probabilities on each language's corpus, at most `n_tokens` of each, and whose latents are whose.

    `text_columns` names each corpus' column (default: text). As control, documents are dealt to the languages at random, twenty times.
    Raises: UsageError for an SAE that does not fit, and an empty corpus.
    """
    hook_name = check_fits(sae, model)
    context = check_context(int(context_size or sae.cfg.metadata.context_size or 128), model.config)
    for name, corpus in corpora.items():  # before the first one's minutes
        check_corpus(corpus, text_column=(text_columns or {}).get(name, "text"))
    found = []
    for number, (name, corpus) in enumerate(corpora.items()):
        batches = corpus_windows(model, corpus, context, n_tokens, text_column=(text_columns or {}).get(name, "text"))
        with one_of(len(corpora) - number):
            some = paced(batches, name, n_tokens, "token", size=lambda windows: len(windows.doc))
            found.append(_count(sae, model, hook_name, some))
    which = np.repeat(np.arange(len(corpora)), [len(tokens) for _, tokens in found])
    counts: Any = scipy.sparse.vstack([fired for fired, _ in found], format="csr")
    tokens = np.concatenate([tokens for _, tokens in found])

    def probability(language: Int[np.ndarray, " documents"]) -> Float[np.ndarray, "languages d_sae"]:
        here = (language == place for place in range(len(corpora)))
        return np.stack([counts[some].sum(axis=0) / tokens[some].sum() for some in here])

    rng = np.random.default_rng(seed)
    dealt = [owners(probability(rng.permutation(which))) for _ in range(SHUFFLES)]
    by_chance = {name: float(np.mean([(owner == i).sum() for owner in dealt])) for i, name in enumerate(corpora)}
    return Languages(list(corpora), [int(n.sum()) for _, n in found], probability(which), by_chance)


@torch.no_grad()
def _count(
    sae: Any, model: Any, hook_name: str, batches: Any
) -> tuple[scipy.sparse.csr_array, Int[np.ndarray, " documents"]]:
    """Return how often each latent fires in each document, [documents, d_sae], and the documents' tokens."""
    fired, docs = [], []
    for windows in batches:
        x = read_activations(model, windows.tokens.to(model.device), hook_name)[windows.keep.to(model.device)]
        fired.append(scipy.sparse.csr_array((codes(sae, x) != 0).cpu().numpy()))
        docs.append(windows.doc)
    _, row, tokens = np.unique(np.concatenate(docs), return_inverse=True, return_counts=True)
    in_document = zeros_and_ones(np.stack([row, np.arange(len(row))], axis=1), (len(tokens), len(row)))
    return scipy.sparse.csr_array(in_document @ scipy.sparse.vstack(fired)), tokens


def examples_in(cache: Any, n: int = 100) -> dict[str, float]:
    """Return the share of each language among `n` evenly spaced documents of a cache that are long enough to tell.

    Labels and explanations are made from these documents: they are evidence for their languages alone.
    """
    numbers = np.unique(np.linspace(0, cache.n_documents - 1, n).astype(int)).tolist()
    texts = [text for text in (cache.document(i).text for i in numbers) if len(text) >= MIN_ITALIAN_CHARS]
    return {name: count / len(texts) for name, count in Counter(map(language_of, texts)).most_common()}


# --- parallel text ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def parallel_overlap(
    sae: Any,
    model: Any,
    corpora: Mapping[str, str],
    *,
    context_size: int = 128,
    text_columns: Mapping[str, str] | None = None,
    n_pairs: int = 200,
    seed: int = 0,
) -> Overlap:
    """Return how far the same latents fire on two languages' corpora, whose documents are translations, in order.

    Texts are read alone, after a BOS, to `context_size` tokens. Raises: UsageError unless the two corpora have as many
    documents each (of the first `n_pairs`).
    """
    hook_name, columns = check_fits(sae, model), text_columns or {}
    texts = {
        name: [d.text for d in islice(iter_documents(corpus, "all", text_column=columns.get(name, "text")), n_pairs)]
        for name, corpus in corpora.items()
    }
    (first, one), (second, other) = texts.items()
    if len(one) != len(other) or len(one) < 2:
        raise UsageError(
            f"{first} has {len(one)} documents and {second} {len(other)}; parallel text has as many of both."
        )
    bos, fired = bos_id(model.tokenizer), []
    both = zip(*(tokenise(model.tokenizer, own) for own in texts.values()), strict=True)
    for two in paced(both, f"{first} and {second}", len(one), "pair"):
        tokens = [torch.tensor([[bos, *ids[: context_size - 1].tolist()]]).to(model.device) for ids, _, _ in two]
        reads = [read_activations(model, own, hook_name)[0, 1:] for own in tokens]
        fired.append([(codes(sae, x) != 0).any(dim=0).cpu().numpy() for x in reads])
    a, b = np.swapaxes(fired, 0, 1)
    turns = np.random.default_rng(seed).integers(1, len(a), SHUFFLES).tolist() if len(a) > 1 else []
    # one pair alone has no chance
    dealt = [_jaccard(a, np.roll(b, by, axis=0)) for by in turns] or [[np.nan]]
    jaccard, chance = mean_interval(_jaccard(a, b)), mean_interval(np.mean(dealt, axis=0))
    return Overlap((first, second), hook_name, len(a), jaccard, chance)


def _jaccard(a: Bool[np.ndarray, "n d_sae"], b: Bool[np.ndarray, "n d_sae"]) -> Float[np.ndarray, " n"]:
    return (a & b).sum(axis=1) / np.maximum(1, (a | b).sum(axis=1))
