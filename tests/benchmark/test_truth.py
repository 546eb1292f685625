"""Does the benchmark follow the truth? SAEs of known quality on activations in which MicroItaliano's labels are planted.

Every label of a word (its part of speech, gender, ..., the constructions it stands in, its lemma) is a direction that the
word's activation holds with a random strength, 360 directions in 128 dimensions, with noise. SAEs have these directions
with growing noise, with too few or too many latents on, with pairs of labels merged, with labels split by lemma. The truth
of an SAE is the mean over labels of the best correlation of a latent with the label's strength.
"""

import sys

import numpy as np
import pytest
import scipy.sparse
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.synthetic import ActivationGenerator, FeatureDictionary
from scipy.stats import spearmanr

from sae_italian.base.storage import read_json
from sae_italian.benchmark import all_tasks, material
from sae_italian.benchmark.board import CONTROLS, numbers
from sae_italian.benchmark.probes import Activations, Examples, matched, sparse_probes
from sae_italian.benchmark.run import Bench
from sae_italian.benchmark.tasks import WORD, plan
from sae_italian.saes.baselines import random_twin

D, LEMMAS, K = 128, 300, 8
LABELS = ("upos", "Gender", "Number", "Person", "Tense", "Mood", "VerbForm", "contracted")


def features_of(passages):
    """Return by passage the names of every word's features, and all names: labels, constructions, frequent lemmas."""
    counts: dict[str, int] = {}
    found = []
    for passage in passages:
        inside = [f"in {name}" for name in passage.facts["constructions"].split()]
        words = [
            [f"{key}={w.facts[key]}" for key in LABELS if key in w.facts] + inside + [f"lemma {w.facts['lemma']}"]
            for w in passage.words
        ]
        found.append(words)
        for name in (name for word in words for name in word):
            counts[name] = counts.get(name, 0) + 1
    lemmas = sorted((n for n in counts if n.startswith("lemma")), key=lambda n: -counts[n])[:LEMMAS]
    names = [name for name in counts if not name.startswith("lemma") and counts[name] >= 30] + lemmas
    return found, {name: i for i, name in enumerate(names)}


def planted(folder, passages, seed=0):
    """Return activations of the passages, the strengths of features by token, and the features' directions."""
    rng = np.random.default_rng(seed)
    words, names = features_of(passages)
    directions = rng.normal(size=(len(names), D))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rows = [[names[name] for name in word if name in names] for text in words for word in text]
    strength = np.zeros((len(rows), len(names)), dtype=np.float32)
    for i, row in enumerate(rows):
        strength[i, row] = rng.gamma(4, 0.25, len(row))
    x = strength @ directions + rng.normal(0, 0.05, (len(rows), D))
    folder.mkdir(parents=True)
    np.save(folder / "part-0000.npy", x.astype(np.float32))
    spans = [np.array([[w.start, w.end] for w in p.words]) for p in passages]
    forms: dict[str, int] = {}
    ids = [np.array([forms.setdefault(w.facts["form"], len(forms)) for w in p.words]) for p in passages]
    acts = Activations(folder, [list(range(len(passages)))], ids, spans)
    return acts, np.zeros((len(forms), 2), np.float32), strength, directions, names


def sae_of(directions, k=K):
    sae = TopKSAE(TopKSAEConfig(d_in=D, d_sae=len(directions), k=min(k, len(directions))))
    unit = torch.tensor(directions / np.linalg.norm(directions, axis=1, keepdims=True)).float()
    with torch.no_grad():
        sae.W_enc.copy_(unit.T)
        sae.W_dec.copy_(unit)
    return sae.eval()


