"""What single latents and probes make of the labels of treebanks: every method, label and treebank as one result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from tqdm import tqdm

from sae_italian.analysis.probes.detect import (
    DENSE,
    METHODS,
    SINGLE,
    SIZES,
    Detection,
    ProbeTask,
    dense_probes,
    single_latents,
    sparse_probes,
)
from sae_italian.analysis.probes.treebank import Words, category, encode_words
from sae_italian.autointerp.store import Label
from sae_italian.base.pictures import OURS, REFERENCE, svg
from sae_italian.base.report import plain, save_result, shown, table
from sae_italian.base.statistics import mean_interval

DETECTORS = 10  # latents per label that are written down, besides the best
LEAST_F1 = 0.5  # in training, for these
_HEAD = "trained on | tested on | features | method | mean F1 | mean AUROC | labels"
_LABEL_HEAD = f"label | latent | F1 of one latent | precision | recall | {' | '.join(METHODS[1:])} | always yes | words"


@dataclass(frozen=True)
class Probes:
    """All detections; `sae` is the name of the SAE that the others are compared with."""

    sae: str
    detections: list[Detection]
    detectors: list[Detection] = field(repr=False)  # single latents worth writing down, of the SAE's own labels
    n_words: dict[str, tuple[int, int]]  # train, test

    def select(self, **wanted: Any) -> list[Detection]:
        """Return the detections whose fields have these values."""
        return [item for item in self.detections if all(getattr(item, key) == value for key, value in wanted.items())]

    def within(self, treebank: str, method: str | None = None) -> dict[tuple[str, str], Detection]:
        """Return by label and method what the SAE and the activations do within one treebank, labels unshuffled."""
        found = self.select(trained=treebank, tested=treebank, shuffled=False)
        mine = [d for d in found if d.features in (self.sae, "activations") and method in (None, d.method)]
        return {(d.label, d.method): d for d in mine}

    def means(self) -> list[dict[str, Any]]:
        """Return the mean F1 and AUROC over labels by method, features and pair of treebanks; F1's interval over labels."""
        names = ("trained", "tested", "shuffled", "features", "method")
        groups: dict[tuple[Any, ...], list[Detection]] = {}
        for item in self.detections:
            groups.setdefault(tuple(getattr(item, name) for name in names), []).append(item)
        rows = []
        for key, items in groups.items():
            f1 = mean_interval(np.array([item.f1.value for item in items]))
            auroc = float(np.mean([item.auroc for item in items]))
            rows.append({**dict(zip(names, key, strict=True)), "f1": f1, "auroc": auroc, "labels": len(items)})
        return sorted(rows, key=lambda r: (r["trained"], r["trained"] != r["tested"], r["tested"], r["shuffled"]))

    def labels(self) -> list[Label]:
        """Return the single latents worth writing down as rows of the store."""
        rows = {}
        for d in self.detectors:
            f1, lo, hi = d.f1.finite()
            numbers = f1 or 0.0, lo, hi, d.precision, d.recall, d.n, d.threshold
            rows[d.latents[0], d.label, d.tested] = Label(d.latents[0], d.label, d.tested, *numbers)
        return list(rows.values())

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {
            "sae": self.sae,
            "words": {name: {"train": a, "test": b} for name, (a, b) in self.n_words.items()},
            "means": plain(self.means()),
            "detections": [{**plain(item), "category": category(item.label)} for item in self.detections],
            "detectors": plain(self.labels()),
        }

    def table(self) -> str:
        """Return a Markdown table of means over labels."""
        rows = []
        for row in self.means():
            method = row["method"] + (", shuffled labels" if row["shuffled"] else "")
            numbers = shown(row["f1"]), f"{row['auroc']:.3f}", row["labels"]
            rows.append((row["trained"], row["tested"], row["features"], method, *numbers))
        return table(_HEAD, rows)

    def label_table(self, treebank: str) -> str:
        """Return a Markdown table: each label's best latent in one treebank, and the probes beside it."""
        here, rows = self.within(treebank), []
        for d in self.within(treebank, SINGLE).values():
            others = [here.get((d.label, method)) for method in METHODS[1:]]
            probes = [f"{other.f1.value:.2f}" if other else "-" for other in others]
            numbers = shown(d.f1), f"{d.precision:.2f}", f"{d.recall:.2f}", *probes, f"{d.always_yes:.2f}", f"{d.n:,}"
            rows.append((d.label, d.latents[0], *numbers))
        return table(_LABEL_HEAD, rows)

    def svg(self) -> str:
        """Return for each treebank the labels' F1 of one latent, of the largest sparse probe and of the dense probe."""
        drawn = ((SINGLE, OURS, "o"), (f"sparse {SIZES[-1]}", "#3b5bdb", "s"), (DENSE, REFERENCE, "D"))
        labels = {name: [label for label, _ in self.within(name, SINGLE)][::-1] for name in self.n_words}

        def draw(axes: Any) -> None:
            for axis, (name, here) in zip(axes, labels.items(), strict=True):
                for method, colour, marker in drawn:
                    found = self.within(name, method)
                    for place, f1 in ((here.index(label), d.f1) for (label, _), d in found.items()):
                        axis.plot([f1.lo, f1.hi], [place, place], color=colour, linewidth=1, alpha=0.6)
                        axis.plot([f1.value], [place], marker, color=colour, markersize=4)
                    axis.plot([], [], marker, color=colour, label=method)
                axis.set_yticks(range(len(here)), here, fontsize=7)
                axis.set(xlim=(0, 1), xlabel="F1")
                axis.set_title(name, fontsize=10)
            axes[0].legend(frameon=False, fontsize=7, loc="lower left")

        return svg(draw, len(labels), (5.2 * len(labels), 1.2 + 0.17 * max(map(len, labels.values()))))

    def save(self, folder: Path) -> None:
        """Write language.json, language.md and language.svg."""
        parts = [f"# Linguistic labels · Etichette linguistiche: {self.sae}", self.table()]
        for name, (train, test) in self.n_words.items():
            parts += [f"## {name}: {train:,} + {test:,} words", self.label_table(name)]
        save_result(folder, "language", self.as_dict(), parts, language=self.svg())


