"""Absorption: does a latent for a class fall silent on members that have a latent of their own, which carries the class?

The protocol of SAEBench (Chanin 2409.14507; `feature_absorption_calculator.py`) on two kinds of classes in Italian: planted
hierarchies of words (a form in its lemma's part of speech or gender: "è" in AUX, "casa" in feminine), and first letters.

1. p: the unit direction of a dense logistic probe for the class, on training words;
2. S: the latents of the class. Latents are ranked by the positive weights of a sparse probe, and the set grows as long
   as each one more raises the F1 of a probe on it by more than 0.03, on the test words, so it is a little high;
3. on test words of the class that the dense probe gets right, with cosine c_j of p and decoder row j, projection a_j c_j,
   A = x p, M the sum over S, T the three largest projections outside S of c_j 0.1 or more:
   fraction = 0 where M >= A or T / A < 0.4, 1 where M <= 0, else min(T, A - M) / (min(T, A - M) + M);
   full = all of S silent and the largest projection is of a latent of c_j 0.025 or more and at least 0.4 A.

An undertrained or random SAE has no latents that could absorb and scores low, which is not good: the F1 of S stands beside it.
Shapes: x [words, d_in], acts [words, d_sae].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
from jaxtyping import Bool, Float
from scipy.special import stdtrit
from sklearn.linear_model import LogisticRegression

from sae_italian.analysis.latent import one_place, tokens_inside
from sae_italian.analysis.treebank import (
    Sentence,
    Treebank,
    Word,
    Words,
    encode_words,
    read_treebank,
    read_words,
    with_forms,
)
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import paced
from sae_italian.base.report import plain, save_result, shown, table
from sae_italian.base.statistics import LEAST_DOCUMENTS, NOTHING, Estimate
from sae_italian.benchmark.material import plainly
from sae_italian.benchmark.probes import f1
from sae_italian.saes import hooks_of

PARENTS = ("UPOS=AUX", "UPOS=NOUN", "UPOS=ADP", "UPOS=DET", "Gender=Fem", "Gender=Masc", "Number=Plur")
LEAST_WORDS = 50  # of a form under one parent, and at least a fifth of them in test
MOST_FORMS = 8  # under one parent, the most frequent first
LEAST_F1, RISE, MOST_SPLIT = 0.6, 0.03, 10  # of a dense probe; of S by one latent more; latents of S
LEAST_RATIO, LEAST_COSINE, LEAST_FULL = 0.4, 0.1, 0.025
NEXT = 3  # projections outside S that are summed
SILENT = 1e-8
L0_ALIKE = 0.1  # relative difference up to which two SAEs are compared without a warning
LETTERS, LEAST_LETTERS = "abcdefghilmnopqrstuvz", 15  # of Italian, accents folded; with fewer that are read, no score
TEMPLATE = "La parola {} comincia con la lettera"
MOST_WORDS = 3000  # spelled


class Absorbed(NamedTuple):
    """What a class' test words say of one SAE; means over the words that the dense probe gets right."""

    treebank: str
    parent: str
    child: str
    fraction: float
    full: float
    n_words: int
    dense_f1: float
    latents: list[int]  # S
    latents_f1: float


