"""Indirect-object sentences: names as asked, pairs that differ in one name alone, and a model that does the task or not."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_italian.analysis.latent import tokens_inside
from sae_italian.analysis.tasks import (
    check_able,
    default_words,
    ioi_pairs,
    ioi_score,
    score,
    score_choices,
    words_for,
)
from sae_italian.base.errors import UsageError
from sae_italian.models import load_model, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(mini):
    return mini.tokenizer


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return ioi_pairs(60, tokenizer, default_words("micro-italiano"))


def test_pairs_differ_in_the_indirect_object_alone(tokenizer, pairs):
    for pair in pairs:
        assert pair.counterfactual == pair.base.replace(pair.io, pair.new_io)
        base, other = (tokenizer(text).input_ids for text in (pair.base, pair.counterfactual))
        assert len(base) == len(other) and sum(a != b for a, b in zip(base, other, strict=True)) == 1
        assert pair.base.count(pair.subject) == 2 and pair.base.count(pair.io) == 1
        assert len({pair.io, pair.subject, pair.new_io}) == 3
        first = min((pair.io, pair.subject), key=pair.base.index)
        assert (pair.order == "ABBA") == (first == pair.io)
        assert pair.base.endswith(" a")


def test_names_are_of_one_gender_and_the_participle_agrees(pairs):
    men, women = (set(default_words("micro-italiano").names[gender]) for gender in ("Masc", "Fem"))
    for pair in pairs:
        three = {pair.io, pair.subject, pair.new_io}
        assert three <= men or three <= women
        for verb in ("andat", "arrivat"):
            if verb in pair.base:
                assert verb + ("i" if three <= men else "e") in pair.base
    assert Counter(pair.order for pair in pairs) == {"ABBA": 30, "BABA": 30}
    assert len({pair.template for pair in pairs}) == len(default_words("micro-italiano").templates)


def test_the_same_seed_gives_the_same_pairs_and_more_of_them_begin_alike(tokenizer, pairs):
    assert ioi_pairs(70, tokenizer, default_words("micro-italiano"))[:60] == pairs
    assert ioi_pairs(60, tokenizer, default_words("micro-italiano"), seed=1) != pairs


def test_the_embedded_models_words_are_those_of_its_grammar():
    from sae_italian.micro_italiano.grammar import load_grammar
    from sae_italian.micro_italiano.steps import realise

    def text(*tokens):
        written = realise(list(tokens), [])[0]
        return written[0].lower() + written[1:]

    words, lexicon = default_words("micro-italiano"), load_grammar().lex
    names = {g: [noun.lemma for noun in lexicon.classes[c]] for g, c in (("Masc", "nome_m"), ("Fem", "nome_f"))}
    places = [text(*noun.place) for noun in lexicon.classes["incontro"]]
    things = [noun for noun in lexicon.classes["dono"] if noun.tokens[0] is not None]
    objects = [text(lexicon.agreeing["un"][noun.genders[0]][0], noun.tokens[0]) for noun in things]
    assert (words.names, words.places, words.objects) == (names, places, objects)
    assert words.templates == default_words("it").templates and words.language == "it"


@pytest.mark.parametrize("language", ["it", "en"])
def test_default_words_suit_their_language(language):
    words = default_words(language)
    for template in words.templates:
        assert not template.startswith("{") and template.endswith({"it": " a", "en": " to"}[language])
    names = [name for names in words.names.values() for name in names]
    assert len(names) == len(set(names)) and min(map(len, words.names.values())) >= 20
    if language == "it":
        assert not any(name[0] in "AEIOU" for name in names)


def test_english_comes_from_the_same_code(tokenizer):
    pair = ioi_pairs(1, tokenizer, default_words("en"), n_name_tokens=None)[0]
    assert f" {pair.subject} " in pair.base and pair.base.endswith(" to")


def test_names_of_several_tokens_are_as_many_within_a_pair(tokenizer):
    for wanted in (None, 3):
        for pair in ioi_pairs(20, tokenizer, default_words("it"), n_name_tokens=wanted):
            three = tokens_inside(tokenizer, (pair.io, pair.subject, pair.new_io))
            assert (
                len({len(tokens) for tokens in three}) == 1 == len({len(t) for t in three if wanted in (None, len(t))})
            )
            assert len({tokens[0] for tokens in three}) == 3


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({}, {"n_name_tokens": 9}, "names by number of tokens: .* of 1: Marco.*: name_tokens=N or name_tokens=any"),
        ({"names": {"Masc": ("Luca", "Marco")}}, {}, "needs 3 names of one gender"),
        ({"names": {}}, {}, "number of tokens: none"),
        ({}, {"n": 0}, "n is 0; it must be 1 or more"),
        ({"templates": ("{s} ha visto {a} con {b}, «{a}» a",)}, {}, "differ in more than the tokens of a name"),
    ],
)
def test_bad_lists_are_refused_in_one_line(tokenizer, change, options, said):
    with pytest.raises(UsageError, match=said) as error:
        words = replace(default_words("it"), **change)
        ioi_pairs(**{"n": 3, "tokenizer": tokenizer, "words": words, **options})
    assert "\n" not in str(error.value)


def test_another_language_is_refused():
    with pytest.raises(UsageError, match="language .zulu. is unknown. Valid: .*it, "):
        default_words("zulu")  # pyright: ignore[reportArgumentType]


def test_batches_give_the_log_probabilities_of_whole_texts_one_at_a_time(mini, pairs):
    def alone(text):
        tokens = mini.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            log_p = mini(tokens).logits[0].log_softmax(-1)
        return log_p[:-1].gather(1, tokens[0, 1:, None]).sum().item()

    items = [(f"{pair.base} {pair.io}", f"{pair.base} {pair.subject} poi", pair.order) for pair in pairs[:5]]
    items += [("Il libro è", "Le libro è", "early"), ("Il libro è nuovo", "Il libro è", "longer")]
    for item in items:
        found = score_choices(mini, mini.tokenizer, [item]).difference.value
        assert found == pytest.approx(alone(item[0]) - alone(item[1]), abs=1e-4)
    together = score_choices(mini, mini.tokenizer, items).difference.value
    each = [score_choices(mini, mini.tokenizer, [item]).difference.value for item in items]
    assert together == pytest.approx(sum(each) / len(each), abs=1e-4)


def test_the_embedded_model_does_the_task_in_both_orders(mini, pairs):
    found = check_able(ioi_score(mini, mini.tokenizer, pairs), "indirect object", "mini")
    assert found.accuracy.value >= 0.95 and found.difference.lo > 2 and set(found.by_kind) == {"ABBA", "BABA"}


def test_a_model_that_guesses_is_refused_with_its_accuracy():
    guesses = score(np.tile([1.0, -1.0], 50), ["ABBA", "BABA"] * 50)
    with pytest.raises(UsageError, match=r"tiny does not do the task \(indirect object\): 50.0% of 100 right") as error:
        check_able(guesses, "indirect object", "tiny")
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError):  # better than chance, but so few that it could be luck
        check_able(score(np.array([1.0, 1.0, -1.0]), ["ABBA"] * 3), "indirect object", "tiny")


def test_a_tie_is_not_right():
    assert score(np.array([0.0, 1.0]), ["a", "b"]).accuracy.value == 0.5


def test_words_follow_the_model():
    assert words_for("sae-italian-mini") is default_words("micro-italiano") and words_for(
        "minerva-1b"
    ) is default_words("it")
    assert words_for("sae-italian-mini", "en") is default_words("en")


@pytest.mark.shared
def test_a_model_of_real_italian_has_names_of_two_tokens_and_cannot_do_the_task(shared):
    name = str(shared / "models/ita-5m")
    tokenizer = load_tokenizer(name)
    with pytest.raises(UsageError, match="2 of 1: Pietro, Maria"):
        ioi_pairs(3, tokenizer)
    model = load_model(name)
    found = ioi_score(model, tokenizer, ioi_pairs(100, tokenizer, n_name_tokens=2))
    with pytest.raises(UsageError, match="does not do the task"):
        check_able(found, "indirect object", "ita-5m")
