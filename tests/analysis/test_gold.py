"""Gold labels found by latents that carry them by construction, and not by others."""

import numpy as np
import pytest

from sae_italian import micro_italiano
from sae_italian.analysis import gold_table
from sae_italian.analysis.labels import DETECTED, LEAST_WORDS, GoldWords
from sae_italian.cache import FeatureCache
from sae_italian.cache.read import PARTS
from sae_italian.corpora.packing import NO_DOCUMENT
from tests.planted import planted_cache

WANTED = {"upos=NOUN", "number=Plur", "gender=Fem number=Plur", "tense=Imp", "construction=ioi", "register=recipe"}


@pytest.fixture(scope="module")
def base(small_cache) -> FeatureCache:
    return FeatureCache.open(small_cache)


@pytest.fixture(scope="module")
def words(base):
    return GoldWords(base)


@pytest.fixture(scope="module")
def planted(base, words, mini, tmp_path_factory):
    """One latent per wanted label, firing on all tokens of its words; one on noise."""
    matrix = words.labels.toarray().astype(bool)
    columns = {label: column for (_, label), column in words.names.items()}
    positions = []
    for label in sorted(WANTED):
        chosen = np.flatnonzero(matrix[:, columns[label]])
        positions.append(np.flatnonzero(np.isin(words.word_of_position, chosen)))
    positions.append(np.flatnonzero(base.doc != NO_DOCUMENT)[::5])
    return planted_cache(base, tmp_path_factory.mktemp("gold"), positions, mini)


def test_planted_labels_are_found_perfectly(planted):
    results = {result.label: result for result in gold_table(planted)}
    for latent, label in enumerate(sorted(WANTED)):
        found = results[label]
        assert (found.latent, found.f1, found.precision, found.recall) == (latent, 1.0, 1.0, 1.0), label
    assert sum(result.f1 >= DETECTED for result in results.values()) >= len(WANTED)


def test_a_label_without_a_latent_is_not_found(planted):
    results = {result.label: result for result in gold_table(planted)}
    assert results["upos=ADJ"].f1 < 0.6


def test_every_token_lies_in_the_word_of_its_last_letter(base, words):
    rng = np.random.default_rng(0)
    positions = rng.choice(np.flatnonzero(base.doc != NO_DOCUMENT), 300, replace=False)
    for position in positions.tolist():
        document = base.document(int(base.doc[position]))
        gold = micro_italiano.document(int(document.doc_id.split("/")[2]), seed=0)
        assert gold.text == document.text
        first = int(np.flatnonzero(np.array(words.doc_of_word) == base.doc[position])[0])
        word = gold.words[words.word_of_position[position] - first]
        assert word.start < base.whole("end")[position] <= word.end


def test_numbers_are_of_test_documents_and_of_enough_words(planted, words):
    test = planted.document_parts()[np.array(words.doc_of_word)] == PARTS.index("test")
    matrix = words.labels.toarray().astype(bool)
    covered = np.zeros(len(test), bool)
    covered[words.word_of_position[words.word_of_position >= 0]] = True
    for result in gold_table(planted)[::10]:
        column = words.names[result.category, result.label]
        assert result.n == matrix[test & covered, column].sum() >= LEAST_WORDS


def test_other_corpora_have_no_gold(mini, jsonl, topk_sae, tmp_path):
    from sae_italian.cache import build_cache

    cache = FeatureCache.open(build_cache(topk_sae, mini, str(jsonl), tmp_path / "c", n_tokens=2000))
    assert gold_table(cache) == gold_table(str(cache.folder)) == []
