"""Habits of real servers and models (faults L1 to L12): each is put right, named, or kept as a verdict, never the end."""

import contextlib
import json
import sqlite3
import time

import numpy as np
import pytest

from sae_italian.autointerp.llm.answers import Unusable, distributions, read_explanation, read_numbers
from sae_italian.autointerp.llm.askers import LLMExplainer, LLMJudge
from sae_italian.autointerp.llm.calls import Reply, Request, TokenLogprobs
from sae_italian.autointerp.llm.client import BudgetReached, EndpointError
from sae_italian.autointerp.store import Explanation, Store
from tests.autointerp.llm.conftest import a_latent, an_example, an_explanation
from tests.autointerp.llm.endpoint import FakeEndpoint

GOOD = '{"spiegazione": "verbi al futuro"}'
DRAFT = '{"spiegazione": "nomi"}'


def ask(client, n=1, **settings):
    questions = [Request(({"role": "user", "content": f"domanda {i}"},), "prova", 20, **settings) for i in range(n)]
    return client.ask(questions)


def one_by_one(client):
    judge = LLMJudge(client)
    judge.batch = 1
    return judge


def refusing(needle, message, answer=None, status=400):
    """An endpoint that refuses bodies in which `needle(body)` holds, with a server's own sentence."""

    class Refusing(FakeEndpoint):
        async def _respond(self, body, writer):
            if not needle(body):
                return await super()._respond(body, writer)
            self.requests.append(body)
            text = json.dumps({"error": {"message": message}}).encode()
            head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
            writer.write(head.encode() + text)
            await writer.drain()
            return True

    return Refusing(answer)


def raw(body, status="200 OK", headers=""):
    """An endpoint whose every answer is this body."""

    class Raw(FakeEndpoint):
        async def _respond(self, _, writer):
            self.requests.append(_)
            text = body if isinstance(body, bytes) else json.dumps(body).encode()
            head = (
                f"HTTP/1.1 {status}\r\n{headers}Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
            )
            writer.write(head.encode() + text)
            await writer.drain()
            return True

    return Raw()


def completion(content, usage=None, **choice):
    message = {"role": "assistant", "content": content}
    return {"choices": [{"index": 0, "finish_reason": "stop", "message": message, **choice}], "usage": usage}


# --- L1, L2, L10: reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f"{DRAFT} hmm</think>{GOOD}",
        f"<think time=1>{DRAFT}</think>\n{GOOD}",
        f"<Think>{DRAFT}</Think>{GOOD}",
        f"<thinking>{DRAFT}</thinking>{GOOD}",
        f"<reasoning>{DRAFT}</reasoning>```json\n{GOOD}\n```",
        f"[THINK]{DRAFT}[/THINK]{GOOD}",
        f"<think>a <think>{DRAFT}</think> b {DRAFT}</think>{GOOD}",
        f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{GOOD}<|return|>",
        f"analysis{DRAFT} no, meglio:assistantfinal{GOOD}",
        f"Prima idea: {DRAFT}. No: {GOOD}",
        f"{GOOD}<think>{DRAFT}",
        "{'spiegazione': 'verbi al futuro',}",
        '{"ragionamento": "lungo", "spiegazione": "verbi al futuro"}',
        f"[nota: {GOOD}",
    ],
)
def test_the_last_complete_answer_after_any_thinking_counts(text):
    assert read_explanation(Reply("ok", text)) == "verbi al futuro"
    numbers = text.replace(GOOD, '{"risposte": [1, 0, 1]}').replace(DRAFT, "[1, 1, 1]")
    if "verbi" not in numbers:
        assert read_numbers(Reply("ok", numbers), 3, 1)[0].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "text", [f"<think>{DRAFT}", f"<|channel|>analysis<|message|>{DRAFT}", "[1,1,1], no: {", "[THINK] x"]
)
def test_thinking_without_an_answer_stays_unreadable(text):
    with pytest.raises(Unusable):
        read_explanation(Reply("ok", text))


def test_quotes_inside_an_answer_are_kept():
    assert read_explanation(Reply("ok", r"{'spiegazione': 'l\'articolo'}")) == "l'articolo"
    assert (
        read_explanation(Reply("ok", '{"spiegazione": "l\'articolo «l\'» {e} \\"un\\""}'))
        == "l'articolo «l'» {e} \"un\""
    )


@pytest.mark.parametrize(
    "text", ["x" + "\n" * 16000, "[" * 16000, "{" * 8000 + "}" * 8000, "1." * 8000, "]}" * 8000, "'" * 16000]
)
def test_reading_takes_time_in_proportion_to_the_length(text):
    started = time.thread_time()
    for read in (read_explanation, lambda reply: read_numbers(reply, 3, 1)):
        with contextlib.suppress(Unusable):
            read(Reply("ok", text))
    assert time.thread_time() - started < 1.0


