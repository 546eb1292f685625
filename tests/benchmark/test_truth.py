"""Does the benchmark follow the truth? SAEs of known quality on activations in which MicroItaliano's labels are planted.

Every label of a word (its part of speech, gender, ..., the constructions it stands in, its lemma) is a direction that the
word's activation holds with a random strength, 360 directions in 128 dimensions, with noise. SAEs have these directions
with growing noise, with too few or too many latents on, with pairs of labels merged, with labels split by lemma. The truth
of an SAE is the mean over labels of the best correlation of a latent with the label's strength.
"""

import sys

import numpy as np
import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from scipy.stats import spearmanr

from sae_italian.base.storage import read_json
from sae_italian.benchmark import all_tasks, material
from sae_italian.benchmark.probes import Activations
from sae_italian.benchmark.run import set_up
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


def saes_of_known_quality(directions, names):
    rng = np.random.default_rng(1)
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


@pytest.mark.slow
def test_the_benchmark_ranks_saes_as_the_truth_does(tmp_path, capsys):
    passages = [p for p in material.micro_passages(300) if len(p.words) > 1]
    passages = list({p.text: p for p in passages}.values())
    tasks = [t for t in all_tasks() if t.source == "micro" and not t.form]
    planned = plan(material.Material({"micro": passages}, {}), tasks)
    by_text = {p.text: p for p in passages}
    acts, table, strength, directions, names = planted(tmp_path / "acts", [by_text[text] for text in planned.texts])
    bench = set_up(tmp_path, acts, table, planned, n_seeds=1, n_permuted=1)
    x = np.load(tmp_path / "acts" / "part-0000.npy")
    rng = np.random.default_rng(2).permutation(len(x))[:8000]
    kinds = {"micro-words": "=", "micro-constructions": "in "}
    rows = {}
    for name, sae in saes_of_known_quality(directions, names).items():
        bench.score(name, name, sae, random_twin(sae, 1))
        truth = [
            truth_of(sae, x[rng], strength[rng], [i for n, i in names.items() if kind in n]) for kind in kinds.values()
        ]
        rows[name] = (
            truth,
            {p.name: read_json(tmp_path / name / f"results.{p.name}.json") for p in bench.plan.problems},
        )

    def mean(name, mine, k, key="auc"):
        return np.mean([rows[name][1][p][key][k][0] for p in mine])

    noisy = [name for name in rows if name.startswith("noise")]
    heads = ("AUC, k = 1", "AUC, k = 16", "gain, k = 1", "AUC, k = 1, noise alone")
    said = ["", f"| family, pooling | {' | '.join(heads)} | problems |", "|---" * (len(heads) + 2) + "|"]
    found = {}
    for family, pooling in (("micro-words", WORD), ("micro-constructions", "mean"), ("micro-constructions", "last")):
        mine = [p.name for p in bench.plan.problems if p.task.family == family and p.pooling == pooling]
        truth = {name: row[0][list(kinds).index(family)] for name, row in rows.items()}
        one = {name: mean(name, mine, "1") for name in rows}
        twin = {name: mean(name, mine, "1", "twin") for name in rows}
        columns = [
            one,
            {n: mean(n, mine, "16") for n in rows},
            {n: one[n] - twin[n] for n in rows},
            {n: one[n] for n in noisy},
        ]
        found[family, pooling] = [spearmanr([truth[n] for n in c], [*c.values()]).statistic for c in columns]
        said.append(f"| {family}, {pooling} | {' | '.join(f'{r:.2f}' for r in found[family, pooling])} | {len(mine)} |")
    words = [p.name for p in bench.plan.problems if p.pooling == WORD]
    said += ["", "| SAE | truth | AUC at k = 1 | AUC at k = 16 |", "|---|---|---|---|"]
    for name, (truth, _) in sorted(rows.items(), key=lambda row: -row[1][0][0]):
        means = [f"{mean(name, words, k):.3f}" for k in ("1", "16")]
        said.append(f"| {name} | {truth[0]:.3f} | {' | '.join(means)} |")
    with capsys.disabled():
        sys.stdout.write("\n".join(said) + "\n")
    # what holds, and what docs/benchmark.md says does not: word tasks of SAEs with unlike numbers of latents on
    assert found["micro-constructions", "mean"][0] >= 0.8
    assert found["micro-words", WORD][3] >= 0.8
    assert found["micro-words", WORD][2] > found["micro-words", WORD][0]
