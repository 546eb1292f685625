"""Latents of one language: by the entropy of their activation probabilities over languages.

LAPE (Tang et al. 2024, arXiv 2402.16438) does this for neurons, SAE-LAPE (Andrylie et al. 2025, arXiv 2507.11230) for
latents: P(l) is the share of a language's tokens on which a latent fires; divided by their sum over languages these are a
distribution, and a latent of one language has a small entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm import tqdm

from sae_italian.autointerp.store import Label
from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import Estimate, wilson
from sae_italian.corpora import Split, iter_documents, pack
from sae_italian.evaluation.evaluate import TOKENS_PER_BATCH, windows_until
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
    entropy: Float[np.ndarray, " d_sae"]  # nats; NaN for a latent that fires nowhere
    owner: Int[np.ndarray, " d_sae"]  # index of the language, -1 for a latent of none
    by_chance: dict[str, float]  # latents per language when documents are dealt to languages at random, mean

    def latents(self, name: str) -> Int[np.ndarray, " n"]:
        """Return the latents of a language, the ones that fire most first."""
        place = self.names.index(name)
        own = np.flatnonzero(self.owner == place)
        return own[np.argsort(-self.probability[place, own], kind="stable")]

    def shares(self) -> dict[str, Estimate]:
        """Return by language the share of live latents that are its own, with Wilson's interval over latents."""
        live = int((self.probability.max(axis=0) >= LEAST_PROBABILITY).sum())
        return {name: wilson(len(self.latents(name)), live) for name in self.names}

    def labels(self) -> list[Label]:
        """Return rows for the store: precision is the language's share of the probability, recall the probability."""
        found = []
        for place, name in enumerate(self.names):
            for latent in self.latents(name)[:WRITTEN].tolist():
                recall = float(self.probability[place, latent])
                precision = recall / float(self.probability[:, latent].sum())
                f1 = 2 * precision * recall / (precision + recall)
                source = f"LAPE {', '.join(self.names)}"
                found.append(
                    Label(latent, f"Language={name}", source, f1, None, None, precision, recall, self.n_tokens[place])
                )
        return found

    def as_dict(self) -> dict[str, Any]:
        shares = self.shares()
        return {
            name: {
                "n_tokens": self.n_tokens[place],
                "n_latents": len(self.latents(name)),
                "share": shares[name].as_dict(),
                "by_chance": self.by_chance[name],
                "latents": [
                    {
                        "latent": latent,
                        "probability": float(self.probability[place, latent]),
                        "entropy": float(self.entropy[latent]),
                    }
                    for latent in self.latents(name)[:WRITTEN].tolist()
                ],
            }
            for place, name in enumerate(self.names)
        }

    def table(self) -> list[str]:
        """Return the lines of a Markdown table, one row per language."""
        lines = [
            "| language | tokens | its latents | share of live latents | by chance | strongest |",
            "|---" * 6 + "|",
        ]
        shares = self.shares()
        for place, name in enumerate(self.names):
            own, share = self.latents(name), shares[name]
            strongest = ", ".join(f"{i} ({100 * self.probability[place, i]:.1f} %)" for i in own[:5].tolist())
            lines.append(
                f"| {name} | {self.n_tokens[place]:,} | {len(own):,} | {100 * share.value:.1f} % "
                f"({100 * share.lo:.1f} to {100 * share.hi:.1f}) | {self.by_chance[name]:.1f} | {strongest} |"
            )
        return lines


def entropies(probability: Float[np.ndarray, "languages d_sae"]) -> Float[np.ndarray, " d_sae"]:
    """Return the entropy of each latent's probabilities over languages, in nats; NaN for one that fires nowhere."""
    total = probability.sum(axis=0)
    share = np.divide(probability, total, out=np.zeros_like(probability), where=total > 0)
    parts = np.where(share > 0, -share * np.log(np.where(share > 0, share, 1)), 0)
    return np.where(total > 0, parts.sum(axis=0), np.nan)


