"""Caches with planted latents over the tokens of a real one, and what the rules make of them."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

from sae_italian.autointerp import run_autointerp
from sae_italian.autointerp.draws import ExampleSource, find_neighbours
from sae_italian.autointerp.examples import LEAST_PAIRS, LatentExamples, Verdicts
from sae_italian.autointerp.places import Places
from sae_italian.autointerp.scorers import Asked
from sae_italian.autointerp.store import Explanation, Store
from sae_italian.cache import FeatureCache
from sae_italian.corpora.packing import NO_DOCUMENT
from tests.planted import planted_cache


def scores_of(store, latent):
    """All score rows of one latent, the control included, as dicts."""
    query = "JOIN explanation ON explanation.id = explanation_id WHERE score.latent = ?"
    columns = "explainer, control, scorer, judge, negatives, metric, value, lo, hi, n_positive, n_negative, n_failed"
    cursor = store.connection.execute(f"SELECT {columns} FROM score {query} ORDER BY 1, 2, 3, 4, 5, 6", (latent,))
    return [dict(zip(columns.split(", "), row, strict=True)) for row in cursor]


N_TOKENS, N_PREVIOUS, N_NOISE = 12, 6, 10
DEAD, RARE = N_TOKENS + N_PREVIOUS + N_NOISE, N_TOKENS + N_PREVIOUS + N_NOISE + 1


@pytest.fixture(scope="session")
def planted(small_cache, mini, tmp_path_factory):
    """Latents on one token each, latents right after one token each, latents at random positions, one dead, one rare."""
    base = FeatureCache.open(small_cache)
    counted = np.flatnonzero(base.doc != NO_DOCUMENT)
    tokens = base.tokens
    ids, counts = np.unique(tokens[counted], return_counts=True)
    order = ids[np.argsort(-counts)]
    frequent = order[20 : 20 + 4 * N_TOKENS : 4]
    latents = [np.flatnonzero(tokens == token) for token in frequent]
    for token in order[5 : 5 + N_PREVIOUS]:
        after = np.flatnonzero(tokens == token) + 1
        after = after[after < len(tokens)]
        latents.append(after[base.doc[after] == base.doc[after - 1]])
    rng = np.random.default_rng(0)
    latents += [np.sort(rng.choice(counted, 400, replace=False)) for _ in range(N_NOISE)]
    latents += [np.empty(0, dtype=np.int64), counted[:3]]
    return planted_cache(base, tmp_path_factory.mktemp("planted"), latents, mini)


@pytest.fixture(scope="session")
def store(planted, mini):
    return run_autointerp(planted, mini.tokenizer)


@pytest.fixture(scope="session")
def source(planted):
    neighbours = find_neighbours(planted, range(planted.manifest.d_sae))
    # decoder rows are random here; what matters is that the source is drawn from
    return ExampleSource(planted, {**neighbours, "decoder": neighbours["decoder"] or {0: np.array([1, 2, 3])}})


@pytest.fixture(scope="session")
def places(source, mini):
    return Places(source, mini.tokenizer)


@dataclass(frozen=True)
class OracleJudge:
    """Knows the answer: balanced accuracy 1 and correlation 1, whatever the explanation."""

    name: str = "oracle"
    concurrency: int = 1

    def detect(self, explanation, examples):
        said = np.array([example.positive for example in examples], dtype=np.int64)
        return Verdicts(said, said.astype(np.float64))

    def simulate(self, explanation, examples):
        return [example.activations for example in examples]


class Told(list):
    """Examples written by hand, as the scorers want them."""

    def __init__(self, examples):
        super().__init__(examples)
        self.document = np.unique([example.document for example in examples], return_inverse=True)[1]
        self.pair, self.decile = (np.array([getattr(e, name) for e in examples]) for name in ("pair", "decile"))
        self.activations = [example.activations for example in examples]
        self.questions = {}
        for source in dict.fromkeys(example.negatives for example in examples if example.negatives):
            there = [i for i, example in enumerate(examples) if example.negatives == source]
            pairs = {examples[i].pair for i in there}
            here = [i for i, example in enumerate(examples) if not example.negatives and example.pair in pairs]
            if min(len(here), len(there)) >= LEAST_PAIRS:
                self.questions[source] = np.array(here), np.array(there)


class Says:
    """A judge whose answers are known."""

    name, concurrency = "says", 1

    def __init__(self, said=(), probability=None, simulated=()):
        self.verdicts, self.simulated = Verdicts(np.asarray(said), probability), simulated

    def detect(self, explanation, examples):
        return self.verdicts

    def simulate(self, explanation, examples):
        return self.simulated


def scores(scorer, judge, *texts, **parts):
    """The scores of explanations by one judge, a list for each text; `parts` are those of the latent's examples."""
    asked = [Asked(judge, Explanation(0, "nobody", "ok", text, text, None)) for text in texts or ("",)]
    found = [[] for _ in asked]
    for one, score in scorer(asked, LatentExamples(0, 1.0, **parts)):
        found[asked.index(one)].append(score)
    return found if texts else found[0]


def accuracies(store, scorer="detection", explainer="rules", control="", negatives=None):
    negatives = negatives or {"detection": "random", "fuzzing": "silent-token"}[scorer]
    with Store(store, {}) as opened:
        return opened.values(
            explainer=explainer, control=control, scorer=scorer, metric="balanced_accuracy", negatives=negatives
        )


@pytest.fixture
def prices(tmp_path):
    """A price file: a dollar per thousand tokens in, two out."""
    path = tmp_path / "prices.json"
    path.write_text(
        json.dumps({"version": "1", "models": {"prova": {"in": 1000.0, "out": 2000.0}}, "free": ["gratis"]})
    )
    return path
