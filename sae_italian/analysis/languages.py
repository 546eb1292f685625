"""Latents of one language: by the entropy of their activation probabilities over languages.

LAPE (Tang et al. 2024, arXiv 2402.16438) does this for neurons, SAE-LAPE (Andrylie et al. 2025, arXiv 2507.11230) for
latents: P(l) is the share of a language's tokens on which a latent fires; divided by their sum over languages these are a
distribution, and a latent of one language has a small entropy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import scipy.stats
import torch
from jaxtyping import Bool, Float, Int

from sae_italian.analysis.gold import zeros_and_ones
from sae_italian.analysis.latent import codes
from sae_italian.analysis.shift import corpus_windows
from sae_italian.autointerp.store import Label
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import cut_short, one_of, paced
from sae_italian.base.report import plain, shown, table
from sae_italian.base.statistics import Estimate, mean_interval, wilson
from sae_italian.base.storage import write_json
from sae_italian.corpora import iter_documents
from sae_italian.corpora.filters import MIN_ITALIAN_CHARS, language_of
from sae_italian.corpora.packing import bos_id, tokenise
from sae_italian.models.activations import check_context, read_activations
from sae_italian.saes import check_fits

LEAST_PROBABILITY = 1e-3  # of firing on a token of its language, for a latent to count
PURE = 0.9  # share of the probability that lies in one language, from which a latent is that language's
SHUFFLES = 20
WRITTEN = 20  # latents per language that are written down


@dataclass(frozen=True)
class Languages:
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
        live = int((self.probability.max(axis=0) >= LEAST_PROBABILITY).sum())
        return wilson(len(self.latents(name)), live)

    def labels(self) -> list[Label]:
        """Return rows for the store: precision is the language's share of the probability, recall the probability."""
        found, source = [], f"LAPE {', '.join(self.names)}"
        for name, n_tokens, probability in zip(self.names, self.n_tokens, self.probability, strict=True):
            for latent in self.latents(name)[:WRITTEN].tolist():
                recall = float(probability[latent])
                precision = recall / float(self.probability[:, latent].sum())
                numbers = 2 * precision * recall / (precision + recall), None, None, precision, recall
                found.append(Label(latent, f"Language={name}", source, *numbers, n_tokens))
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON, by language."""
        entropy, found = entropies(self.probability), {}
        for name, n_tokens, probability in zip(self.names, self.n_tokens, self.probability, strict=True):
            own = self.latents(name)
            first = [
                {"latent": i, "probability": probability[i], "entropy": entropy[i]} for i in own[:WRITTEN].tolist()
            ]
            numbers = {"n_tokens": n_tokens, "n_latents": len(own), "share": self.share(name)}
            found[name] = numbers | {"by_chance": self.by_chance[name], "latents": first}
        return plain(found)

    def save(self, folder: Path) -> None:
        """Write languages.json: the languages, and only where a time bound has cut something short, that beside them."""
        cut = cut_short()
        write_json(folder / "languages.json", self.as_dict() | ({"cut_short": cut} if cut else {}))

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


def entropies(probability: Float[np.ndarray, "languages d_sae"]) -> Float[np.ndarray, " d_sae"]:
    """Return the entropy of each latent's probabilities over languages, in nats; NaN for one that fires nowhere."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(scipy.stats.entropy(probability, axis=0))


