"""Latents that are gold labels of MicroItaliano: the explainer must find them, and scores must know clean from noisy."""

import numpy as np
import pytest

from sae_italian.autointerp import run_autointerp, summarise
from sae_italian.autointerp.store import Store
from sae_italian.cache import FeatureCache
from sae_italian.corpora.packing import NO_DOCUMENT
from tests.autointerp.conftest import OracleJudge, accuracies
from tests.autointerp.reading import faults
from tests.planted import gold_positions, noisy, planted_cache

MORPHOLOGY = ("gender", "number", "person", "tense", "mood", "verbform", "gender+number", "upos+gender+number", "upos")
NOISE = (0.2, 0.4)  # share of a latent's activations that is replaced by random ones


@pytest.fixture(scope="module")
def gold(small_cache, mini, tmp_path_factory):
    """Every label of lemma, morphology and construction with enough words; then noisy copies of some; their names."""
    base = FeatureCache.open(small_cache)
    labels = gold_positions(base, ("lemma", *MORPHOLOGY, "construction"))
    counted = np.flatnonzero(base.doc != NO_DOCUMENT)
    rng = np.random.default_rng(0)
    names = list(labels)
    lemmas = [name for name in names if name.startswith("lemma=")][:20]
    kept = lemmas + [name for name in names if not name.startswith("lemma=")]
    latents = [labels[name] for name in kept]
    copied = [i for i, name in enumerate(kept) if not name.startswith("construction")]
    copies = [(i, share) for i in copied[:: len(copied) // 40] for share in NOISE]
    latents += [noisy(labels[kept[i]], counted, share, rng) for i, share in copies]
    return planted_cache(base, tmp_path_factory.mktemp("gold"), latents, mini), kept, copies


@pytest.fixture(scope="module")
def gold_store(gold, mini, tmp_path_factory):
    return run_autointerp(
        gold[0], mini.tokenizer, store=tmp_path_factory.mktemp("gold-store") / "store", judges=(OracleJudge(),)
    )


def test_planted_tokens_and_morphology_are_explained(gold, gold_store):
    """The median over planted token and morphology latents: what six keys can say of a part of speech, and whole rules."""
    _, names, _ = gold
    wanted = [i for i, name in enumerate(names) if not name.startswith("construction")]
    assert len(wanted) >= 30
    for control, scorer, least in (
        ("", "detection", 0.85),
        ("", "fuzzing", 0.73),
        ("whole rule", "detection", 0.89),
        ("whole rule", "fuzzing", 0.78),
    ):
        values = accuracies(gold_store, scorer, control=control)
        assert np.median([values[i] for i in wanted if i in values]) >= least, scorer
        assert sum(i in values for i in wanted) >= 30


def test_the_shuffled_control_is_chance(gold_store):
    summary = summarise(gold_store)
    assert summary.shuffled_detection.value == pytest.approx(0.5, abs=0.03)
    assert summary.shuffled_fuzzing.value == pytest.approx(0.5, abs=0.03)


def test_always_yes_is_half_and_the_oracle_is_one(gold_store):
    summary, oracle = summarise(gold_store), summarise(gold_store, judge="oracle")
    assert summary.always_yes.value == summary.always_no.value == 0.5
    assert summary.always_yes.lo == summary.always_yes.hi == 0.5
    assert oracle.detection.value == oracle.fuzzing.value == 1.0 and oracle.detection.lo == 1.0


def test_a_clean_latent_ranks_above_its_noisy_copies(gold, gold_store):
    """In 95 % of the pairs of a latent and a copy of it with noise, the clean one has the higher score."""
    _, names, copies = gold
    values = accuracies(gold_store)
    pairs = [
        (values[i], values[len(names) + n])
        for n, (i, _) in enumerate(copies)
        if i in values and len(names) + n in values
    ]
    assert len(pairs) >= 60
    assert np.mean([clean > dirty for clean, dirty in pairs]) >= 0.95


def test_the_texts_speak_italian_grammar(gold, gold_store):
    """Some explanations are endings, not lists of words, and none is called a concept."""
    with Store(gold_store, {}) as store:
        texts = [e.text_it + e.text_en for e in store.explanations("rules").values()]
    assert not any("concett" in text or "concept" in text for text in texts)
    assert sum("alla fine di parole che finiscono in -" in text for text in texts) >= 3


@pytest.mark.parametrize("language", ["it", "en"])
def test_the_texts_are_sentences(gold_store, language):
    """No explanation of a whole run has an agreement error, and what the test would find is found."""
    with Store(gold_store, {}) as store:
        for name in ("rules", "token-lookup"):
            for explanation in store.explanations(name).values():
                assert not faults(explanation.text(language), language), explanation.text(language)
    wrong = {
        "it": (
            "nella sequenza «a»; oppure nelle sequenze «b» o «c»",
            "sulla parola «a» o «b»",
            "nelle sequenze «a b»; oppure su «c»",
            "su «a», «b»",
            "su parole d'altri",
        ),
        "en": (
            "in the sequences «a» or «b»; or in the sequence «c»",
            "on the word «a» or «b»",
            "in the sequences «a b»; or on «c»",
            "on «a», «b»",
            "on 'words'",
        ),
    }
    assert all(faults(text, language) for text in wrong[language])


def test_titles_name_what_was_planted(gold, gold_store):
    """A latent on all forms of a verb, or on a kind of word, is called by it."""
    names = gold[1]
    wanted = {
        "tense=Imp": "verbi all’imperfetto",
        "lemma=di": "preposizione «di», anche articolata",
        "lemma=per": "preposizione «per»",
        "verbform=Inf": "verbi all’infinito",
    }
    with Store(gold_store, {}) as store:
        titles = {names[i]: e.title("it") for i, e in store.explanations("rules").items() if i < len(names)}
    assert {name: title for name, title in titles.items() if name in wanted} == wanted, titles
