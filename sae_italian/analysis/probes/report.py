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
    METHODS,
    SINGLE,
    SIZES,
    Detection,
    Task,
    dense_probes,
    single_latents,
    sparse_probes,
)
from sae_italian.analysis.probes.treebank import category
from sae_italian.analysis.probes.words import Words, encode_words
from sae_italian.autointerp.store import Label
from sae_italian.base.pictures import OURS, REFERENCE, svg
from sae_italian.base.statistics import Estimate, mean_interval
from sae_italian.base.storage import utc_now, write_json, write_text

RESULT, MARKDOWN, PICTURE = "language.json", "language.md", "language.svg"
DETECTORS = 10  # latents per label that are written down, besides the best
LEAST_F1 = 0.5  # in training, for these
_LEGEND = (
    "F1 on test words, 95 % intervals over sentences; latents, thresholds and weights are chosen on training words. A word is "
    "read at the token that completes it. Shuffled: each word has another word's labels. Means are over labels.",
    "F1 sulle parole di test, intervalli al 95 % sulle frasi; latenti, soglie e pesi sono scelti sulle parole di "
    "addestramento. Una parola si legge al token che la completa. Mescolato: ogni parola ha le etichette di un'altra.",
)


@dataclass(frozen=True)
class Probes:
    """All detections; `sae` is the name of the SAE that the others are compared with."""

    sae: str
    detections: list[Detection]
    detectors: list[Detection] = field(repr=False)  # single latents worth writing down, of the SAE's own labels
    n_words: dict[str, tuple[int, int]] = field(default_factory=dict)  # train, test

    def select(self, **wanted: Any) -> list[Detection]:
        """Return the detections whose fields have these values."""
        return [item for item in self.detections if all(getattr(item, key) == value for key, value in wanted.items())]

    def best(self, label: str, treebank: str) -> Detection:
        """Return the best single latent of a label within a treebank. Raises: KeyError."""
        found = self.select(
            label=label, method=SINGLE, features=self.sae, trained=treebank, tested=treebank, shuffled=False
        )
        if not found:
            raise KeyError(label)
        return found[0]

    def means(self) -> list[dict[str, Any]]:
        """Return the mean F1 and AUROC over labels by method, features and pair of treebanks; F1's interval over labels."""
        groups: dict[tuple[Any, ...], list[Detection]] = {}
        for item in self.detections:
            groups.setdefault((item.trained, item.tested, item.shuffled, item.features, item.method), []).append(item)
        names = ("trained", "tested", "shuffled", "features", "method")
        rows = []
        for key, items in groups.items():
            f1 = mean_interval(np.array([item.f1.value for item in items]))
            auroc = float(np.mean([item.auroc for item in items]))
            rows.append({**dict(zip(names, key, strict=True)), "f1": f1, "auroc": auroc, "labels": len(items)})
        return sorted(rows, key=lambda r: (r["trained"], r["trained"] != r["tested"], r["tested"], r["shuffled"]))

    def labels(self) -> list[Label]:
        """Return the single latents worth writing down as rows of the store."""
        rows = {}
        for item in self.detectors:
            interval = item.f1.as_dict()
            rows[item.latents[0], item.label, item.tested] = Label(
                item.latents[0],
                item.label,
                item.tested,
                item.f1.value,
                interval["lo"],
                interval["hi"],
                item.precision,
                item.recall,
                item.n,
                item.threshold,
            )
        return list(rows.values())

    def as_dict(self) -> dict[str, Any]:
        means = [{**row, "f1": row["f1"].as_dict()} for row in self.means()]
        return {
            "sae": self.sae,
            "words": {name: {"train": a, "test": b} for name, (a, b) in self.n_words.items()},
            "means": means,
            "detections": [item.as_dict() for item in self.detections],
            "detectors": [label._asdict() for label in self.labels()],
            "created": utc_now(),
        }

    def table(self) -> list[str]:
        """Return the lines of a Markdown table of means over labels."""
        lines = [
            "| trained on | tested on | features | method | mean F1 | mean AUROC | labels |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.means():
            method = row["method"] + (", shuffled labels" if row["shuffled"] else "")
            cells = (row["trained"], row["tested"], row["features"], method, _shown(row["f1"]), f"{row['auroc']:.3f}")
            lines.append("| " + " | ".join(cells) + f" | {row['labels']} |")
        return lines

    def label_table(self, treebank: str) -> list[str]:
        """Return the lines of a Markdown table: each label's best latent in one treebank, and the probes beside it."""
        lines = [
            "| label | latent | F1 of one latent | precision | recall | "
            + " | ".join(f"sparse {k}" for k in SIZES)
            + " | dense | always yes | words |",
            "|---" * (8 + len(SIZES)) + "|",
        ]
        here = {"trained": treebank, "tested": treebank, "shuffled": False}
        probes = {
            (d.label, d.method): d.f1.value for d in self.select(**here) if d.features in (self.sae, "activations")
        }
        for item in self.select(**here, method=SINGLE, features=self.sae):
            others = [probes.get((item.label, method), float("nan")) for method in METHODS[1:]]
            lines.append(
                f"| {item.label} | {item.latents[0]} | {_shown(item.f1)} | {item.precision:.2f} | {item.recall:.2f} | "
                + " | ".join(f"{value:.2f}" for value in others)
                + f" | {2 * item.share / (1 + item.share):.2f} | {item.n:,} |"
            )
        return lines

    def markdown(self) -> str:
        lines = [f"# Linguistic labels · Etichette linguistiche: {self.sae}", "", *self.table(), ""]
        for name, (train, test) in self.n_words.items():
            lines += [f"## {name}: {train:,} + {test:,} words", "", *self.label_table(name), ""]
        lines += [f"![labels]({PICTURE})", "", *(paragraph + "\n" for paragraph in _LEGEND)]
        return "\n".join(lines).rstrip() + "\n"

    def svg(self) -> str:
        """Return for each treebank the labels' F1 of one latent, of the largest sparse probe and of the dense probe."""
        names = list(self.n_words)
        shown = ((SINGLE, OURS, "o"), (f"sparse {SIZES[-1]}", "#3b5bdb", "s"), ("dense", REFERENCE, "D"))
        longest = max(len(self._labels_of(name)) for name in names)

        def draw(axes: Any) -> None:
            for axis, name in zip(axes, names, strict=True):
                labels = self._labels_of(name)
                here = self.select(trained=name, tested=name, shuffled=False)
                value = {(d.label, d.method): d.f1 for d in here if d.features in (self.sae, "activations")}
                for place, label in enumerate(reversed(labels)):
                    for method, colour, marker in shown:
                        f1: Estimate | None = value.get((label, method))
                        if f1 is not None:
                            axis.plot([f1.lo, f1.hi], [place, place], color=colour, linewidth=1, alpha=0.6)
                            axis.plot([f1.value], [place], marker, color=colour, markersize=4)
                axis.set_yticks(range(len(labels)), labels[::-1], fontsize=7)
                axis.set_xlim(0, 1)
                axis.set_title(name, fontsize=10)
                axis.set_xlabel("F1")
            for method, colour, marker in shown:
                axes[0].plot([], [], marker, color=colour, label=method)
            axes[0].legend(frameon=False, fontsize=7, loc="lower left")

        return svg(draw, len(names), (5.2 * len(names), 1.2 + 0.17 * longest))

    def _labels_of(self, treebank: str) -> list[str]:
        found = self.select(trained=treebank, tested=treebank, shuffled=False, method=SINGLE, features=self.sae)
        return [item.label for item in found]

    def save(self, folder: Path) -> None:
        """Write language.json, language.md and language.svg."""
        write_json(folder / RESULT, self.as_dict())
        write_text(folder / MARKDOWN, self.markdown())
        write_text(folder / PICTURE, self.svg())


def probe(
    sae: Any,
    words: Sequence[Words],
    *,
    name: str = "SAE",
    others: Mapping[str, Any] | None = None,
    dense: bool = True,
    seed: int = 0,
) -> Probes:
    """Return how well single latents and probes detect the labels of treebanks, within each and from each to the others.

    `words` come from `read_words`, all with the same label names. `others` are SAEs at the same place, by name, for
    comparison: baselines, a random twin. Within a treebank everything is done a second time with shuffled labels.
    Raises: UsageError when an SAE reads another number of dimensions than the activations have.
    """
    saes = {name: sae, **(others or {})}
    acts = {(key, item.source): encode_words(value, item.x) for key, value in saes.items() for item in words}
    found: list[Detection] = []
    tasks = [Task(a, b, seed) for a, b in product(words, repeat=2)]
    tasks += [Task(item, item, seed, shuffled=True) for item in words]
    for task in tqdm(tasks, desc="probes", unit="task", disable=None):
        if not task.usable():
            continue
        for key in saes:
            if task.shuffled and key != name:
                continue
            train, test = acts[key, task.train.source], acts[key, task.test.source]
            found += single_latents(task, train, test, key)
            found += sparse_probes(task, train, test, key)
        if dense:
            found += dense_probes(task)
    detectors = [
        item for words_ in words for item in _detectors(Task(words_, words_, seed), acts[name, words_.source], name)
    ]
    counted = {item.source: (int(item.train.sum()), int((~item.train).sum())) for item in words}
    counted = {key: value for key, value in counted.items() if any(d.tested == key == d.trained for d in found)}
    found.sort(key=lambda d: (category(d.label).count("+"), category(d.label), -d.n, d.label, METHODS.index(d.method)))
    return Probes(name, found, detectors, counted)


def _detectors(task: Task, acts: scipy.sparse.csr_array, name: str) -> Iterator[Detection]:
    """Yield each label's best latent, and others of a good training F1, if they do better than saying yes to all."""
    if not task.usable():
        return
    best = single_latents(task, acts, acts, name)
    for item in [*best, *single_latents(task, acts, acts, name, most=DETECTORS, least=LEAST_F1)]:
        if item.f1.lo > 2 * item.share / (1 + item.share):
            yield item


def _shown(value: Estimate) -> str:
    return f"{value.value:.2f} ({value.lo:.2f} to {value.hi:.2f})"