@dataclass(frozen=True)
class Absorption:
    """Absorption over pairs of a class and a member, with intervals over both: "la" in Fem and in DET is one member."""

    pairs: dict[str, list[Absorbed]]  # by SAE
    l0: dict[str, float]
    letters: tuple[int, int]  # first letters that a dense probe reads, of so many

    def by_pair(self, what: str) -> Any:
        """Return a number of the pairs, a DataFrame: a row for each (treebank, class, member), a column for each SAE."""
        return pd.DataFrame({sae: {p[:3]: getattr(p, what) for p in of} for sae, of in self.pairs.items()})

    def means(self) -> dict[str, dict[str, Estimate]]:
        """Return by SAE the means over pairs, with their intervals."""
        found = {name: self.by_pair(name) for name in ("fraction", "full", "latents_f1")}
        return {
            sae: {name: Estimate(*np.clip(_mean(of[sae]), 0, 1).tolist()) for name, of in found.items()}
            for sae in self.pairs
        }

    def differences(self) -> dict[str, Estimate]:
        """Return by SAE the mean difference of its fraction from the first's, over pairs that both have."""
        found, (first, *others) = self.by_pair("fraction"), self.pairs
        return {sae: _mean(found[sae] - found[first]) for sae in others}

    def table(self) -> str:
        """Return Markdown: a row for each SAE, then one for each pair."""
        rows = [
            (sae, f"{self.l0[sae]:.1f}", *(shown(found[n], ".3f") for n in ("fraction", "full", "latents_f1")))
            for sae, found in self.means().items()
        ]
        parts = [table("SAE | L0 | absorbed fraction | fully absorbed | F1 of the class' latents", rows)]
        first = next(iter(self.pairs))
        for sae, found in self.differences().items():
            apart = "" if found.lo > 0 or found.hi < 0 else ": not distinguishable"
            ratio = self.l0[sae] / self.l0[first]
            parts.append(f"{sae} less {first}: {shown(found, '+.3f')}{apart}.")
            if abs(ratio - 1) > L0_ALIKE:
                parts[-1] += f" Its L0 is {ratio:.2f} times as large: compare at equal L0."
        every = self.by_pair("fraction")
        details = [
            (*p[:3], p.n_words, f"{p.dense_f1:.2f}", *("-" if f != f else f"{f:.3f}" for f in every.loc[p[:3]]))
            for p in self.pairs[first]
        ]
        head = "treebank | class | member | words | F1 of the dense probe"
        read = "First letters: a dense probe reads {} of {}".format(*self.letters)
        last = f"{read} (F1 above {LEAST_F1}); {LEAST_LETTERS} are needed for a score."
        return "\n\n".join([*parts, table(" | ".join([head, *self.pairs]), details), last])

    def save(self, folder: Path) -> None:
        """Write absorption.json and absorption.md."""
        value = plain(self) | {"means": plain(self.means()), "differences": plain(self.differences())}
        save_result(folder, "absorption", value, ["# Absorption · Assorbimento", self.table()])


def _mean(values: Any) -> Estimate:
    """Return the mean over pairs (treebank, class, member) with its interval over classes and over members.

    A class' pairs share the latents that it is said to have, a member's pairs its own. The variance is V_classes + V_members
    - V_pairs, at least either of the first two (Cameron, Gelbach and Miller 2011). No bounds for fewer than five of either.
    """
    told = values.dropna()
    cells = (told - told.mean()).groupby(level=[1, 2]).sum() / max(len(told), 1)
    sums = [cells.groupby(level=level).sum() for level in (0, 1)]
    if (g := min(map(len, sums))) < LEAST_DOCUMENTS:
        return NOTHING._replace(value=float(told.mean()))
    over = [(each**2).sum() * len(each) / (len(each) - 1) for each in sums]
    half = stdtrit(g - 1.0, 0.975) * np.sqrt(max(sum(over) - (cells**2).sum(), *over))
    return Estimate(*map(float, (told.mean(), told.mean() - half, told.mean() + half)))


def parts(
    acts: Float[np.ndarray, "words d_sae"],
    cosine: Float[np.ndarray, " d_sae"],
    along: Float[np.ndarray, " words"],
    latents: Sequence[int],
) -> tuple[Float[np.ndarray, " words"], Bool[np.ndarray, " words"]]:
    """Return the absorbed fraction of each word, and whether it is fully absorbed (3. above); `along` is A.

    Activations are of unit decoder rows: those of other rows are to be multiplied by the rows' length.
    """
    projected = acts * cosine
    own = projected[:, latents].sum(axis=1)
    others = np.where(cosine >= LEAST_COSINE, projected, 0.0)
    others[:, latents] = 0.0
    rest = np.sort(others, axis=1)[:, ::-1][:, :NEXT].sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        missing = np.minimum(rest, along - own)
        fraction = np.where(own <= 0, 1.0, missing / (missing + own))
        fraction = np.where((own >= along) | (rest / along < LEAST_RATIO), 0.0, fraction).clip(0, 1)
        strongest = projected.argmax(axis=1)
        share = projected[np.arange(len(acts)), strongest] / along
    silent = (np.abs(acts[:, latents]) < SILENT).all(axis=1)
    return fraction, silent & (cosine[strongest] >= LEAST_FULL) & (share >= LEAST_RATIO)


