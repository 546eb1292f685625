"""Which latents detect a label, and how well: a single latent, a few of them in a probe, or the activations whole.

Everything is chosen on training words (the latents, the threshold, the probe's weights) and reported on test words, with
an interval over sentences. As controls: the same with labels dealt out at random, and other SAEs. `probe`
does it for every method, label and treebank.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
from jaxtyping import Bool, Float

from sae_italian.analysis.treebank import Words, best_thresholds, category, encode_words
from sae_italian.autointerp.store import Label
from sae_italian.base.pace import paced
from sae_italian.base.report import OTHERS, OURS, REFERENCE, plain, save_result, shown, svg, table
from sae_italian.base.statistics import Estimate, auroc_by_document, f1_by_document, mean_interval, wilson

LEAST_WORDS = 30  # that bear the label, in training and in test
SIZES = (1, 5, 20)  # latents of a sparse probe
SINGLE, DENSE = "single latent", "dense"
METHODS = (SINGLE, *(f"sparse {k}" for k in SIZES), DENSE)
MOST_FALSE = 0.5  # of the words that do not bear the label
MOST_WORDS = 20_000  # of training, for probes
DETECTORS = 10  # latents per label that are written down, besides the best
LEAST_F1 = 0.5  # in training, for these
FOUND = 0.5  # F1 on test words from which a latent detects a label
_HEAD = "trained on | tested on | features | method | mean F1 | mean AUROC | labels"
_LABEL_HEAD = f"label | latent | F1 of one latent | precision | recall | {' | '.join(METHODS[1:])} | always yes | words"
# What detections of several labels have in common.
GROUP = ["trained", "tested", "shuffled", "features", "method"]
# How well one label is detected on the test words of `tested`. features: the SAE's name, or "activations"; n: test words
# that bear the label; share: of all test words; threshold: of a single latent, a share of its maximum in training.
COLUMNS = [
    "label", "method", "features", "trained", "tested", "shuffled",
    "f1", "auroc", "precision", "recall", "n", "share", "latents", "threshold",
]  # fmt: skip
Acts = scipy.sparse.csr_array  # the latents' activations on words, [words, d_sae]


class ProbeTask:
    """Words that choose and words that judge, of one treebank or of two; labels as columns of the same names.

    Shuffled, each word has the labels of another word of the same part.
    """

    def __init__(self, train: Words, test: Words, seed: int = 0, *, shuffled: bool = False):
        self.train, self.test, self.shuffled = train, test, shuffled
        self.rows = a, b = np.flatnonzero(train.train), np.flatnonzero(~test.train)
        rng, parts = np.random.default_rng(seed), (train.labels[a], test.labels[b])
        if shuffled:
            parts = tuple(part[rng.permutation(part.shape[0])] for part in parts)
        self.labels = y, z = parts
        self.truth: Bool[np.ndarray, "m labels"] = z.toarray() > 0
        # the labels with enough words that bear them, and that do not, in both parts
        present = np.stack([part.sum(axis=0) for part in (y, z)])
        absent = np.array([[len(a)], [len(b)]]) - present
        least = np.minimum(present, absent).min(axis=0)
        self.usable: list[int] = np.flatnonzero(least >= LEAST_WORDS).tolist()
        # which of the training words a probe is fitted on
        self.sample = np.sort(np.random.default_rng(seed).permutation(len(a))[:MOST_WORDS])


def single_latents(
    task: ProbeTask, train: Acts, test: Acts, features: str, *, most: int = 1, least: float = 0
) -> list[dict[str, Any]]:
    """Return for each label its best latent (with `most`, so many, each with a training F1 of at least `least`).

    A latent says yes above 0, a quarter or a half of its maximum, whichever did best in training; one that fires on most
    words without the label is no detector. `train` and `test` are the latents' activations on all words of the treebanks.
    """
    train, columns = train[task.rows[0]], test[task.rows[1]].tocsc()
    maxima = np.asarray(train.max(axis=0).todense()).ravel()
    best = best_thresholds(train, task.labels[0][:, task.usable], maxima, most_false=MOST_FALSE)
    found = []
    for place, column in enumerate(task.usable):
        for latent in np.argsort(-best[0, :, place], kind="stable")[:most].tolist():
            f1, threshold = best[:, latent, place].tolist()
            if f1 >= least:
                value = columns[:, [latent]].toarray().ravel()
                how = {"method": SINGLE, "features": features, "latents": [latent], "threshold": threshold}
                found.append(_detection(task, column, value > threshold * maxima[latent], value, **how))
    return found


def _detection(
    task: ProbeTask, column: int, said: Bool[np.ndarray, " m"], score: Float[np.ndarray, " m"], **described: Any
) -> dict[str, Any]:
    """Compare what was said of the test words, and how strongly, with the truth; the rest describes how it came about."""
    truth = task.truth[:, column]
    _, sentence = np.unique(task.test.sentence[task.rows[1]], return_inverse=True)
    sums = [np.bincount(sentence, each).astype(float) for each in (truth & said, said, truth)]
    both, fired, present = (float(each.sum()) for each in sums)
    return {
        "label": task.train.names[column],
        "trained": task.train.source,
        "tested": task.test.source,
        "shuffled": task.shuffled,
        "f1": Estimate(*f1_by_document(*(each[None] for each in sums))[:, 0].tolist()),
        "auroc": auroc_by_document(score, truth, sentence),
        "precision": both / fired if fired else 0.0,
        "recall": both / present,
        "n": int(present),
        "share": present / len(truth),
        "latents": [],
        "threshold": 0.0,
    } | described


def always_yes(share: float) -> float:
    """Return the F1 of saying yes to every word, of which so many bear the label."""
    return 2 * share / (1 + share)


def sparse_probes(task: ProbeTask, train: Acts, test: Acts, features: str, ks=SIZES) -> Iterator[dict[str, Any]]:
    """Yield logistic probes on the k latents of largest absolute correlation with each label, for each of `ks`."""
    fit, judge = train[task.rows[0]][task.sample].tocsc(), test[task.rows[1]].tocsc()
    order = np.argsort(-np.abs(_correlations(fit, task.labels[0][task.sample].toarray())), axis=0, kind="stable")
    for column, k in product(task.usable, ks):
        chosen = order[:k, column]
        x, w = fit[:, chosen].toarray(), judge[:, chosen].toarray()
        yield _probe(task, column, x, w, method=f"sparse {k}", features=features, latents=chosen.tolist())


def dense_probes(task: ProbeTask) -> Iterator[dict[str, Any]]:
    """Yield a logistic probe on all dimensions of the activations for each label."""
    x, w = task.train.x[task.rows[0]][task.sample], task.test.x[task.rows[1]]
    for column in task.usable:
        yield _probe(task, column, x, w, method=DENSE, features="activations")


def _correlations(acts: scipy.sparse.csc_array, y: Float[np.ndarray, "n labels"]) -> Float[np.ndarray, "d_sae labels"]:
    """Return the correlation of each latent with each label; 0 for a latent or label that does not vary."""
    mean, mean_y = np.asarray(acts.mean(axis=0)).ravel(), y.mean(axis=0)
    variance = np.asarray(acts.power(2).mean(axis=0)).ravel() - mean**2
    covariance = acts.T @ y / len(y) - np.outer(mean, mean_y)
    scale = np.sqrt(np.outer(variance.clip(0), mean_y * (1 - mean_y)))
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-12)


def _probe(
    task: ProbeTask, column: int, x: Float[np.ndarray, "n k"], w: Float[np.ndarray, "m k"], **described: Any
) -> dict[str, Any]:
    """Fit one logistic probe, take the threshold of best training F1, and judge it on the test words."""
    from sklearn.linear_model import LogisticRegression

    y = task.labels[0][task.sample][:, [column]].toarray().ravel()
    scale = np.maximum(x.std(axis=0), 1e-6)
    model = LogisticRegression(max_iter=300, tol=1e-3).fit(x / scale, y)
    cut = best_cut(model.decision_function(x / scale), y > 0)
    score = model.decision_function(w / scale)
    return _detection(task, column, score >= cut, score, **described)


def best_cut(score: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> float:
    """Return the score from which on saying yes gives the best F1."""
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    f1 = 2 * np.cumsum(truth[order]) / (np.arange(1, len(score) + 1) + truth.sum())
    # words of one score are said yes to together
    return float(ranked[np.argmax(np.where(np.append(ranked[1:] != ranked[:-1], True), f1, -1))])


# --- all of it as one result -------------------------------------------------------------------------------------------


class Probes(NamedTuple):
    """All detections as tables of COLUMNS; `sae` is the name of the SAE that the others are compared with."""

    sae: str
    detections: Any  # pandas.DataFrame
    detectors: Any  # single latents worth writing down, of the SAE itself
    n_words: dict[str, tuple[int, int]]  # train, test

    def by_label(self, method: str, trained: str, tested: str = "") -> Any:
        """Return what the SAE, or the dense probe, does from one treebank to another (default: itself), a row per label."""
        features = "activations" if method == DENSE else self.sae
        asked = self.detections[GROUP] == (trained, tested or trained, False, features, method)
        return self.detections[asked.all(axis=1)].set_index("label")

    def means(self) -> list[dict[str, Any]]:
        """Return the mean F1 and AUROC over labels by method, features and pair of treebanks, with intervals over labels."""
        rows = []
        for group, own in self.detections.groupby(GROUP, sort=False):
            f1, auroc = (mean_interval(np.array([each.value for each in own[name]])) for name in ("f1", "auroc"))
            rows.append({**dict(zip(GROUP, group, strict=True)), "f1": f1, "auroc": auroc, "labels": len(own)})
        return sorted(rows, key=lambda r: (r["trained"], r["trained"] != r["tested"], r["tested"], r["shuffled"]))

    def misses(self) -> list[dict[str, Any]]:
        """Return for each pair of treebanks (two languages) the labels whose latent, chosen on the first, fails on the second.

        `share`, with Wilson's interval over labels, is of the labels that are found on the first.
        """
        rows = []
        for trained, tested in permutations(self.n_words, 2):
            here, there = (self.by_label(SINGLE, trained, bank).f1 for bank in (trained, tested))
            known = [label for label, f1 in here.items() if f1.value >= FOUND and label in there]
            lost = [label for label in known if there[label].value < FOUND]
            share = wilson(len(lost), len(known))
            rows.append({"trained": trained, "tested": tested, "share": share, "labels": lost})
        return rows

    def labels(self) -> list[Label]:
        """Return the single latents worth writing down as rows of the store, and where what they detect elsewhere fails."""
        rows, detectors = {}, [*self.detectors.itertuples()]
        good = {(d.latents[0], d.label, d.tested) for d in detectors if d.f1.value >= FOUND}
        of = self.detections
        single = of[(of.features == self.sae) & (of.method == SINGLE) & ~of.shuffled].itertuples()
        elsewhere = [d for d in single if (d.latents[0], d.label, d.trained) in good and d.f1.value < FOUND]
        for d in elsewhere + detectors:
            key, (f1, lo, hi) = (d.latents[0], d.label, d.tested), d.f1.finite()
            rows[key] = Label(*key, f1 or 0.0, lo, hi, d.precision, d.recall, d.n, d.threshold)
        return list(rows.values())

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {
            "sae": self.sae,
            "words": {name: {"train": a, "test": b} for name, (a, b) in self.n_words.items()},
            "means": plain(self.means()),
            "detections": plain(self.detections.assign(category=lambda d: d.label.map(category)).to_dict("records")),
            "detectors": plain(self.labels()),
            "misses": plain(self.misses()),
        }

    def table(self) -> str:
        """Return a Markdown table of means over labels."""
        rows = []
        for row in self.means():
            method = row["method"] + (", shuffled labels" if row["shuffled"] else "")
            numbers = shown(row["f1"]), shown(row["auroc"], ".3f"), row["labels"]
            rows.append((row["trained"], row["tested"], row["features"], method, *numbers))
        parts = [table(_HEAD, rows)]
        for trained, tested, share, labels in map(dict.values, self.misses()):
            lost = f": {', '.join(labels)}" if labels else ""
            parts.append(
                f"Labels found on {trained} that the same latent misses on {tested}: {shown(share, '.0%')}{lost}."
            )
        return "\n\n".join(parts)

    def label_table(self, treebank: str) -> str:
        """Return a Markdown table: each label's best latent in one treebank, and the probes beside it."""
        single, *others = (self.by_label(method, treebank) for method in METHODS)
        rows = []
        for label, d in single.iterrows():
            probes = [f"{other.f1[label].value:.2f}" if label in other.index else "-" for other in others]
            numbers = f"{d.precision:.2f}", f"{d.recall:.2f}", *probes, f"{always_yes(d.share):.2f}", f"{d.n:,}"
            rows.append((label, d.latents[0], shown(d.f1), *numbers))
        return table(_LABEL_HEAD, rows)

    def svg(self) -> str:
        """Return for each treebank the labels' F1 of one latent, of the largest sparse probe and of the dense probe."""
        drawn = ((SINGLE, OURS, "o"), (f"sparse {SIZES[-1]}", OTHERS[0], "s"), (DENSE, REFERENCE, "D"))
        labels = {name: [*self.by_label(SINGLE, name).index][::-1] for name in self.n_words}

        def draw(axes: Any) -> None:
            for axis, (name, here) in zip(axes, labels.items(), strict=True):
                for method, colour, marker in drawn:
                    for label, f1 in self.by_label(method, name).f1.items():
                        place = here.index(label)
                        axis.plot([f1.lo, f1.hi], [place, place], color=colour, linewidth=1, alpha=0.6)
                        axis.plot([f1.value], [place], marker, color=colour, markersize=4, clip_on=False)
                    axis.plot([], [], marker, color=colour, label=method)
                axis.set_yticks(range(len(here)), here, fontsize=7)
                axis.set(xlim=(0, 1), xlabel="F1")
                axis.set_title(name, fontsize=10)
            axes[0].legend()

        return svg(draw, len(labels), (5.2 * len(labels), 1.5 + 0.17 * max(map(len, labels.values()))))

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
    acts = {(key, item.source): encode_words(each, item.x) for key, each in saes.items() for item in words}
    found: list[dict[str, Any]] = []
    tasks = [ProbeTask(a, b, seed) for a, b in product(words, repeat=2)]
    tasks += [ProbeTask(item, item, seed, shuffled=True) for item in words]
    # of each task first the SAE that is asked about, then the others, then the activations (None)
    units = [(task, key) for task in tasks if task.usable for key in (*([name] if task.shuffled else saes), None)]
    for task, key in paced(units, "probes", len(units), "set"):
        if key is None:
            found += dense_probes(task)
        else:
            train, test = acts[key, task.train.source], acts[key, task.test.source]
            found += [*single_latents(task, train, test, key), *sparse_probes(task, train, test, key)]
    detectors = [d for item in words for d in _detectors(ProbeTask(item, item, seed), acts[name, item.source], name)]
    probed = {d["tested"] for d in found if d["trained"] == d["tested"]}
    counted = {w.source: (int(w.train.sum()), int((~w.train).sum())) for w in words if w.source in probed}

    def place(d: dict[str, Any]) -> tuple[Any, ...]:
        kind = category(d["label"])
        return kind.count("+"), kind, -d["n"], d["label"], METHODS.index(d["method"])

    detections = pd.DataFrame(sorted(found, key=place), columns=COLUMNS)
    return Probes(name, detections, pd.DataFrame(detectors, columns=COLUMNS), counted)


def _detectors(task: ProbeTask, acts: Acts, name: str) -> Iterator[dict[str, Any]]:
    """Yield each label's best latent, and others of a good training F1, if they do better than saying yes to all."""
    if task.usable:
        many = ({}, {"most": DETECTORS, "least": LEAST_F1})
        found = (d for settings in many for d in single_latents(task, acts, acts, name, **settings))
        yield from (d for d in found if d["f1"].lo > always_yes(d["share"]))