def owners(probability: Float[np.ndarray, "languages d_sae"]) -> Int[np.ndarray, " d_sae"]:
    """Return the language of each latent: it fires there often enough, and hardly elsewhere; else -1."""
    best = probability.max(axis=0)
    own = (best >= LEAST_PROBABILITY) & (best >= PURE * np.maximum(probability.sum(axis=0), 1e-30))
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
    Raises: UsageError for fewer than two languages, an SAE that does not fit, an empty corpus.
    """
    if len(corpora) < 2:
        raise UsageError("latents of one language show only beside another; give two languages or more.")
    hook_name = check_fits(sae, model)
    context = check_context(int(context_size or sae.cfg.metadata.context_size or 128), model.config)
    found = []
    for number, (name, corpus) in enumerate(corpora.items()):
        batches = corpus_windows(model, corpus, context, n_tokens, text_column=(text_columns or {}).get(name, "text"))
        with one_of(len(corpora) - number):
            some = paced(batches, name, n_tokens, "token", size=lambda windows: len(windows.doc))
            found.append(_count(sae, model, hook_name, some))
    which = np.repeat(np.arange(len(corpora)), [len(tokens) for _, tokens in found])
    counts, tokens = (np.concatenate(parts) for parts in zip(*found, strict=True))

    def probability(language: Int[np.ndarray, " documents"]) -> Float[np.ndarray, "languages d_sae"]:
        here = (language == place for place in range(len(corpora)))
        return np.stack([counts[some].sum(axis=0) / max(tokens[some].sum(), 1) for some in here])

    rng = np.random.default_rng(seed)
    dealt = [owners(probability(rng.permutation(which))) for _ in range(SHUFFLES)]
    by_chance = {name: float(np.mean([(owner == i).sum() for owner in dealt])) for i, name in enumerate(corpora)}
    return Languages(list(corpora), [int(n.sum()) for _, n in found], probability(which), by_chance)


@torch.no_grad()
def _count(
    sae: Any, model: Any, hook_name: str, batches: Any
) -> tuple[Int[np.ndarray, "documents d_sae"], Int[np.ndarray, " documents"]]:
    """Return how often each latent fires in each document, and the documents' tokens."""
    fired, docs = [], []
    for windows in batches:
        x = read_activations(model, windows.tokens.to(model.device), hook_name)[windows.keep.to(model.device)]
        fired.append(scipy.sparse.csr_array((codes(sae, x) != 0).cpu().numpy()))
        docs.append(windows.doc)
    _, row, tokens = np.unique(np.concatenate(docs), return_inverse=True, return_counts=True)
    in_document = zeros_and_ones(np.stack([row, np.arange(len(row))], axis=1), (len(tokens), len(row)))
    counts: Any = in_document @ scipy.sparse.vstack(fired)
    return counts.toarray(), tokens


def examples_in(cache: Any, n: int = 100) -> dict[str, float]:
    """Return the share of each language among `n` evenly spaced documents of a cache that are long enough to tell.

    Labels and explanations are made from these documents: they are evidence for their languages alone.
    """
    numbers = np.unique(np.linspace(0, cache.n_documents - 1, n).astype(int)).tolist()
    texts = [text for text in (cache.document(i).text for i in numbers) if len(text) >= MIN_ITALIAN_CHARS]
    counts = Counter(map(language_of, texts))
    return {name: count / len(texts) for name, count in counts.most_common()}


# --- parallel text ------------------------------------------------------------------------------------------------------------


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

    Texts are read alone, after a BOS, to `context_size` tokens. Raises: UsageError unless there are two corpora of as many
    documents each (of the first `n_pairs`).
    """
    if len(corpora) != 2:
        raise UsageError(f"parallel text is of two languages; {len(corpora)} were given.")
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
    fired = [_fired(sae, model, hook_name, own, context_size, name) for name, own in texts.items()]
    rng, places = np.random.default_rng(seed), np.arange(len(one))
    dealt = [_jaccard(fired[0], fired[1][np.roll(places, int(by))]) for by in rng.integers(1, len(one), SHUFFLES)]
    jaccard, chance = mean_interval(_jaccard(*fired)), mean_interval(np.mean(dealt, axis=0))
    return Overlap((first, second), hook_name, len(one), jaccard, chance)


@torch.no_grad()
def _fired(
    sae: Any, model: Any, hook_name: str, texts: Sequence[str], context_size: int, what: str
) -> Bool[np.ndarray, "texts d_sae"]:
    bos, found = bos_id(model.tokenizer), []
    for ids, _, _ in paced(tokenise(model.tokenizer, list(texts)), what, len(texts), "text"):
        tokens = torch.tensor([[bos, *ids[: context_size - 1].tolist()]])
        x = read_activations(model, tokens.to(model.device), hook_name)[0, 1:]
        found.append((codes(sae, x) != 0).any(dim=0).cpu().numpy())
    return np.stack(found)


def _jaccard(a: Bool[np.ndarray, "n d_sae"], b: Bool[np.ndarray, "n d_sae"]) -> Float[np.ndarray, " n"]:
    return (a & b).sum(axis=1) / np.maximum(1, (a | b).sum(axis=1))