def _logistic(x: Any, y: Bool[np.ndarray, " n"], penalty: float = 0.0, c: float = 1.0) -> Any:
    settings: dict[str, Any] = {"max_iter": 200}
    if penalty:  # liblinear draws the order of its steps, and would do so anew at each run
        settings = {"solver": "liblinear", "l1_ratio": 1.0, "random_state": 0}
    return LogisticRegression(C=c, class_weight="balanced", tol=1e-3, **settings).fit(x, y)


def class_latents(
    acts: scipy.sparse.csr_array, y: Bool[np.ndarray, " n"], train: Bool[np.ndarray, " n"]
) -> tuple[list[int], float]:
    """Return the latents of a class, S of 2. above, and the test F1 of a probe on them."""
    weights = _logistic(acts[train], y[train], penalty=1.0, c=0.1).coef_[0]
    order = np.argsort(-weights, kind="stable")[:MOST_SPLIT]
    chosen, best = [], 0.0
    for n in range(1, 1 + int((weights[order] > 0).sum())):
        x = acts[:, order[:n]].toarray()
        found = float(f1(y[~train], _logistic(x[train], y[train]).predict(x[~train])))
        if chosen and found <= best + RISE:
            break
        chosen, best = order[:n].tolist(), found
    return chosen, best


# --- classes of words -----------------------------------------------------------------------------------------------------


def pairs_of(words: Words, forms: Sequence[str]) -> list[tuple[str, str]]:
    """Return (parent, form) of forms that are nearly always of the parent, with enough words in training and in test."""
    labels, found = words.labels.tocsc(), []
    column = {name: labels[:, [i]].toarray().ravel() > 0 for i, name in enumerate(words.names)}
    for parent in (name for name in PARENTS if name in column):
        children = []
        for form in forms:
            both = column[parent] & column[form]
            n, n_train = int(both.sum()), int(both[words.train].sum())
            if n >= max(LEAST_WORDS, 0.9 * column[form].sum()) and min(n_train, n - n_train) >= LEAST_WORDS / 5:
                children.append((n, form))
        found += [(parent, form) for _, form in sorted(children, reverse=True)[:MOST_FORMS]]
    return found


def absorption(saes: Mapping[str, Any], model: Any, treebanks: Sequence[str], *, context_size: int = 128) -> Absorption:
    """Return the absorption of SAEs of one hook on planted hierarchies of the treebanks' words, and what letters allow.

    Raises: UsageError where no form is frequent enough, of a transcoder, and as `one_place`, `read_words` and `encode_words`.
    """
    hook = one_place(saes, model)
    if elsewhere := [name for name, sae in saes.items() if hooks_of(sae)[0] != hook]:
        raise UsageError(f"{elsewhere[0]} is a transcoder; absorption takes SAEs of one hook.")
    scored: dict[str, list[Absorbed]] = {name: [] for name in saes}
    spelled: dict[str, int] = {}
    l0, n_words = dict.fromkeys(saes, 0.0), 0
    for path in treebanks:
        treebank, counts = with_forms(read_treebank(path))
        forms = [form for form, n in counts.items() if n >= LEAST_WORDS]
        words = read_words(model, hook, treebank, [*PARENTS, *forms], context_size=context_size)
        pairs = pairs_of(words, forms)
        acts = {name: encode_words(sae, words.x) for name, sae in saes.items()}
        n_words += len(words.x)
        l0 = {name: l0[name] + of.nnz for name, of in acts.items()}
        probes = {parent: _dense(words, parent) for parent in {parent for parent, _ in pairs}}
        units = [(sae, parent) for sae in saes for parent in sorted(probes) if probes[parent].f1 > LEAST_F1]
        for name, parent in paced(units, treebank.name, len(units), "class"):
            children = [child for own, child in pairs if own == parent]
            scored[name] += _scored(saes[name], acts[name], words, probes[parent], children, treebank.name)
        spelled |= counts
    letters, some = letters_of(model, hook, spelled, saes)
    for name, found in some.items():
        scored[name] += found
    if not scored[next(iter(saes))]:
        raise UsageError(
            f"no form comes {LEAST_WORDS} times in a class that a dense probe reads. Give more text with --ud."
        )
    return Absorption(scored, {name: fired / n_words for name, fired in l0.items()}, letters)


