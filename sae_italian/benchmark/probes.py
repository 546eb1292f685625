"""What the probes see, and the protocol of sae-probes with the controls beside every number.

Activations of a model at a hook are kept on disk once, of tokens and not of their means: the mean of a sentence's latents
is not the latents of its mean, and a further SAE costs its encoding alone. Every vector is a row of one sparse pooling
matrix P over tokens: P X for activations, P Z for latents, P E for embeddings.

k-sparse probing as in Kantamneni et al. 2025 (arXiv 2502.16681; package sae-probes): latents are ranked on the training
rows by the difference of class means of a / mean non-zero |a|, and a logistic regression with an l1 penalty is fitted on
the raw values of the first k; C is one of ten, chosen by the AUC on training rows that are held out. Nothing is chosen by
a test score. The same code fits the dense probes (l2, standardised, four values of C), as sae-probes' baselines.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Int
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch.nn.utils.rnn import pad_sequence

from sae_italian.analysis.treebank import Sentence, Word, batches_of, encode_words, last_tokens
from sae_italian.base.errors import DataError
from sae_italian.base.pace import paced, progress
from sae_italian.base.statistics import auc_parts
from sae_italian.base.storage import atomic_path, fingerprint, first_difference, read_json, write_json
from sae_italian.benchmark.material import stop
from sae_italian.benchmark.tasks import LAST_OF
from sae_italian.corpora.packing import bos_id, tokenise
from sae_italian.models.activations import read_activations

SIZES = (1, 2, 5, 16)
GRID = tuple(np.logspace(5, -5, 10).tolist())
DENSE_GRID, CONTROL_GRID = (1.0, 0.1, 0.01, 0.001), (100.0, 10.0, 1.0, 0.1)
FEW, FOLDS = 128, 6
N_GRAMS: Any = {"analyzer": "char_wb", "ngram_range": (1, 4), "min_df": 2, "max_features": 20_000, "sublinear_tf": True}
ENCODERS = {
    "form": partial(TfidfVectorizer, **N_GRAMS),
    "tokens": partial(OneHotEncoder, handle_unknown="ignore"),
    "dense": StandardScaler,
    "embedded": StandardScaler,
}
SOLVERS: dict[str, Any] = {  # liblinear's intercept is penalised, hardly so when it is scaled
    "l1": {"l1_ratio": 1.0, "solver": "liblinear", "intercept_scaling": 100, "random_state": 0},
    "l2": {"max_iter": 100},
}
CONTEXT = 128  # tokens of a text at most, BOS counted
PART = 32  # batches of a file
f1: Any = partial(f1_score, zero_division=0)  # pyright: ignore[reportArgumentType]  # of the truth and what was said
Point = tuple[int, int]  # text, and where its word ends, or tasks.MEAN_OF, LAST_OF


def model_identity(model: Any) -> dict[str, Any]:
    """Return what tells two models apart: name, revision, and a hash of some of their first and last weights."""
    parameters = list(model.parameters())
    some = [p.detach().flatten()[:4096].float().cpu().tolist() for p in (parameters[0], parameters[-1])]
    known = getattr(model, "loaded_from", {})
    return {"model": known.get("name"), "revision": known.get("revision"), "weights": fingerprint(some)}


@dataclass(frozen=True)
class Activations:
    """Activations at a hook of some texts, in files of whole texts; ids and spans are without BOS."""

    folder: Path
    order: list[list[int]]  # the texts of each batch, shortest first
    ids: list[Int[np.ndarray, " tokens"]]
    spans: list[Int[np.ndarray, "tokens 2"]]

    def parts(self) -> Iterator[tuple[list[int], Float[np.ndarray, "tokens d_in"]]]:
        """Yield the texts of each file and their tokens' activations, in that order, mapped from the disk."""
        for number, first in enumerate(range(0, len(self.order), PART)):
            file = self.folder / f"part-{number:04}.npy"
            if file.is_file():  # all of them, unless the time was over
                texts = [text for batch in self.order[first : first + PART] for text in batch]
                yield texts, np.load(file, mmap_mode="r")