def probe(
    sae: Any, words: Sequence[Words], *, name: str = "SAE", others: Mapping[str, Any] | None = None, seed: int = 0
) -> Probes:
    """Return how well single latents and probes detect the labels of treebanks, within each and from each to the others.

    `words` come from `read_words`, all with the same label names. `others` are SAEs at the same place, by name, for
    comparison: baselines, a random twin. Within a treebank everything is done a second time with shuffled labels.
    Raises: UsageError when an SAE reads another number of dimensions than the activations have.
    """
    saes = {name: sae, **(others or {})}
    acts = {(key, item.source): encode_words(value, item.x) for key, value in saes.items() for item in words}
    found: list[Detection] = []
    tasks = [ProbeTask(a, b, seed) for a, b in product(words, repeat=2)]
    tasks += [ProbeTask(item, item, seed, shuffled=True) for item in words]
    for task in tqdm([task for task in tasks if task.usable], desc="probes", unit="task", disable=None):
        for key in [name] if task.shuffled else saes:
            train, test = acts[key, task.train.source], acts[key, task.test.source]
            found += [*single_latents(task, train, test, key), *sparse_probes(task, train, test, key)]
        found += dense_probes(task)
    detectors = [d for item in words for d in _detectors(ProbeTask(item, item, seed), acts[name, item.source], name)]
    probed = {d.tested for d in found if d.trained == d.tested}
    counted = {
        item.source: (int(item.train.sum()), int((~item.train).sum())) for item in words if item.source in probed
    }
    found.sort(key=lambda d: (category(d.label).count("+"), category(d.label), -d.n, d.label, METHODS.index(d.method)))
    return Probes(name, found, detectors, counted)


def _detectors(task: ProbeTask, acts: scipy.sparse.csr_array, name: str) -> Iterator[Detection]:
    """Yield each label's best latent, and others of a good training F1, if they do better than saying yes to all."""
    if task.usable:
        best = single_latents(task, acts, acts, name)
        others = single_latents(task, acts, acts, name, most=DETECTORS, least=LEAST_F1)
        yield from (d for d in [*best, *others] if d.f1.lo > d.always_yes)