# --- L3, L4, L5, L7, L12: refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "message", "feature"),
    [
        ("max_tokens", "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "max_tokens"),
        ("temperature", "'temperature' does not support 0.0 with this model. Only the default (1) is.", "temperature"),
        ("seed", "Unrecognized request argument supplied: seed", "seed"),
    ],
)
def test_a_refused_parameter_is_left_out_once_and_for_all(client_of, parameter, message, feature):
    with refusing(lambda body: parameter in body, message) as endpoint, client_of(endpoint, concurrency=1) as client:
        assert all(reply.ok for reply in ask(client, 4))
        assert len(endpoint.requests) == 5 and message in client.missing[feature]
        assert endpoint.requests[-1].get("max_completion_tokens") == (20 if parameter == "max_tokens" else None)


def test_a_parameter_that_was_asked_for_and_is_refused_is_one_line(client_of):
    message = "Unsupported value: reasoning_effort 'max' is not supported"
    with refusing(lambda body: "reasoning_effort" in body, message) as endpoint:
        client, words = client_of(endpoint, reasoning_effort="max", concurrency=1), "reasoning_effort 'max' is not"
        with client, pytest.raises(EndpointError, match=f"refuses every question.*{words}"):
            ask(client, 40)
        assert len(endpoint.requests) < 10


def test_a_server_that_answers_500_to_a_schema_is_asked_once_without(client_of):
    endpoint = refusing(lambda body: "response_format" in body, "grammar compile error", status=500)
    with endpoint, client_of(endpoint, attempts=2, concurrency=1) as client:
        assert all(reply.ok for reply in ask(client, 3, schema={"type": "object"}))
        assert ["response_format" in body for body in endpoint.requests] == [True, True, False, False, False]


def test_what_was_refused_is_asked_again_when_the_server_is_mended(client_of, tmp_path):
    poison = lambda body: "numero 11 " in str(body) or "una pala" in str(body)  # noqa: E731
    examples = [an_example(text, marked=False) for text in ("il pane", "una pala", "due cani")]
    with refusing(poison, "policy") as endpoint, client_of(endpoint, concurrency=1) as client:
        ask(client)
        assert LLMExplainer(client).explain(a_latent())[0].status == "no answer"
        assert one_by_one(client).detect(an_explanation(), examples).said.tolist() == [0, -2, 0]
    with FakeEndpoint() as endpoint, client_of(endpoint) as client:
        assert LLMExplainer(client).explain(a_latent())[0].status == "ok"
        assert one_by_one(client).detect(an_explanation(), examples).said.tolist() == [0, 0, 0]
        assert len(endpoint.requests) == 2  # the rest is in the ledger


def test_a_latent_that_the_endpoint_failed_on_is_judged_again(tmp_path):
    def scored(said):
        row = (1, 5, "", "detection", "llm:m", "random", "balanced_accuracy", 0.9, None, None, 2, 2, 0)
        return [row], [], [(1, 5, "", "detection", "llm:m", i, 7, "", one, None) for i, one in enumerate(said)]

    with Store(tmp_path / "s", {}) as store:
        store.add_explanations([Explanation(5, "llm:m", "ok", "verbi", "", None)])
        store.add_scores(*scored([1, -2, -1]))
        assert store.scored("llm:m", "llm:m") == set()
        store.add_scores(*scored([1, 0, -1]))
        assert store.scored("llm:m", "llm:m") == {5}


def test_what_an_earlier_stranger_was_judged_by_gives_way_too(tmp_path):
    """A rerun that explains more latents gives a latent another stranger; the endpoint may have failed on the old one."""

    def of(explanation, control, said):
        row = (explanation, 5, control, "detection", "llm:m", "random", "balanced_accuracy", 0.9, None, None, 2, 2, 0)
        return (
            row,
            (explanation, 5, control, "llm:m", {}),
            (explanation, 5, control, "detection", "llm:m", 0, 7, "", said, None),
        )

    with Store(tmp_path / "s", {}) as store:
        store.add_explanations([Explanation(latent, "llm:m", "ok", "verbi", "", None) for latent in (5, 6, 7)])
        store.add_scores(*zip(of(1, "", 1), of(2, "shuffled", -2), strict=True))
        store.add_scores(*zip(of(1, "", 1), of(3, "shuffled", 0), strict=True))
        assert store.scored("llm:m", "llm:m") == {5}
        shuffled = store.connection.execute("SELECT explanation_id FROM score WHERE control = 'shuffled'").fetchall()
        assert shuffled == [(3,)]  # one control a latent, as every mean takes it


def test_the_servers_words_are_shown_when_200_holds_an_error(client_of):
    with (
        raw({"error": {"message": "il modello è in manutenzione", "code": 502}}) as endpoint,
        client_of(endpoint, attempts=2) as client,
        pytest.raises(EndpointError, match="il modello è in manutenzione"),
    ):
        ask(client)
    with raw({"id": "x", "choices": []}) as endpoint, client_of(endpoint, attempts=2) as client:
        with pytest.raises(EndpointError, match="no chat completion"):
            ask(client)
        assert len(endpoint.requests) == 2


