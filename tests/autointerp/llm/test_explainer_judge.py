"""The LLM explainer and judge: what they ask, what they make of any answer, and that failures are rows."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from sae_italian.autointerp.llm.answers import Prompts
from sae_italian.autointerp.llm.askers import LLMExplainer, LLMJudge, chosen, other_language
from sae_italian.base.errors import UsageError
from tests.autointerp.llm.conftest import MODEL, a_latent, an_example, an_explanation
from tests.autointerp.llm.endpoint import FakeEndpoint, digits_with_logprobs, passages, stand_in


def by_letter(body):
    """A judge that follows «parole che iniziano con p»: 1 where a word (a marked one, where there are marks) does."""
    question = body["messages"][-1]["content"]
    lines = re.findall(r"^\d+\. (.*)$", question, flags=re.MULTILINE)
    if "Token (" in question:
        return json.dumps({"valori": [10 * line.strip("«»").startswith("p") for line in lines]})
    words = [re.findall(r"<<(.*?)>>", line) or line.split() for line in lines]
    return json.dumps({"risposte": [int(any(word.startswith("p") for word in group)) for group in words]})


EXAMPLES = [
    an_example(t, marked=False) for t in ("il pane", "la casa", "due pere", "un gatto", "una pala", "tre cani", "pio")
]
TRUTH = [1, 0, 1, 0, 1, 0, 1]


# --- explainer -----------------------------------------------------------------------------------------------------------


def test_an_explanation_end_to_end(client_of):
    with FakeEndpoint() as endpoint, client_of(endpoint) as client:
        found = LLMExplainer(client).explain(a_latent())
        prompt = endpoint.requests[0]["messages"]
    (explanation,) = found
    assert explanation[:5] == (
        3,
        f"llm:{MODEL}:it1",
        "ok",
        "parole che iniziano con la lettera p, in qualunque posizione",
        "",
    )
    assert (explanation.rule, explanation.kind, explanation.notes) == (None, "llm", {"examples": 12})
    assert explanation.prompt == f"it1-{Prompts('it').hash}"
    assert "1. la <<pera>> numero 11 è rossa\n   Forza: «pera» 10" in prompt[-1]["content"]
    assert "12. la <<pera>> numero 0 è rossa\n   Forza: «pera» 1" in prompt[-1]["content"]
    assert "rossa»" not in prompt[-1]["content"]  # what it promotes is not asked for


def test_the_constant_part_comes_first_and_promoted_tokens_apart(client_of):
    with FakeEndpoint() as endpoint, client_of(endpoint, promoted=True) as client:
        LLMExplainer(client).explain(a_latent())
        LLMExplainer(client).explain(a_latent(8, latent=4))
        one, two = (body["messages"] for body in endpoint.requests)
    assert one[:-1] == two[:-1] and one[-1] != two[-1] and len(one) == 6
    assert one[-1]["content"].endswith("Token resi più probabili subito dopo: «rossa», «verde»")


def test_english_prompts_and_the_other_field(client_of):
    answer = json.dumps({"explanation": "words that start with the letter p, wherever they are"})
    with FakeEndpoint(lambda body: answer) as endpoint, client_of(endpoint, language="en") as client:
        (explanation,) = LLMExplainer(client).explain(a_latent())
        assert "Passages:" in endpoint.requests[0]["messages"][-1]["content"]
    assert (
        explanation.text_it == "" and explanation.text_en.startswith("words") and explanation.explainer.endswith(":en1")
    )
    assert explanation.text("it") == explanation.text_en


def test_an_explanation_in_the_wrong_language_is_flagged(client_of):
    answer = json.dumps({"spiegazione": "words at the beginning of a sentence, mostly verbs in the future"})
    with FakeEndpoint(lambda body: answer) as endpoint, client_of(endpoint) as client:
        (explanation,) = LLMExplainer(client).explain(a_latent())
    assert explanation.status == "ok" and explanation.notes["wrong_language"] == "en"
    assert other_language("la parola che segue subito l'articolo «the house of the rising sun»", "it") is None
    assert other_language("su «che»", "it") is None  # too short to tell


def test_a_broken_answer_is_repaired_once(client_of):
    def answer(body):
        return stand_in(body) if "non si può usare" in body["messages"][-1]["content"] else '{"spiegazione": '

    with FakeEndpoint(answer) as endpoint, client_of(endpoint) as client:
        (explanation,) = LLMExplainer(client).explain(a_latent())
        assert explanation.status == "ok" and explanation.notes["repaired"] == "json"
        sent = endpoint.requests[1]["messages"]
        assert (
            sent[-2]["content"] == '{"spiegazione":' and 'questa forma: {"spiegazione": "..."}' in sent[-1]["content"]
        )


@pytest.mark.parametrize(
    ("answer", "calls", "problem"),
    [
        ("{}", 2, "the form asked for cannot be found in it"),
        ({"role": "assistant", "content": None, "refusal": "I cannot help with that"}, 1, "refused: I cannot help"),
    ],
)
def test_what_stays_unusable_is_a_failed_row(client_of, answer, calls, problem):
    with FakeEndpoint(lambda body: answer) as endpoint, client_of(endpoint) as client:
        (explanation,) = LLMExplainer(client).explain(a_latent())
        assert len(endpoint.requests) == calls
    assert explanation.status == "failed" and explanation.notes["problem"].startswith(problem)


def test_a_question_that_gets_no_answer_is_asked_again_by_a_rerun(client_of):
    with (
        FakeEndpoint(fault=lambda n, body: "500" if n else None) as endpoint,
        client_of(endpoint, attempts=2) as client,
    ):
        assert LLMExplainer(client).explain(a_latent(11))[0].status == "ok"
        assert LLMExplainer(client).explain(a_latent())[0].status == "no answer"


def test_examples_are_dropped_from_the_end_until_the_prompt_fits(client_of):
    def counter(messages):
        return sum(len(message["content"].split()) + 8 for message in messages)

    with FakeEndpoint() as endpoint:
        explainer = LLMExplainer(client_of(endpoint, counter=counter))
        whole = counter(explainer.request(a_latent(), a_latent().train).messages)
        with client_of(endpoint, counter=counter, context_tokens=whole + 160 - 20) as client:
            (explanation,) = LLMExplainer(client).explain(a_latent())
        assert explanation.notes == {"examples": 10, "examples_dropped": 2}
        question = endpoint.requests[0]["messages"][-1]["content"]
        assert passages(question) == 10 and "numero 11" in question and "numero 1 " not in question
        with (
            client_of(endpoint, counter=counter, context_tokens=300) as client,
            pytest.raises(UsageError, match="even 3 examples do not fit into the context of prova \\(300 tokens\\)"),
        ):
            LLMExplainer(client).explain(a_latent())


def test_a_server_that_says_too_long_is_sent_fewer(client_of):
    def fault(n, body):
        return "413" if passages(body["messages"][-1]["content"]) > 4 else None

    with FakeEndpoint(fault=fault) as endpoint, client_of(endpoint) as client:
        assert LLMExplainer(client).explain(a_latent())[0].notes == {"examples": 3, "examples_dropped": 9}
        assert [passages(body["messages"][-1]["content"]) for body in endpoint.requests] == [12, 6, 3]
        endpoint.fault = lambda n, body: "413"
        with pytest.raises(UsageError, match="even 3 examples do not fit"):
            LLMExplainer(client).explain(a_latent(8, latent=5))


def test_top_and_decile_draws():
    train = [an_example(f"pera {i}", {"pera": 1.0 + i}, decile=i // 4) for i in range(40)]
    top = chosen(train, "top", 10)
    spread = chosen(train, "deciles", 10)
    assert [e.activations.max() for e in top] == list(range(40, 30, -1))
    assert sorted(e.decile for e in spread) == list(range(10)) and spread[0].activations.max() == 40
    assert chosen([an_example("x y")], "top", 5) == []


# --- judge ---------------------------------------------------------------------------------------------------------------


def test_detection_in_batches_mixes_the_order_and_puts_it_right(client_of):
    with FakeEndpoint(by_letter) as endpoint, client_of(endpoint) as client:
        verdicts = LLMJudge(client).detect(an_explanation(), EXAMPLES)
        assert verdicts.said.tolist() == TRUTH and verdicts.probability is None
        assert sorted(passages(body["messages"][-1]["content"]) for body in endpoint.requests) == [2, 5]
        assert "<<" not in endpoint.requests[0]["messages"][-1]["content"]
        assert "Spiegazione: parole che iniziano con p\n" in endpoint.requests[0]["messages"][-1]["content"]


def test_fuzzing_asks_about_the_marks(client_of):
    examples = [replace(e, marks=np.arange(len(e.tokens)) == len(e.tokens) - 1) for e in EXAMPLES]
    wrong = [replace(e, marks=np.arange(len(e.tokens)) == 0) for e in EXAMPLES[:6]]
    with FakeEndpoint(by_letter) as endpoint, client_of(endpoint) as client:
        assert LLMJudge(client).detect(an_explanation(), [*examples, *wrong]).said.tolist() == TRUTH + [0] * 6
        assert "le parole segnate" in endpoint.requests[0]["messages"][0]["content"]


def test_probabilities_come_from_logprobs_where_there_are(client_of):
    probabilities = digits_with_logprobs(lambda i: {"1": 0.9, "0": 0.1} if i == 0 else {"1": 0.25, "0": 0.75})
    with FakeEndpoint(by_letter, logprobs=probabilities) as endpoint, client_of(endpoint) as client:
        verdicts = LLMJudge(client).detect(an_explanation(), EXAMPLES)
    assert sorted(verdicts.probability.round(6).tolist()) == [0.25] * 5 + [0.9] * 2


def test_where_an_answer_has_no_probabilities_there_are_none(client_of):
    """One of two batches in words: the rest counted as surer than any number, and moved AUROC."""
    spread = digits_with_logprobs(lambda i: {"1": 0.9, "0": 0.1})

    def in_words(body):
        return by_letter(body) if passages(body["messages"][-1]["content"]) == 5 else '{"risposte": ["no", "no"]}'

    with FakeEndpoint(in_words, logprobs=spread) as endpoint, client_of(endpoint) as client:
        verdicts = LLMJudge(client).detect(an_explanation(), EXAMPLES)
    assert (verdicts.said >= 0).all() and verdicts.probability is None


def test_a_wrong_count_is_repaired_then_asked_one_by_one_and_nothing_is_guessed(client_of):
    def answer(body):
        question = body["messages"][-1]["content"]
        return (
            by_letter(body)
            if passages(question) == 1 and "gatto" not in question
            else '{"risposte": [1, 1, 1, 1, 1, 1]}'
        )

    with FakeEndpoint(answer) as endpoint, client_of(endpoint) as client:
        verdicts = LLMJudge(client).detect(an_explanation(), EXAMPLES)
        assert verdicts.said.tolist() == [1, 0, 1, -1, 1, 0, 1]
        # two batches and their repairs, seven alone, and one more repair
        assert len(endpoint.requests) == 2 + 2 + 7 + 1
        repair = next(body for body in endpoint.requests if len(body["messages"]) == 8)
        assert "i numeri sono 6, ne servono" in repair["messages"][-1]["content"]


def test_a_refusal_is_no_verdict(client_of):
    refusal = {"role": "assistant", "content": None, "refusal": "no"}
    with FakeEndpoint(lambda body: refusal) as endpoint, client_of(endpoint) as client:
        assert LLMJudge(client).detect(an_explanation(), EXAMPLES[:3]).said.tolist() == [-1, -1, -1]
        assert LLMJudge(client).simulate(an_explanation(), EXAMPLES[:1]) == [None]


def test_simulation_from_numbers_and_from_logprobs(client_of):
    examples = [an_example("il pane e la pera"), an_example("nulla")]
    with FakeEndpoint(by_letter) as endpoint, client_of(endpoint) as client:
        assert [s.tolist() for s in LLMJudge(client).simulate(an_explanation(), examples)] == [[0, 10, 0, 0, 10], [0]]
        asked = [body["messages"][-1]["content"] for body in endpoint.requests]  # both at once, in either order
        assert sum("Token (5):\n1. «il»\n2. «pane»" in question for question in asked) == 1
        assert client.missing == {"logprobs": "the answers carry none"}
    spread = digits_with_logprobs(lambda i: {"10": 0.5, "0": 0.3, "5": 0.2})
    with FakeEndpoint(by_letter, logprobs=spread) as endpoint, client_of(endpoint, "other.sqlite") as client:
        assert LLMJudge(client).simulate(an_explanation(), examples[:1])[0] == pytest.approx([6.0] * 5)


def test_explainer_and_judge_say_what_they_depend_on(client_of):
    one, top, english = (client_of("http://x/v1", **more) for more in ({}, {"shown": "top"}, {"language": "en"}))
    assert LLMExplainer(one).settings["prompt"] == LLMJudge(one).settings["prompt"]
    assert LLMExplainer(top).settings != LLMExplainer(one).settings and LLMJudge(top).settings == LLMJudge(one).settings
    assert LLMJudge(english).name == f"llm:{MODEL}:en1" != LLMJudge(one).name


@pytest.mark.parametrize("language", ["it", "en"])
def test_the_worked_examples_keep_to_the_form_they_teach(language):
    """Every answer in the prompts is readable, and as long as its question."""
    prompts = Prompts(language)
    for task in ("detection", "fuzzing", "simulation"):
        key = prompts.values_key if task == "simulation" else prompts.list_key
        for shot in prompts._texts[task]["shots"]:
            assert len(json.loads(shot["assistant"])[key]) == passages(shot["user"])
    for shot in prompts._texts["explain"]["shots"]:
        assert isinstance(json.loads(shot["assistant"])[prompts.answer_key], str)
    assert (
        prompts.judge("detection", "{examples} e {n}", [an_example("{explanation} qui")])[-1]["content"].count("{") == 3
    )


def test_a_judge_that_answers_by_place_alone_is_at_chance():
    """A real base model did: one order for all latents gave all of them the same 0.40, a figure below chance."""
    judge = LLMJudge.__new__(LLMJudge)
    judge.config = SimpleNamespace(language="it")
    judge.prompts = SimpleNamespace(judge=lambda question, text, own: own, list_key="")
    by_place = np.array([0, 1, 0, 0, 1])
    judge._numbers = lambda asked, *_: [SimpleNamespace(value=(by_place[:n], None), again=False) for _, n in asked]
    draw, truth, found = np.random.default_rng(1), np.arange(20) < 10, []
    explanation = SimpleNamespace(text=lambda language: "")
    for _ in range(200):
        examples = [SimpleNamespace(text="a" * int(n), marks=None) for n in draw.integers(80, 160, 20)]
        said = judge.detect(explanation, examples).said
        assert said.tolist() == judge.detect(explanation, examples).said.tolist(), "the same for the same examples"
        found.append((said[truth].mean() + 1 - said[~truth].mean()) / 2)
    assert np.std(found) > 0.05 and abs(np.mean(found) - 0.5) < 0.03