def owners(probability: Float[np.ndarray, "languages d_sae"]) -> Int[np.ndarray, " d_sae"]:
    """Return the language of each latent: it fires there often enough, and hardly elsewhere; else -1."""
    total = probability.sum(axis=0)
    best = probability.max(axis=0)
    own = (best >= LEAST_PROBABILITY) & (best >= PURE * np.maximum(total, 1e-30))
    return np.where(own, probability.argmax(axis=0), -1)


def language_latents(
    sae: Any,
    model: Any,
    corpora: Mapping[str, str],
    *,
    n_tokens: int = 20_000,
    split: Split = "all",
    context_size: int | None = None,
    text_column: str = "text",
    seed: int = 0,
) -> Languages:
    """Return activation probabilities on each language's corpus, at most `n_tokens` of each, and whose latents are whose.

    As control, documents are dealt to the languages at random, twenty times.
    Raises: UsageError for fewer than two languages, an SAE that does not fit, an empty corpus.
    """
    if len(corpora) < 2:
        raise UsageError("latents of one language show only beside another; give two languages or more.")
    hook_name = check_fits(sae, model)
    context = check_context(int(context_size or sae.cfg.metadata.context_size or 128), model.config)
    fired, sizes, language = [], [], []
    for place, (name, corpus) in enumerate(corpora.items()):
        blocks = pack(
            iter_documents(corpus, split, text_column=text_column),
            model.tokenizer,
            context,
            windows_per_block=max(1, TOKENS_PER_BATCH // context),
            documents_per_batch=16,
        )
        counts, tokens = _count(sae, model, hook_name, blocks, n_tokens, f"the {split} split of {corpus}", name)
        fired.append(counts)
        sizes.append(tokens)
        language += [place] * len(tokens)
    counts, tokens, which = np.concatenate(fired), np.concatenate(sizes), np.array(language)
    names = list(corpora)
    probability = _probability(counts, tokens, which, len(names))
    rng = np.random.default_rng(seed)
    dealt = [owners(_probability(counts, tokens, rng.permutation(which), len(names))) for _ in range(SHUFFLES)]
    by_chance = {name: float(np.mean([(owner == i).sum() for owner in dealt])) for i, name in enumerate(names)}
    per_language = [int(tokens[which == i].sum()) for i in range(len(names))]
    return Languages(names, per_language, probability, entropies(probability), owners(probability), by_chance)


@torch.no_grad()
def _count(
    sae: Any, model: Any, hook_name: str, blocks: Any, n_tokens: int, what: str, name: str
) -> tuple[Int[np.ndarray, "documents d_sae"], Int[np.ndarray, " documents"]]:
    """Return how often each latent fires in each document, and the documents' tokens."""
    counts: dict[int, np.ndarray] = {}
    tokens: dict[int, int] = {}
    with tqdm(total=n_tokens, desc=name, unit="tok", unit_scale=True, disable=None) as bar:
        for windows in windows_until(blocks, model.tokenizer, [n_tokens], what, at_most=True):
            x = read_activations(model, windows.tokens.to(model.device), hook_name)[windows.keep.to(model.device)]
            latents = sae.encode(x.to(sae.device, sae.dtype))
            active = ((latents.to_dense() if latents.is_sparse else latents) != 0).cpu()
            for doc in np.unique(windows.doc).tolist():
                here = torch.from_numpy(windows.doc == doc)
                counts[doc] = counts.get(doc, 0) + active[here].sum(dim=0).numpy()
                tokens[doc] = tokens.get(doc, 0) + int(here.sum())
            bar.update(len(windows.doc))
    return np.stack(list(counts.values())), np.array(list(tokens.values()))


def _probability(
    counts: Int[np.ndarray, "documents d_sae"],
    tokens: Int[np.ndarray, " documents"],
    which: Int[np.ndarray, " documents"],
    n: int,
) -> Float[np.ndarray, "languages d_sae"]:
    return np.stack([counts[which == i].sum(axis=0) / max(tokens[which == i].sum(), 1) for i in range(n)])