def test_a_redirect_is_refused_and_its_target_named(client_of):
    with FakeEndpoint() as other:
        target = f"Location: {other.url}/chat/completions\r\n"
        with raw(b"", "307 Temporary Redirect", target) as endpoint:
            client = client_of(endpoint)
            with client, pytest.raises(EndpointError, match=f"sends on to {other.url}"):
                ask(client)
        assert other.requests == []


def test_half_a_letter_in_a_servers_words_is_no_end(client_of, tmp_path):
    with (
        refusing(lambda body: "domanda 1" in str(body), "vietato \ud83d qui") as endpoint,
        client_of(endpoint) as client,
    ):
        assert ask(client)[0].ok
        assert "vietato ? qui" in ask(client, 2)[1].status
    with sqlite3.connect(tmp_path / "store.sqlite") as ledger:  # the failure is kept too, with what it cost
        assert ledger.execute("SELECT count(*) FROM call WHERE status LIKE '%vietato ? qui'").fetchone() == (1,)


# --- L6: no room ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", None, "<think> vediamo", '{"spiegazione": "verb'])
def test_an_answer_cut_by_the_limit_is_named_and_more_room_is_an_option(client_of, content):
    with raw(completion(content, finish_reason="length")) as endpoint, client_of(endpoint) as client:
        (explanation,) = LLMExplainer(client).explain(a_latent())
        assert explanation.status == "no answer" and "max_output_tokens=N" in explanation.notes["problem"]
        assert len(endpoint.requests) == 1 and client.counts["cut"] == 1
    with FakeEndpoint() as endpoint, client_of(endpoint, max_output_tokens=4000) as client:
        assert LLMExplainer(client).explain(a_latent())[0].status == "ok"
        assert endpoint.requests[0]["max_tokens"] == 4000


# --- L8, L9: odd answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["[" * 1000, "[" * 1000 + "]" * 1000, f"[{'9' * 5000}]", '{"²": 1}', 7, {"a": 1}, [{"type": "text"}], "\ud800 [1]"],
    ids=range(8),
)
def test_an_odd_answer_is_booked_and_is_a_verdict(client_of, tmp_path, content):
    odd = {"content": [{"token": "1", "logprob": "molto", "top_logprobs": None}]}
    body = completion(content, usage={"prompt_tokens": "tanti", "completion_tokens": None}, logprobs=odd)
    with raw(body) as endpoint:
        for _ in range(2):
            with client_of(endpoint) as client:
                judge = one_by_one(client)
                assert judge.detect(an_explanation(), [an_example("la pera", marked=False)]).said.tolist() in (
                    [-1],
                    [1],
                )
                assert judge.simulate(an_explanation(), [an_example("la pera e", {"pera": 1.0})]) == [None]
                assert LLMExplainer(client).explain(a_latent())[0].status in ("ok", "failed")
        assert client.counts["asked"] == 0 and client.counts["from ledger"] > 0  # nothing was paid twice


def test_a_list_of_parts_is_the_text_in_them(client_of):
    parts = [{"type": "text", "text": '{"spiegazione": '}, {"type": "text", "text": '"verbi al futuro"}'}]
    with raw(completion(parts)) as endpoint, client_of(endpoint) as client:
        assert read_explanation(ask(client)[0]) == "verbi al futuro"


def test_log_probabilities_that_are_none_give_no_distribution():
    def token(text, logprob=0.0, **top):
        return TokenLogprobs(token=text, logprob=logprob, top=top)

    assert distributions([token("["), token("1", float("-inf")), token("]")], [1], 1) is None
    (weights,) = distributions([token("[1]", 800.0, **{"[0]": -1.0})], [1], 1)
    assert np.isfinite(weights).all()


@pytest.mark.parametrize(
    "usage",
    [{"prompt_tokens": -9_000_000, "completion_tokens": 1}, {"prompt_tokens": 1, "completion_tokens": 10**9}, "7"],
)
def test_a_usage_that_cannot_be_is_unknown_and_bounded_by_the_estimate(client_of, prices, tmp_path, usage):
    with raw(completion("ok", usage)) as endpoint:
        settings = {"prices": prices, "concurrency": 1, "counter": lambda messages: 100 * len(messages)}
        client = client_of(endpoint, max_usd=1.0, **settings)
        with client, pytest.raises(BudgetReached):
            ask(client, 40)
        assert client.budget.spent == 0 and 0.5 < client.budget.uncertain <= 1.0
    with sqlite3.connect(tmp_path / "store.sqlite") as connection:
        rows = connection.execute("SELECT usd, usd_uncertain FROM call").fetchall()
    assert len(rows) == len(endpoint.requests) and all(usd is None and least > 0 for usd, least in rows)
