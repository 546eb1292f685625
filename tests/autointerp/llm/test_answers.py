"""Readers of answers: what nearly kept to the form is read, what did not is refused and never guessed."""

import contextlib
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_italian.autointerp.llm.answers import Unusable, distributions, read_explanation, read_numbers
from sae_italian.autointerp.llm.calls import Reply, TokenLogprobs


def reply(text, finish="stop"):
    return Reply("ok", text, finish)


@pytest.mark.parametrize(
    "text",
    [
        '{"risposte": [1, 0, 1]}',
        '```json\n{"risposte": [1, 0, 1]}\n```',
        "Ecco: {'risposte': [1, 0, 1,],}",
        "[1, 0, 1]",
        '{"risposte": ["sì", "no", "Sì."]}',
        '{"risposte": [true, false, true]}',
        '{"1": 1, "2": 0, "3": 1}',
        '{"risposte": [{"1": 1}, {"2": 0}, {"3": 1}]}',
        "1. sì\n2. no\n3. sì",
        '<think>[0, 0, 0]? no</think>{"answers": [1.0, 0, 1]}',
    ],
)
def test_yes_and_no_are_read_from_many_forms(text):
    assert read_numbers(reply(text), 3, 1)[0].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"risposte": [1, 0]}', "count"),
        ('{"risposte": [1, 0, 1, 1]}', "count"),
        ('{"risposte": [1, 0, 2]}', "value"),
        ('{"risposte": [1, 0, "forse"]}', "value"),
        ('{"risposte": [1, 0, null]}', "value"),
        ('{"risposte": [{"brano": 1, "risposta": "no"}, {"brano": 0, "risposta": "no"}, {"brano": 1}]}', "value"),
        ('{"risposte": [1, 0', "json"),
        ("Mi dispiace, non posso.", "json"),
        ("", "empty"),
        ("<think>1, 0, 1", "empty"),
        ("1. sì\n3. no\n4. no", "json"),
    ],
)
def test_what_is_no_answer_is_refused_with_its_reason(text, problem):
    with pytest.raises(Unusable) as error:
        read_numbers(reply(text), 3, 1)
    assert error.value.name == problem


@given(st.lists(st.integers(0, 10), min_size=1, max_size=40), st.sampled_from(["valori", "values", "x"]))
def test_any_list_of_numbers_survives(values, key):
    assert read_numbers(reply(json.dumps({key: values})), len(values), 10)[0].tolist() == values


@given(st.text(max_size=60))
def test_no_text_makes_the_readers_fail_otherwise(text):
    for read in (lambda: read_numbers(reply(text), 2, 10), lambda: read_explanation(reply(text))):
        with contextlib.suppress(Unusable):
            read()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"spiegazione": "verbi al futuro"}', "verbi al futuro"),
        ('{"spiegazione": "verbi\\n al futuro "}', "verbi al futuro"),
        ("Spiegazione: verbi al futuro", "verbi al futuro"),
        ("**Explanation:** verbs", "verbs"),
        ("verbi al futuro", "verbi al futuro"),
        ('{"ragionamento": 3, "explanation": "la parola «uno»"}', "la parola «uno»"),
    ],
)
def test_explanations_are_read_from_many_forms(text, expected):
    assert read_explanation(reply(text)) == expected


@pytest.mark.parametrize(
    "text", ['{"spiegazione": "ver', '{"spiegazione": ""}', '{"a": "x", "b": "y"}', "[1]", "", "x" * 700]
)
def test_broken_explanations_are_refused(text):
    with pytest.raises(Unusable):
        read_explanation(reply(text))
    with pytest.raises(Unusable):
        read_explanation(reply("verbi al fut", finish="length"))


def tokens_of(*pieces):
    return [
        TokenLogprobs(token=text, logprob=math.log(top.get(text, 0.5)), top={t: math.log(p) for t, p in top.items()})
        for text, top in pieces
    ]


def test_the_expected_value_comes_from_the_token_of_each_number():
    tokens = tokens_of(
        ('{"valori', {}),
        ('": [', {}),
        ("0", {"0": 0.8, "5": 0.1, "x": 0.1}),
        (", ", {}),
        ("10", {"10": 0.5, "8": 0.25, " 6": 0.25}),
        ("]}", {}),
    )
    first, second = distributions(tokens, [0, 10], 10)
    assert first @ np.arange(11) == pytest.approx(5 * 0.1 / 0.9)
    assert second @ np.arange(11) == pytest.approx(0.5 * 10 + 0.25 * 8 + 0.25 * 6)


def test_numbers_inside_a_token_with_other_signs_are_found():
    tokens = tokens_of((" [1", {" [1": 0.7, " [0": 0.3}), (",", {}), (" 0]", {" 0]": 0.6, " 1]": 0.4}))
    assert [round(weights[1], 6) for weights in distributions(tokens, [1, 0], 1)] == [0.7, 0.4]
    split = tokens_of(("[", {}), ("1", {"1": 0.9, "0": 0.1}), ("0", {"0": 1.0}), ("]", {}))  # a 10 of two tokens
    assert distributions(split, [10], 10)[0] @ np.arange(11) == pytest.approx(9.0)


def test_numbers_that_do_not_stand_where_they_should_give_no_distribution():
    tokens = tokens_of(("1. ", {}), ("sì", {}))
    assert distributions(tokens, [1], 1) is None
    assert distributions(tokens_of(("[1, 1]", {})), [1, 0], 1) is None
