"""Titles: the kinds a word is of, the title of a latent planted on a kind, and that it is judged as it says."""

import numpy as np
import pytest

from sae_italian.autointerp import morphology
from sae_italian.autointerp.choose import RuleExplainer
from sae_italian.autointerp.morphology import kinds_of, table_of_kinds
from sae_italian.autointerp.places import View
from sae_italian.autointerp.store import Explanation, Store
from sae_italian.autointerp.wording import LONGEST, rule_of_title, title_of_kind
from sae_italian.autointerp.work import TITLE
from sae_italian.base.labels import labels
from tests.autointerp.test_rules import planted_activity


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ("viene vengono verrà venga venne venire", "lemma venire"),
        ("sue nuove nostre queste le", "adjective fem plur"),
        ("case politiche regioni", "noun fem plur"),
        ("parlò disse venne fecero mise finirono fu nacque dovette", "verb past"),
        ("parlava era finivano aveva", "verb imperfect"),
        ("parlerà verrò saranno", "verb future"),
        ("vorrei sarebbe parlerebbero", "verb conditional"),
        ("parlare venire porre vederlo dirsi far", "verb infinitive"),
        ("parlando scrivendo guardandosi", "verb gerund"),
        ("parlano sono vengono scrissero", "verb third plural"),
        ("di del della degli dell' dell’ delle", "with di"),
        ("con col coi", "with con"),
        ("due cento", "number"),
        ("lentamente già", "adverb"),
        ("gennaio maggio", "month"),
    ],
)
def test_what_kinds_a_word_is_of(words, kinds):
    for word in words.split():
        assert kinds in kinds_of(word), (word, kinds_of(word))


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("spero", "verb past"),  # sperare: its stem ends in -r
        ("ricevi", "verb imperfect"),
        ("bicchiere", "verb infinitive"),
        ("dichiarò", "verb future"),
        ("danno", "verb first plural"),
        ("parti", "verb infinitive"),  # no par- with -ti
        ("libri", "adjective masc plur"),
        ("programma", "noun fem sing"),
        ("collo", "with con"),
        ("-", "any plur"),
    ],
)
def test_what_it_is_not(word, kind):
    assert kind not in kinds_of(word)


def test_every_kind_has_a_short_name_or_none():
    """In both languages or in neither, on the word and after it."""
    words = "viene vengono di del la le sue queste già due io che e gennaio lunedì case libri parlato parlare disse"
    for kind in table_of_kinds(words.split()).names:
        for family in ("word", "previous-word"):
            texts = [title_of_kind(family, kind, language) for language in ("it", "en")]
            assert all(texts) or not any(texts), kind
            assert all(len(text) <= LONGEST and "{" not in text for text in texts)
    assert title_of_kind("word", "lemma venire", "it") == "forme di «venire»"
    assert title_of_kind("word", "adjective fem plur", "it") == "aggettivi e articoli femminili plurali"
    assert title_of_kind("word", "adjective fem plur", "en") == "feminine plural adjectives and articles"
    assert title_of_kind("previous-word", "verb past", "it") == "dopo verbi al passato remoto"
    assert title_of_kind("word", "preposition di", "it") == "preposizione «di»"
    assert all("'" not in text for text in labels("title", "it").values())


@pytest.mark.parametrize(
    ("kind", "title"), [("verb imperfect", "verbi all’imperfetto"), ("with di", "preposizione «di», anche articolata")]
)
def test_a_latent_on_a_kind_of_word_is_called_by_it(places, source, kind, title):
    position = np.flatnonzero(on(places, source, kind) & (source.segment_of >= 0))
    found = RuleExplainer(places).explain(planted_activity(source, position))[0]
    assert found.title("it") == title, places.kinds.words(kind)
    assert found.rule["title"]["accuracy"] > 0.95
    executed = rule_of_title(found.rule["title"], places).at(View(places, position[:50, None]), "rate")
    assert (executed > 0).all()


def on(places, source, kind):
    keys = View(places, np.arange(len(source.tokens))[:, None]).keys("word")[:, 0]
    return np.isin(keys, places.kinds.words(kind)) & (keys >= 0)


def test_titles_are_short_and_have_their_own_score(store):
    with Store(store, {}) as opened:
        explained = [e for e in opened.explanations("rules").values() if e.status == "ok"]
        where = {"explainer": "rules", "scorer": "detection", "metric": "balanced_accuracy", "negatives": "random"}
        scores, own = opened.values(control=TITLE, **where), opened.values(control="", **where)
        lookups = [*opened.explanations("token-lookup").values()]
    assert len(explained) > 10 and scores.keys() == own.keys()
    for explanation in explained:
        for language in ("it", "en"):
            assert 0 < len(explanation.title(language)) <= LONGEST
    assert np.mean(list(scores.values())) > np.mean(list(own.values())) - 0.1
    assert not any(explanation.title("it") for explanation in lookups)  # a control has none


def test_without_a_lemmatiser_keys_are_the_title(places, source, monkeypatch):
    monkeypatch.setattr(morphology, "LEXICON", "no_such_module")
    assert table_of_kinds(["viene", "vengono"]).names == []
    monkeypatch.setattr(type(places), "kinds", table_of_kinds(places.tables["word"].names))
    position = np.flatnonzero(source.tokens == source.tokens[source.segment_of >= 0][100])
    found = RuleExplainer(places).explain(planted_activity(source, position[source.segment_of[position] >= 0]))
    assert found[0].title("it").startswith("«") and "kind" not in found[0].rule["title"]


def test_an_older_store_and_an_llm_have_no_title():
    for rule in (None, {"family": "token"}):
        assert Explanation(0, "rules", "ok", "a", "b", rule).title("it") == ""