def read_texts(model: Any, hook_name: str, texts: Sequence[str], folder: Path) -> Activations:
    """Return the activations of texts at a hook, read from `folder` where it holds them, else computed into it.

    A stopped computation goes on with the file it was at. Raises: DataError when the folder holds those of another model,
    of another revision of it, or of other texts.
    """
    found = tokenise(model.tokenizer, list(texts))
    ids, spans = [part[0, : CONTEXT - 1].astype(np.int64) for part in found], [part[1:].T for part in found]
    order = batches_of({i: len(own) + 1 for i, own in enumerate(ids) if len(own)})
    wanted = model_identity(model) | {"hook_name": hook_name, "texts": fingerprint([i.tolist() for i in ids])}
    file = folder / "manifest.json"
    if file.is_file():
        if (held := read_json(file)) != wanted:
            raise DataError(
                f"{folder} holds other activations ({first_difference(held, wanted)}). "
                "Remove that folder, or give another --out."
            )
    else:
        write_json(file, wanted)
    acts = Activations(folder, order, ids, spans)
    _compute(model, hook_name, acts)
    return acts


@torch.no_grad()
def _compute(model: Any, hook_name: str, acts: Activations) -> None:
    bos, starts = bos_id(model.tokenizer), range(0, len(acts.order), PART)
    todo = [(n, first) for n, first in enumerate(starts) if not (acts.folder / f"part-{n:04}.npy").is_file()]
    np.random.default_rng(0).shuffle(todo)  # a time bound leaves texts of all lengths
    for number, first in paced(todo, "activations", len(todo), "part"):
        rows = []
        for batch in acts.order[first : first + PART]:
            padded = pad_sequence([torch.tensor([bos, *acts.ids[i]]) for i in batch], batch_first=True)
            x = read_activations(model, padded.to(model.device), hook_name)
            rows += [own[1 : len(acts.ids[i]) + 1].float().cpu().numpy() for i, own in zip(batch, x, strict=True)]
        with atomic_path(acts.folder / f"part-{number:04}.npy") as temporary, temporary.open("wb") as handle:
            np.save(handle, np.concatenate(rows))


# --- pooling ----------------------------------------------------------------------------------------------------------


def tokens_read(text: str, spans: Int[np.ndarray, "tokens 2"], where: int) -> Int[np.ndarray, " read"]:
    """Return the tokens whose mean a point is: of a text all or the last, of a word that which completes it, if any does."""
    if where >= 0:
        word = Word(text.rfind(" ", 0, where) + 1, where, frozenset())
        last = last_tokens(Sentence(text, [word], True), spans, CONTEXT - 1)
        return last[last >= 0]
    tokens = np.flatnonzero(spans[: CONTEXT - 1, 1] <= stop(text))
    tokens = tokens if len(tokens) else np.zeros(1, dtype=np.int64)
    return tokens[-1:] if where == LAST_OF else tokens