class _Probe(NamedTuple):
    parent: str
    y: Bool[np.ndarray, " words"]
    unit: Float[np.ndarray, " d_in"]
    said: Bool[np.ndarray, " words"]
    f1: float  # on test words


def _dense(words: Words, parent: str) -> _Probe:
    y = words.labels[:, [words.names.index(parent)]].toarray().ravel() > 0
    scale = words.x.std(axis=0) + 1e-6
    model = _logistic(words.x[words.train] / scale, y[words.train], c=0.01)
    said, direction = model.predict(words.x / scale), model.coef_[0] / scale
    on_test = float(f1(y[~words.train], said[~words.train]))
    return _Probe(parent, y, direction / np.linalg.norm(direction), said, on_test)


def _scored(sae: Any, acts: Any, words: Words, probe: _Probe, children: Sequence[str], bank: str) -> list[Absorbed]:
    latents, latents_f1 = class_latents(acts, probe.y, words.train)
    rows = sae.W_dec.detach().float().cpu().numpy()
    lengths = np.linalg.norm(rows, axis=1)
    cosine, found = (rows @ probe.unit) / np.maximum(lengths, 1e-12), []
    # what activations of unit rows are multiplied by; rescaled ones have the lengths in them
    scale = 1.0 if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else lengths
    for child in children:
        own = words.labels[:, [words.names.index(child)]].toarray().ravel() > 0
        here = np.flatnonzero(own & probe.y & probe.said & ~words.train)
        both = parts(acts[here].toarray() * scale, cosine, words.x[here] @ probe.unit, latents)
        fraction, full = (float(each.mean()) if len(here) else float("nan") for each in both)
        form = child.removeprefix("form=")
        found.append(Absorbed(bank, probe.parent, form, fraction, full, len(here), probe.f1, latents, latents_f1))
    return found


# --- first letters ----------------------------------------------------------------------------------------------------------


def letters_of(
    model: Any, hook: str, forms: Mapping[str, int], saes: Mapping[str, Any]
) -> tuple[tuple[int, int], dict[str, list[Absorbed]]]:
    """Return how many first letters a dense probe reads, and by SAE what is absorbed, where they are enough.

    Words of the treebank that are one token of the model are read in a sentence that asks for their letter; every third is
    for test.
    """
    spelled = sorted(form.removeprefix("form=") for form in forms if form[5:].isalpha() and len(form) > 6)
    tokens = tokens_inside(model.tokenizer, spelled)
    single = [word for word, own in zip(spelled, tokens, strict=True) if len(own) == 1][:MOST_WORDS]
    start = TEMPLATE.index("{")
    labels = [frozenset({f"letter={plainly(word)[:1]}"}) for word in single]
    sentences = [
        Sentence(TEMPLATE.format(word), [Word(start, start + len(word), own)], number % 3 != 0)
        for number, (word, own) in enumerate(zip(single, labels, strict=True))
    ]
    names = [f"letter={letter}" for letter in LETTERS]
    if len(single) < MOST_SPLIT * len(names):
        return (0, len(names)), {}
    words = read_words(model, hook, Treebank("first letters", sentences), names, context_size=32)
    counts = words.labels.toarray()
    enough = [n for i, n in enumerate(names) if min(counts[words.train, i].sum(), counts[~words.train, i].sum()) >= 5]
    probes = [probe for probe in (_dense(words, name) for name in enough) if probe.f1 > LEAST_F1]
    acts = {name: encode_words(sae, words.x) for name, sae in saes.items() if len(probes) >= LEAST_LETTERS}
    return (len(probes), len(names)), {
        name: [each for probe in probes for each in _scored(saes[name], own, words, probe, [probe.parent], "")]
        for name, own in acts.items()
    }