def saes_of_known_quality(directions, names, seed):
    rng = np.random.default_rng(seed)
    found = {}
    for noise in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0):
        found[f"noise {noise}"] = sae_of(directions + noise * rng.normal(size=directions.shape) / np.sqrt(D))
    for k in (1, 2, 4, 32, 96):
        found[f"k = {k}"] = sae_of(directions, k)
    labels = [i for name, i in names.items() if not name.startswith("lemma")]
    lemmas = [i for name, i in names.items() if name.startswith("lemma")]
    for share in (0.5, 1.0):
        merged = directions.copy()
        pairs = rng.permutation(labels)[: int(share * len(labels)) // 2 * 2].reshape(-1, 2)
        merged[pairs[:, 0]] = merged[pairs[:, 1]] = directions[pairs[:, 0]] + directions[pairs[:, 1]]
        found[f"merged {share}"] = sae_of(merged)
        split = [
            directions[i] + directions[j]
            for i in labels[: int(share * len(labels))]
            for j in rng.permutation(lemmas)[:8]
        ]
        kept = np.delete(directions, labels[: int(share * len(labels))], axis=0)
        found[f"split {share}"] = sae_of(np.concatenate([kept, split]))
    found["random"] = sae_of(rng.normal(size=directions.shape))
    return found


@torch.no_grad()
def truth_of(sae, x, strength, chosen):
    """Return the mean over the chosen features of the best correlation of a latent with the feature's strength."""
    z = sae.encode(torch.from_numpy(x)).numpy()
    a, b = (part - part.mean(0) for part in (strength[:, chosen], z))
    scale = np.outer(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=0))
    return float(np.divide(a.T @ b, scale, out=np.zeros_like(scale), where=scale > 1e-9).max(axis=1).mean())


KINDS = {"micro-words": "=", "micro-constructions": "in "}
FAMILIES = (("micro-words", WORD), ("micro-constructions", "mean"), ("micro-constructions", "last"))


def bench_on(folder, seed):
    """The bench of planted activations, the SAEs of known quality by name, and each one's truth by family."""
    passages = [p for p in material.micro_passages(300) if len(p.words) > 1]
    passages = list({p.text: p for p in passages}.values())
    tasks = [t for t in all_tasks() if t.source == "micro" and not t.form]
    planned = plan(material.Material({"micro": passages}, {}), tasks, n_seeds=1)
    by_text = {p.text: p for p in passages}
    acts, table, strength, directions, names = planted(folder / "acts", [by_text[text] for text in planned.texts], seed)
    bench = Bench(folder, acts, table, planned, n_permuted=1)
    x = np.load(folder / "acts" / "part-0000.npy")
    some = np.random.default_rng(2).permutation(len(x))[:8000]
    saes = saes_of_known_quality(directions, names, seed + 1)
    chosen = {family: [i for name, i in names.items() if kind in name] for family, kind in KINDS.items()}
    truth = {
        name: {family: truth_of(sae, x[some], strength[some], own) for family, own in chosen.items()}
        for name, sae in saes.items()
    }
    return bench, saes, truth


def agreement(truth, values):
    """The rank correlation of a number with the truth over SAEs."""
    return spearmanr([truth[name] for name in values], [*values.values()]).statistic


@pytest.mark.slow
def test_the_benchmark_ranks_saes_as_the_truth_does(tmp_path, capsys):
    bench, saes, truth = bench_on(tmp_path, 0)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    none = {**dict.fromkeys(CONTROLS, {"auc": np.nan}), "majority": np.nan}  # no control is asked here
    for name, sae in saes.items():
        bench.score(name, name, sae, random_twin(sae, 1))
        files = {p.name: tmp_path / name / f"results.{p.name}.json" for p in bench.problems}
        rows[name] = {problem: numbers(none, read_json(file)) for problem, file in files.items()}

    def mean(name, mine, column):
        return np.mean([rows[name][p][column] for p in mine])

    noisy = [name for name in rows if name.startswith("noise")]
    columns = (("auc_1", rows), ("auc_16", rows), ("gain_1", rows), ("match", rows), ("auc_1", noisy))
    heads = "AUC, k = 1 | AUC, k = 16 | gain, k = 1 | match | AUC, k = 1, noise alone"
    said, found = ["", f"| family, pooling | {heads} | problems |", "|---" * 7 + "|"], {}
    for family, pooling in FAMILIES:
        mine = [p.name for p in bench.problems if p.task.family == family and p.pooling == pooling]
        own = {name: each[family] for name, each in truth.items()}
        found[family, pooling] = [agreement(own, {n: mean(n, mine, column) for n in some}) for column, some in columns]
        said.append(f"| {family}, {pooling} | {' | '.join(f'{r:.2f}' for r in found[family, pooling])} | {len(mine)} |")
    words = [p.name for p in bench.problems if p.pooling == WORD]
    said += ["", "| SAE | truth | AUC, k = 1 | AUC, k = 16 | gain, k = 1 | match |", "|---" * 6 + "|"]
    for name, own in sorted(truth.items(), key=lambda each: -each[1]["micro-words"]):
        means = [f"{mean(name, words, column):.3f}" for column in ("auc_1", "auc_16", "gain_1", "match")]
        said.append(f"| {name} | {own['micro-words']:.3f} | {' | '.join(means)} |")
    with capsys.disabled():
        sys.stdout.write("\n".join(said) + "\n")
    # what holds, and what docs/benchmark.md says does not: the AUC of words where the numbers of latents on are unlike
    of_words = found["micro-words", WORD]
    assert of_words[3] >= 0.65 and of_words[3] > max(of_words[:2])  # 0.88 where it was chosen, 0.70 to 0.88 elsewhere
    assert all(found["micro-constructions", pooling][3] >= 0.9 for pooling in ("mean", "last"))
    assert found["micro-constructions", "mean"][0] >= 0.8
    assert found["micro-words", WORD][4] >= 0.8 > found["micro-words", WORD][0]


