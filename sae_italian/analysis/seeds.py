"""Which latents another seed finds again: mutual nearest neighbours of decoder rows, beside directions drawn at random.

A latent counts as found in another seed when each is the other's nearest and their cosine is 0.7 or more (Paulo and
Belrose 2025, arXiv 2501.16615, match by Hungarian; a match above 0.71 is the same where the other rows are orthogonal).
No share is told without that of random directions of the same mean and covariance as each seed's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file

from sae_italian.analysis.directions import ALIKE, Set, nearest_directions, random_directions
from sae_italian.analysis.gold import THRESHOLDS, detection_counts, firing
from sae_italian.analysis.treebank import Words, encode_words, label_names, read_treebank, read_words
from sae_italian.base.errors import UsageError
from sae_italian.base.report import plain, shown, table
from sae_italian.base.statistics import Estimate, wilson
from sae_italian.base.storage import read_json, write_json
from sae_italian.corpora.stream import MICRO_ITALIANO
from sae_italian.evaluation.card import SEEDS_FILE
from sae_italian.models import load_model
from sae_italian.saes import load_sae
from sae_italian.training.run import seed_folders

CURVE = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # cosines from which a match counts
LABELLED = 0.5  # F1 from which a latent has a label
PROBED = 200  # documents of MicroItaliano whose words give labels
NEVER = -9.0  # log10 of a firing rate; SAELens writes -10 for a latent that never fired


@dataclass(frozen=True)
class Recurrence:
    """Which of the first seed's live latents the other seeds find; shares with Wilson's interval over latents."""

    seeds: list[int]
    found: list[int | None]  # in how many seeds, the first counted; None for a latent that never fired
    share: Estimate  # of the live latents that every seed finds
    random: float  # the same of random directions
    curve: dict[
        str, tuple[float, float]
    ]  # by the least cosine: share found in another seed, mean over seeds; of random ones
    labelled: int  # live latents that detect a label of words (F1 of 0.5 or more)
    same_label: Estimate  # share of these whose partner in another seed has the same label, over all pairs
    same_label_chance: float  # the same where partners are dealt out at random among the labelled latents

    def table(self) -> str:
        """Return the shares as Markdown, and what they say in a sentence."""
        rows = [
            (f"cosine {least} or more", f"{own:.1%}", f"{random:.1%}") for least, (own, random) in self.curve.items()
        ]
        n, labelled = len(self.seeds), shown(self.same_label, ".1%")
        said = (
            f"Found in {n} of {n} seeds: {shown(self.share, '.1%')} of the live latents (random directions {self.random:.1%}). "
            f"Of {self.labelled:,} latents with a label, {labelled} have a partner of the same label "
            f"({self.same_label_chance:.1%} by chance)."
        )
        return f"{table('mutual nearest neighbour in another seed | latents | random directions', rows)}\n\n{said}"


def recurrence(folder: Path) -> Recurrence:
    """Compare the seeds that were trained into a folder, and leave what was found in it as seeds.json.

    Raises: UsageError when the folder holds one seed.
    """
    folders = {read_json(each / "run.json")["spec"]["seed"]: each for each in seed_folders(folder)}
    if len(folders) < 2:
        raise UsageError(f"{folder} holds one seed; train it with seeds=3.")
    saes = [load_sae(each) for each in folders.values()]
    alive = [_alive(each) for each in folders.values()]
    spec = read_json(folder / "run.json")["spec"]
    treebank = read_treebank(MICRO_ITALIANO)
    treebank = treebank._replace(sentences=treebank.sentences[:PROBED])
    names, model = label_names([treebank]), load_model(spec["model"])
    words = read_words(model, spec["hook_name"], treebank, names, context_size=spec["context_size"])
    found = compared(list(folders), saes, alive, [labels_of(sae, words) for sae in saes])
    write_json(folder / SEEDS_FILE, plain(found))
    return found


def _alive(folder: Path) -> Bool[np.ndarray, " d_sae"]:
    return load_file(folder / "sparsity.safetensors")["sparsity"].numpy() > NEVER


def compared(
    seeds: Sequence[int],
    saes: Sequence[Any],
    alive: Sequence[Bool[np.ndarray, " d_sae"]],
    labels: Sequence[Int[np.ndarray, " d_sae"]],
) -> Recurrence:
    """Return which live latents of the first SAE the others find; `labels` numbers each one's label, -1 for none."""
    sets = [Set.of(str(seed), sae, live) for seed, sae, live in zip(seeds, saes, alive, strict=True)]
    first, *others = sets
    drawn = [random_directions(*own.units.shape, seed=i, like=own.units) for i, own in enumerate(sets)]
    pairs = [mutual(first.units, other.units) for other in others]
    chance = np.stack([mutual(drawn[0], other)[0] for other in drawn[1:]])
    cosines = np.stack([cosine for cosine, _ in pairs])
    counts = 1 + (cosines >= ALIKE).sum(axis=0)
    found: list[int | None] = [None] * len(alive[0])
    for latent, count in zip(first.latent.tolist(), counts.tolist(), strict=True):
        found[latent] = count
    own = labels[0][first.latent]
    partners = [
        labels[i][other.latent[index]] for i, (other, (_, index)) in enumerate(zip(others, pairs, strict=True), 1)
    ]
    same = [(own == partner) & (cosine >= ALIKE) for partner, cosine in zip(partners, cosines, strict=True)]
    n_labelled = int((own >= 0).sum())
    return Recurrence(
        seeds=list(seeds),
        found=found,
        share=wilson(int((counts == len(seeds)).sum()), len(counts)),
        random=float((chance >= ALIKE).all(axis=0).mean()),
        curve={str(least): (float((cosines >= least).mean()), float((chance >= least).mean())) for least in CURVE},
        labelled=n_labelled,
        same_label=wilson(int(sum(each[own >= 0].sum() for each in same)), n_labelled * len(others)),
        same_label_chance=_chance(own, [labels[i][other.latent] for i, other in enumerate(others, 1)]),
    )


def mutual(
    rows: Float[torch.Tensor, "n d"], others: Float[torch.Tensor, "m d"]
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return each row's cosine with its nearest of the others, -1 where it is not that one's nearest in turn, and which."""
    there, back = nearest_directions(rows, others), nearest_directions(others, rows)
    return np.where(back.index[there.index] == np.arange(len(rows)), there.cosine, -1.0), there.index


def _chance(own: Int[np.ndarray, " n"], others: Sequence[Int[np.ndarray, " m"]]) -> float:
    """Return how often two labelled latents of two seeds have the same label, drawn at random."""
    size = 1 + max(int(each.max(initial=0)) for each in (own, *others))
    shares = [np.bincount(each[each >= 0], minlength=size) / max(1, (each >= 0).sum()) for each in (own, *others)]
    return float(np.mean([shares[0] @ other for other in shares[1:]]))


def labels_of(sae: Any, words: Words) -> Int[np.ndarray, " d_sae"]:
    """Return the number of the label that each latent detects best, by F1 at its best threshold; -1 below LABELLED."""
    acts = encode_words(sae, words.x)
    maxima = np.asarray(acts.max(axis=0).todense()).ravel()
    best = np.max([detection_counts(firing(acts, t * maxima), words.labels)[0] for t in THRESHOLDS], axis=0)
    return np.where(best.max(axis=1) >= LABELLED, best.argmax(axis=1), -1)