class Pooling:
    """Points (text, where) as rows of P; those whose word lies beyond the context are absent."""

    def __init__(self, acts: Activations, texts: Sequence[str], points: Iterable[Point]):
        self.acts, self.rows, self._pools = acts, {}, []
        wheres: dict[int, list[int]] = defaultdict(list)
        for text, where in points:
            wheres[text].append(where)
        ids: list[tuple[Any, Any]] = []
        for inside, _ in acts.parts():
            read: list[Int[np.ndarray, " tokens"]] = []
            offset = 0
            for text in inside:
                own = acts.ids[text]
                for where in wheres[text]:
                    tokens = tokens_read(texts[text], acts.spans[text], where)
                    if len(tokens):
                        self.rows[text, where] = len(self.rows)
                        read.append(tokens + offset)
                        ids.append((own[tokens[-1]], own[tokens[-1] - 1] if tokens[-1] else -1))
                offset += len(own)
            sizes = np.array([len(tokens) for tokens in read], dtype=np.int64)
            columns = np.fromiter(chain.from_iterable(read), dtype=np.int64)
            cells = np.repeat(1 / sizes, sizes).astype(np.float32), columns, np.r_[0, sizes.cumsum()]
            self._pools.append(scipy.sparse.csr_array(cells, shape=(len(sizes), offset)))
        self.ids: Int[np.ndarray, "points 2"] = np.array(ids, dtype=np.int64).reshape(-1, 2)  # last token, and its left

    def dense(self) -> Float[np.ndarray, "points d_in"]:
        """Return the pooled activations."""
        return np.concatenate([pool @ x for pool, (_, x) in zip(self._pools, self.acts.parts(), strict=True)])

    def embedded(self, embeddings: Float[np.ndarray, "vocabulary d"]) -> Float[np.ndarray, "points d"]:
        """Return the pooled rows of the model's embedding matrix."""
        parts, ids = zip(self._pools, self.acts.parts(), strict=True), self.acts.ids
        tokens = ((pool, np.concatenate([ids[text] for text in inside])) for pool, (inside, _) in parts)
        return np.concatenate([pool @ embeddings[own] for pool, own in tokens])

    def latents(self, sae: Any, what: str) -> scipy.sparse.csr_array:
        """Return the pooled latents [points, d_sae]. Raises: UsageError when the SAE reads another width."""
        found, parts = [], zip(self._pools, self.acts.parts(), strict=True)
        for pool, (_, x) in progress(what, parts, total=len(self._pools), unit="part"):
            used = np.flatnonzero(np.diff(pool.tocsc().indptr))  # tokens no point needs are not encoded
            if len(used):
                found.append(scipy.sparse.csr_array(pool[:, used] @ encode_words(sae, x[used])))
        return scipy.sparse.csr_array(scipy.sparse.vstack(found, format="csr"))

    def sample(self, n: int, seed: int = 0) -> Float[np.ndarray, "n d_in"]:
        """Return activations of tokens drawn over all texts, to calibrate a random twin on."""
        rng, total, found = np.random.default_rng(seed), sum(map(len, self.acts.ids)), []
        for _, x in self.acts.parts():
            found.append(x[np.sort(rng.permutation(len(x))[: -(-n * len(x) // total)])])
        return np.concatenate(found)


# --- the protocol -----------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
    """What a probe is fitted on, x [n, ...] with answers y, and what it then judges, w [m, ...], whose answers are `truth`."""

    x: Any
    y: Bool[np.ndarray, " n"]
    w: Any
    truth: Bool[np.ndarray, " m"]


class Judged(NamedTuple):
    """What a probe says of the test rows."""

    auc: float
    accuracy: float
    f1: float
    parts: Float[np.ndarray, " n"]  # each row's influence on the AUC; they sum to 0


def judge(score: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> Judged:
    """Return AUC, accuracy and F1 of saying yes above 0."""
    auc, parts = auc_parts(score, truth)
    said = score > 0
    return Judged(auc, float((said == truth).mean()), float(f1(truth, said)), parts)


def ranked(x: scipy.sparse.csr_array, y: Bool[np.ndarray, " n"], most: int) -> Int[np.ndarray, " most"]:
    """Return the latents whose normalised means differ most between the classes, the largest difference first."""
    absolute = abs(x)
    fired = np.maximum(np.asarray(x.count_nonzero(axis=0)).ravel(), 1)
    scale = np.asarray(absolute.sum(axis=0)).ravel() / fired
    weights = y / y.sum() - ~y / (~y).sum()
    return np.argsort(-np.abs(np.asarray(weights @ x)).ravel() / (scale + 1e-6), kind="stable")[:most]


def fitted(x: Any, y: Bool[np.ndarray, " n"], penalty: str = "l1", grid: Sequence[float] = GRID) -> Any:
    """Return a logistic regression with the C of best validation AUC: folds for few rows, else the last fifth."""
    rows, n_fit = np.arange(len(y)), len(y) - min(len(y) // 5, 100)
    few = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    folds = list(few.split(rows, y)) if len(y) < FEW else [(rows[:n_fit], rows[n_fit:])]
    models = [LogisticRegression(C=c, tol=1e-3, **SOLVERS[penalty]) for c in grid]

    def auc(model: Any, fit: Int[np.ndarray, " rows"], held: Int[np.ndarray, " rows"]) -> float:
        return auc_parts(model.fit(x[fit], y[fit]).decision_function(x[held]), y[held])[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unscaled latent may need more steps than there are
        scores = [sum(auc(model, *fold) for fold in folds) for model in models]
        return models[int(np.argmax(scores))].fit(x, y)


def sparse_probes(latents: Examples, sizes: Sequence[int] = SIZES) -> dict[int, Judged]:
    """Return by k how the probe on the first k latents judges; x and w are sparse."""
    x, y, w, truth = latents
    order = ranked(x, y, max(sizes))
    few, judged = x[:, order].toarray(), w[:, order].toarray()
    return {k: judge(fitted(few[:, :k], y).decision_function(judged[:, :k]), truth) for k in sizes}


def control_probe(kind: str, given: Examples) -> Judged:
    """Return how a probe judges that sees no latents: vectors whole, standardised, or what form gives away.

    `form`: n-grams of the characters of words or texts. `tokens`: the last token and its left neighbour, ids [n, 2].
    `dense`, `embedded`: all dimensions of activations, of embeddings.
    """
    encoder = ENCODERS[kind]()
    grid = CONTROL_GRID if kind in ("form", "tokens") else DENSE_GRID
    model = fitted(encoder.fit_transform(given.x), given.y, "l2", grid)
    return judge(model.decision_function(encoder.transform(given.w)), given.truth)


def matched(latents: Examples, frequency: float) -> float:
    """Return how well one latent stands for the answers: its correlation with them on the test rows.

    It is the latent that correlates best on the training rows, whose weights make the answers as frequent as they are in
    text: so a latent that is on at much else stands for little, which an AUC on balanced rows does not see.
    """
    x, y, w, truth = latents
    best = int(_correlations(x, y, frequency).argmax())
    return float(_correlations(w[:, [best]], truth, frequency)[0])


def _correlations(
    x: scipy.sparse.csr_array, y: Bool[np.ndarray, " n"], frequency: float
) -> Float[np.ndarray, " d_sae"]:
    """Return each latent's Pearson correlation with y at a frequency of y, 0 where it is constant."""
    weights = np.where(y, frequency / y.sum(), (1 - frequency) / (~y).sum())
    mean, square, both = (np.asarray(each).ravel() for each in (weights @ x, weights @ (x * x), (weights * y) @ x))
    variance = square - mean**2
    scale = np.sqrt(np.maximum(variance, 0) * frequency * (1 - frequency))
    return np.divide(both - frequency * mean, scale, out=np.zeros(len(mean)), where=variance > 1e-9 * square)


def permuted(latents: Examples, n: int, seed: int) -> list[float]:
    """Return the AUC at k = 1 on shuffled labels, `n` times: what choosing among many latents finds.

    Of one latent a probe only chooses the sign, which needs no fitting.
    """
    x, y, w, truth = latents
    rng, found = np.random.default_rng(seed), []
    for _ in range(n):
        labels = rng.permutation(y)
        best = ranked(x, labels, 1)
        a, b = x[:, best].toarray().ravel(), w[:, best].toarray().ravel()
        found.append(auc_parts(b * np.sign(a[labels].mean() - a[~labels].mean()), truth)[0])
    return found