def above(mine, twins):
    """The match as the table has it: mean correlation, above the twin's, as a share of what is left to 1."""
    return np.mean([(one - other) / (1 - other) for one, other in zip(mine, twins, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [5, 6])
def test_the_match_follows_the_truth_on_draws_that_it_was_not_chosen_on(tmp_path, capsys, seed):
    bench, saes, truth = bench_on(tmp_path, seed)
    found = {}
    for name, sae in saes.items():
        z, twin = (bench.pooling.latents(each, name) for each in (sae, random_twin(sae, 1)))
        for family, pooling in FAMILIES:
            own = [p for p in bench.problems if p.task.family == family and p.pooling == pooling]
            both = [[matched(bench.examples(p, each), p.frequency) for p in own] for each in (z, twin)]
            found.setdefault((family, pooling), {})[name] = above(*both)
    told = [agreement({n: t[family] for n, t in truth.items()}, found[family, p]) for family, p in FAMILIES]
    with capsys.disabled():
        sys.stdout.write(f"\nseed {seed}, match: {', '.join(f'{r:.2f}' for r in told)}\n")
    assert min(told) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_match_follows_the_truth_on_saelens_synthetic_data(capsys, seed):
    """256 features in 128 dimensions, eight on at a time by Zipf's law; a task asks whether a feature is on."""
    torch.manual_seed(seed)
    n, rng = 256, np.random.default_rng(seed)
    often = torch.arange(1, n + 1) ** -0.7
    generator = ActivationGenerator(n, K * often / often.sum(), std_firing_magnitudes=0.5)
    dictionary = FeatureDictionary(n, D, initializer=None, seed=seed)
    with torch.no_grad():
        strength = generator.sample(16_000)
        x = (dictionary(strength) + 0.05 * torch.randn(16_000, D)).numpy()
    strength, directions = strength.numpy(), dictionary.feature_vectors.detach().numpy()
    names = {f"{'label' if i < n // 2 else 'lemma'} {i}": i for i in range(n)}
    asked = [i for i in range(0, n // 2, 4) if (strength[:, i] > 0).sum() > 160]
    drawn = {}
    for i in asked:
        on = strength[:, i] > 0
        rows = [
            np.r_[yes, no]
            for yes, no in zip(*(np.split(rng.permutation(np.flatnonzero(k))[:160], 2) for k in (on, ~on)), strict=True)
        ]
        drawn[i] = rows, on, float(on.mean())
    truth, found, noisy = {}, {}, {}
    for name, sae in saes_of_known_quality(directions, names, seed + 1).items():
        truth[name] = truth_of(sae, x[:8000], strength[:8000], asked)
        both = []
        for each in (sae, random_twin(sae, 1)):
            with torch.no_grad():
                z = scipy.sparse.csr_array(each.encode(torch.from_numpy(x)).numpy())
            both.append([matched(Examples(z[a], on[a], z[b], on[b]), share) for (a, b), on, share in drawn.values()])
            if each is sae:
                noisy[name] = np.mean(
                    [sparse_probes(Examples(z[a], on[a], z[b], on[b]), (1,))[1].auc for (a, b), on, _ in drawn.values()]
                )
        found[name] = above(*both)
    told = [agreement(truth, each) for each in (found, noisy)]
    with capsys.disabled():
        sys.stdout.write(
            f"\nSAELens' synthetic data {seed}, {len(asked)} tasks: match {told[0]:.2f}, AUC at k = 1 {told[1]:.2f}\n"
        )
    assert told[0] >= 0.8
