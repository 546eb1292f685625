"""The client against an endpoint that fails in every way: no answer is lost, none is paid twice, no key is written."""

import itertools
import json
import logging
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from sae_italian.autointerp.llm import LLMOptions, LLMSettings
from sae_italian.autointerp.llm.calls import Account, Request, price_of
from sae_italian.autointerp.llm.client import Budget, BudgetReached, EndpointError
from sae_italian.autointerp.store import Store
from sae_italian.base.errors import UsageError
from tests.autointerp.explainita.test_explainita import jsonl_of
from tests.autointerp.explainita.test_predict import marked_row
from tests.autointerp.llm.conftest import MODEL
from tests.autointerp.llm.endpoint import FAULTS, FakeEndpoint


def requests_of(n, **settings):
    return [Request(({"role": "user", "content": f"domanda {i}"},), "prova", 20, **settings) for i in range(n)]


def echo(body):
    return f"risposta a {body['messages'][-1]['content']}"


def rows(path, query):
    with sqlite3.connect(path) as connection:
        return connection.execute(query).fetchall()


def test_answers_come_back_in_order_and_a_rerun_asks_nothing(client_of, tmp_path):
    questions = requests_of(30)
    with FakeEndpoint(echo) as endpoint:
        with client_of(endpoint) as client:
            replies = client.ask(questions)
            assert [reply.text for reply in replies] == [f"risposta a domanda {i}" for i in range(30)]
        with client_of(endpoint) as client:
            again = client.ask(questions)
            assert {name: n for name, n in client.counts.items() if n} == {"from ledger": 30}
        assert [reply.text for reply in again] == [reply.text for reply in replies]
        assert len(endpoint.requests) == 30
    with FakeEndpoint(echo) as elsewhere, client_of(elsewhere) as client:  # the endpoint is no part of the key
        client.ask(questions)
        assert elsewhere.requests == []
    with FakeEndpoint(echo) as endpoint, client_of(endpoint, llm_model="altro") as client:  # the model is
        client.ask(questions[:2])
        assert len(endpoint.requests) == 2


def test_equal_questions_are_asked_once_even_at_once(client_of):
    with FakeEndpoint(echo, latency=0.05) as endpoint, client_of(endpoint) as client:
        question = requests_of(1)[0]
        threads = [threading.Thread(target=client.ask, args=([question] * 5,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(endpoint.requests) == 1


@pytest.mark.parametrize("fault", [*FAULTS[:4], FAULTS[5], "503", "408"])
def test_a_passing_fault_costs_a_retry_and_nothing_else(client_of, fault, tmp_path):
    with FakeEndpoint(echo, lambda n, body: fault if n < 2 else None) as endpoint:
        with client_of(endpoint, concurrency=1) as client:
            assert [reply.text for reply in client.ask(requests_of(2))] == [
                "risposta a domanda 0",
                "risposta a domanda 1",
            ]
        assert len(endpoint.requests) == 4
    counted = rows(
        tmp_path / "store.sqlite", "SELECT attempts, status, tokens_in, tokens_out FROM call ORDER BY attempts"
    )
    assert sum(attempts for attempts, *_ in counted) == 4
    assert [row[1:] for row in counted] == [("ok", 100, 10)] * 2


def test_a_slow_answer_is_given_up_and_asked_again(client_of):
    with (
        FakeEndpoint(echo, lambda n, body: "slow 30" if n == 0 else None) as endpoint,
        client_of(endpoint, timeout=1.0) as client,
    ):
        started = time.monotonic()
        assert client.ask(requests_of(1))[0].ok
        assert time.monotonic() - started < 25 and client.counts["retries"] == 1


def test_as_long_as_a_retry_after_says_is_waited(client_of):
    arrived = []

    def fault(n, body):
        arrived.append(time.monotonic())
        return "429" if n == 0 else None

    with FakeEndpoint(echo, fault, retry_after="1") as endpoint, client_of(endpoint, concurrency=1) as client:
        assert all(reply.ok for reply in client.ask(requests_of(1)))
        assert arrived[1] - arrived[0] >= 0.99


def test_a_wait_of_an_hour_stops_the_run_instead(client_of):
    with FakeEndpoint(echo, lambda n, body: "429", retry_after="3600") as endpoint, client_of(endpoint) as client:
        error = pytest.raises(EndpointError, client.ask, requests_of(4))
        assert error.match("asks to wait 3600 s")


def test_one_question_that_always_fails_is_a_row_and_not_the_end(client_of, tmp_path):
    def poison(n, body):
        return "500" if "domanda 7" in str(body) else None

    with FakeEndpoint(echo, poison) as endpoint:
        with client_of(endpoint, attempts=3, concurrency=2) as client:
            replies = client.ask(requests_of(20))
            assert [reply.status for reply in replies].count("ok") == 19
            assert replies[7].status.startswith("no answer: HTTP 500") and client.counts["failed"] == 1
        assert rows(tmp_path / "store.sqlite", "SELECT count(*), sum(status = 'ok'), max(attempts) FROM call") == [
            (20, 19, 3)
        ]
        endpoint.fault = lambda n, body: None
        with client_of(endpoint) as client:
            assert client.ask(requests_of(20))[7].ok and client.counts["asked"] == 1
    assert rows(tmp_path / "store.sqlite", "SELECT count(*), sum(status = 'ok'), max(attempts) FROM call") == [
        (20, 20, 4)
    ]


def test_an_endpoint_that_is_down_stops_the_run_in_one_line(client_of, tmp_path):
    with FakeEndpoint(echo) as endpoint:
        url = endpoint.url
    with (
        client_of(url) as client,
        pytest.raises(EndpointError, match="http.*does not answer: 3 attempts.*Connect.*or give another --endpoint"),
    ):
        client.ask(requests_of(50))
    with FakeEndpoint(echo, lambda n, body: "500" if n >= 10 else None) as endpoint:
        with client_of(endpoint, "two.sqlite", attempts=2, concurrency=2) as client:
            with pytest.raises(EndpointError, match="does not answer: 2 attempts each at 3 questions"):
                client.ask(requests_of(200))
            assert len(endpoint.requests) < 30  # nothing more was sent
        endpoint.fault = lambda n, body: None
        before = endpoint.served
        with client_of(endpoint, "two.sqlite") as client:
            assert all(reply.ok for reply in client.ask(requests_of(200)))
        assert endpoint.served == 200 and before == 10


@pytest.mark.parametrize(
    ("status", "words"), [("401", "key"), ("403", "key"), ("404", "no such model"), ("402", "paid")]
)
def test_what_no_retry_mends_stops_at_once(client_of, status, words):
    with FakeEndpoint(echo, lambda n, body: status) as endpoint, client_of(endpoint, concurrency=1) as client:
        with pytest.raises(EndpointError, match=words):
            client.ask(requests_of(5))
        assert len(endpoint.requests) == 1


# --- what a server does not take -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["response_format", "logprobs"])
def test_a_server_that_refuses_schemas_or_logprobs_is_asked_without(client_of, name, tmp_path):
    questions = requests_of(6, schema={"type": "object"}, logprobs=True)
    with FakeEndpoint(echo, refuse=(name,)) as endpoint, client_of(endpoint, concurrency=1) as client:
        assert all(reply.ok for reply in client.ask(questions))
        assert len(endpoint.requests) == 7  # noticed once
        feature = "schema" if name == "response_format" else name
        assert name in client.missing[feature]
        with Store(tmp_path / "store.sqlite", {}) as store:  # at once: whoever is killed here need not ask again
            assert set(store.notes()) == {f"endpoint without {one}" for one in client.missing}


def test_a_server_that_just_gives_no_logprobs_is_noticed_once(client_of, tmp_path):
    questions = requests_of(4, logprobs=True)
    with FakeEndpoint(echo) as endpoint, client_of(endpoint, concurrency=1) as client:
        client.ask(questions)
        assert ["logprobs" in body for body in endpoint.requests] == [True, False, False, False]
        assert client.missing == {"logprobs": "the answers carry none"}
        with Store(tmp_path / "store.sqlite", {}) as store:
            assert store.notes() == {"endpoint without logprobs": f"{MODEL}: the answers carry none"}
        with client_of(endpoint) as rerun:  # and the answers without them are not asked again
            rerun.ask(questions)
            assert rerun.counts["asked"] == 0


def test_a_request_that_is_refused_anyway_takes_no_feature_with_it(client_of, tmp_path):
    def fault(n, body):
        return "400" if "domanda 1" in str(body) else None

    with FakeEndpoint(echo, fault) as endpoint, client_of(endpoint, concurrency=1) as client:
        replies = client.ask(requests_of(3, schema={"type": "object"}))
        assert [reply.status.split(":")[0] for reply in replies] == ["ok", "rejected", "ok"]
        assert "response_format" in endpoint.requests[-1] and "schema" not in client.missing
        with Store(tmp_path / "store.sqlite", {}) as store:
            assert store.notes() == {}


def test_the_schema_reaches_the_server_in_openai_s_form(client_of):
    schema = {"type": "object", "properties": {"spiegazione": {"type": "string"}}}
    with FakeEndpoint(echo) as endpoint, client_of(endpoint) as client:
        client.ask(requests_of(1, schema=schema))
        sent = endpoint.requests[0]
    assert sent["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }
    assert (sent["model"], sent["temperature"], sent["seed"], sent["max_tokens"]) == (MODEL, 0.0, 0, 20)


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 8 tokens",
        "the request exceeds the available context size. try increasing the context size",  # llama.cpp
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8. Given: 9 `inputs` tokens",  # TGI
        "prompt is too long: 9 tokens > 8 maximum",
    ],
)
def test_a_prompt_too_long_is_told_apart(client_of, said):
    def answer(body):
        raise AssertionError("never answered")

    class Short(FakeEndpoint):
        async def _respond(self, body, writer):
            text = json.dumps({"error": {"message": said}}).encode()
            writer.write(b"HTTP/1.1 400 X\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
            await writer.drain()
            return True

    with Short(answer) as endpoint, client_of(endpoint) as client:
        assert client.ask(requests_of(1, schema={"type": "object"}))[0].status.startswith("prompt too long")
        assert client.missing == {}


# --- concurrency, budget, kill -------------------------------------------------------------------------------------------


def test_concurrency_is_bounded_and_used(client_of):
    with FakeEndpoint(echo, latency=0.02) as endpoint, client_of(endpoint, concurrency=7) as client:
        client.ask(requests_of(70))
        assert endpoint.most_at_once == 7


def test_the_budget_is_never_passed_and_what_was_paid_is_kept(client_of, prices, tmp_path):
    """A call is 100 in and 10 out: 0.12 dollars here. The limit falls amid a batch."""
    settings = {"prices": prices, "counter": lambda messages: 100 * len(messages), "concurrency": 4}
    with FakeEndpoint(echo, latency=0.01) as endpoint:
        with client_of(endpoint, max_usd=1.0, **settings) as client:
            with pytest.raises(BudgetReached, match="of the \\$1 of --max-usd are gone.*run again with a higher"):
                client.ask(requests_of(40))
            spent = client.budget.spent
        assert 0.8 < spent <= 1.0 and len(endpoint.requests) == pytest.approx(spent / 0.12)
        paid = len(endpoint.requests)
        with client_of(endpoint, max_usd=100.0, **settings) as client:
            assert all(reply.ok for reply in client.ask(requests_of(40)))
            assert client.counts["from ledger"] == paid
        assert len(endpoint.requests) == 40
    with Store(tmp_path / "store.sqlite", {}) as store:
        assert store.spending()[MODEL]["usd"] == pytest.approx(40 * 0.12)


def test_what_is_in_flight_is_set_aside():
    budget = Budget(1.0)

    def attempt(spent):
        with budget.attempt(account := Account(0.6)):
            account.usd, account.lost = spent, False

    second = threading.Thread(target=attempt, args=(0.6,))
    with budget.attempt(first := Account(0.6)):
        second.start()
        second.join(0.05)
        assert second.is_alive() and budget.spent == 0  # both together might pass the limit
        first.usd, first.lost = 0.3, False
    second.join(5)
    assert not second.is_alive() and budget.spent == pytest.approx(0.9)
    with pytest.raises(BudgetReached):
        attempt(0.2)


def test_lost_answers_count_against_the_budget(client_of, prices):
    """A server that answers and drops the line sends its bill all the same: at most so much was lost."""
    with FakeEndpoint(echo, lambda n, body: "half" if n % 2 == 0 else None) as endpoint:
        client = client_of(
            endpoint, max_usd=1.0, prices=prices, counter=lambda messages: 100 * len(messages), concurrency=1
        )
        with client:
            pytest.raises(BudgetReached, client.ask, requests_of(40))
            assert client.budget.uncertain > 0.3 and client.budget.spent + client.budget.uncertain <= 1.0


def test_a_budget_without_a_price_is_refused(client_of, tmp_path, prices):
    def price(model, file=None):
        return price_of(LLMSettings(llm_model=model, prices=file))

    with pytest.raises(UsageError, match="no price for 'ignoto'"):
        client_of("http://localhost:1/v1", llm_model="ignoto", max_usd=1.0, prices=prices)
    assert price("ignoto", prices) is None and price("gratis", prices).usd(5, 5) == 0.0
    assert price("gpt-4o-mini").usd(1_000_000, 0) == 0.15
    assert price("gpt-4o-mini").usd(1_000_000, 1_000_000, 1_000_000) == pytest.approx(0.675)
    (tmp_path / "bad.json").write_text('{"models": {"x": {}}}')
    with pytest.raises(UsageError, match="is no price file"):
        price("x", tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text('{"version": "1", "models": {"x": {"in": 1, "out": NaN}}}')
    with pytest.raises(UsageError, match="x has a price that is none"):  # a budget of NaN would hold nothing back
        price("x", tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"endpoint": "localhost:8000"}, "a URL such as"),
        ({"endpoint": "http://"}, "a URL such as"),
        ({"endpoint": "http://localhost:porta/v1"}, "a URL such as"),
        ({"endpoint": "http://[::1/v1"}, "a URL such as"),
        ({"endpoint": "http://localhost:8000/v1\n"}, "a URL such as"),
        ({"endpoint": "http://localhost:99999/v1"}, "a URL such as"),
        ({"endpoint": "http://[1:2:3:4:5:6:7:8:9]/v1"}, "a URL such as"),
        ({"endpoint": "http://modelli..it/v1"}, "a URL such as"),  # names that Python does not look up
        ({"endpoint": f"http://{70 * 'a'}/v1"}, "a URL such as"),
        ({"key_env": "NO_SUCH_VARIABLE"}, "the environment has no NO_SUCH_VARIABLE"),
        ({"judge": "rule"}, "cannot read a text"),
    ],
)
def test_settings_that_cannot_hold_are_refused(client_of, settings, words):
    with pytest.raises(UsageError, match=words):
        client_of("http://localhost/v1", **settings)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("time=3", "Did you mean 'timeout'"),
        ("timeout=soon", "timeout is 'soon'"),
        ("shown=best", "'deciles' or 'top'"),
        ("attempts=0", "attempts is 0"),
        ("concurrency=0", "concurrency is 0"),
        ("concurrency=101", "concurrency is 101"),
        ("timeout=.inf", "timeout is inf"),
        ("timeout=1e12", "timeout is '1e12'"),
        ("max_usd=3", "is no setting"),
    ],
)
def test_rare_settings_come_as_words(word, words):
    options = LLMOptions(explainer="llm", endpoint="http://x/v1", llm_model="m", n_shown=5)
    settings = options.with_words(["timeout=3", "extra_body={top_k: 1}", "seed=null", "prices=/p"])
    assert (settings.n_shown, settings.timeout, settings.prices) == (5, 3.0, Path("/p"))
    assert settings.sampling == {"temperature": 0.0, "top_k": 1}
    with pytest.raises(UsageError, match=words):
        options.with_words([word])


def test_a_client_stopped_amid_a_batch_keeps_what_came_and_goes_on(client_of, tmp_path):
    with FakeEndpoint(echo, latency=0.05) as endpoint:
        with client_of(endpoint, concurrency=5) as client:
            thread = threading.Thread(target=lambda: pytest.raises(EndpointError, client.ask, requests_of(50)))
            thread.start()
            while endpoint.served < 12:
                time.sleep(0.005)
        thread.join(5)
        assert not thread.is_alive()
        kept = rows(tmp_path / "store.sqlite", "SELECT count(*) FROM call")[0][0]
        assert 5 <= kept < 50
        with client_of(endpoint, concurrency=5) as client:
            assert all(reply.ok for reply in client.ask(requests_of(50)))
            assert client.counts["from ledger"] == kept


@pytest.mark.slow
def test_six_kills_pay_at_most_for_the_calls_in_flight(tmp_path):
    """kill -9 at six moments of a run of the command: what was booked is never asked again."""
    concurrency, rows_ = 5, [marked_row(n, [f"il <<gatto>> numero {n}"]) for n in range(80)]
    data, out = jsonl_of(tmp_path / "d.jsonl", rows_), tmp_path / "o.jsonl"
    with FakeEndpoint(latency=0.1) as endpoint:
        command = [sys.executable, "-m", "sae_italian.cli", "explainita", "predict", str(data), str(out), "--task", "1"]
        command += ["--explainer", "llm", "--llm-model", "m", "--endpoint", endpoint.url, f"concurrency={concurrency}"]
        for kill in range(6):
            known = len(endpoint.requests)
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(endpoint.requests) < known + 3 + 2 * kill:
                assert process.poll() is None
                time.sleep(0.01)
            process.kill()
            process.wait()
        assert subprocess.run(command, capture_output=True, check=True) and out.is_file()
        asked = Counter(str(body["messages"]) for body in endpoint.requests)
        assert len(asked) == 80 and len(endpoint.requests) - 80 <= 6 * concurrency
    assert rows(out.with_suffix(".calls.sqlite"), "SELECT count(*) FROM call WHERE status = 'ok'") == [(80,)]


def test_a_paid_answer_survives_a_power_cut(client_of):
    with client_of("http://x/v1") as client:
        assert client._ledger.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: on the disk before it returns


def test_ten_thousand_judgements_with_a_fifth_of_faults(client_of, tmp_path):
    """2,000 questions of five passages, a fifth of the calls fails somehow: each is answered, booked and counted once.

    Every eighth question fails at its first two attempts: by call number a question would at times meet six faults.
    """
    faults = itertools.cycle([*FAULTS[:4], FAULTS[5]])
    attempts: Counter[str] = Counter()

    def fault(n, body):
        question = body["messages"][-1]["content"]
        attempts[question] += 1
        return next(faults) if int(question.split()[-1]) % 8 == 0 and attempts[question] <= 2 else None

    questions = requests_of(2000)
    with FakeEndpoint(echo, fault) as endpoint:
        with client_of(endpoint, concurrency=16) as client:
            replies = client.ask(questions)
        assert (len(endpoint.faults), endpoint.served, len(endpoint.requests)) == (500, 2000, 2500)
    assert [reply.text for reply in replies] == [f"risposta a domanda {i}" for i in range(2000)]
    booked = (
        "SELECT count(*), count(DISTINCT request_hash), sum(attempts), sum(tokens_out) FROM call WHERE status = 'ok'"
    )
    assert rows(tmp_path / "store.sqlite", booked) == [(2000, 2000, len(endpoint.requests), 20_000)]


# --- keys ----------------------------------------------------------------------------------------------------------------


def test_a_key_comes_from_the_environment_and_is_written_nowhere(client_of, tmp_path, monkeypatch, caplog, capfd):
    secret = "sk-una-chiave-segretissima-0123456789"
    monkeypatch.setenv("LA_MIA_CHIAVE", secret)
    monkeypatch.setenv("HF_TOKEN", "hf_un_altro_segreto")
    caplog.set_level(logging.DEBUG)

    class Indiscreet(FakeEndpoint):
        """Quotes the key back in answers and errors, as some do."""

        def _completion(self, body, answer):
            return super()._completion(body, f"{answer} con la chiave {self.headers[-1]['authorization']}")

    messages = []
    with Indiscreet(echo, lambda n, body: None) as endpoint:
        with client_of(endpoint, key_env="LA_MIA_CHIAVE") as client:
            client.ask(requests_of(3))
            assert {headers["authorization"] for headers in endpoint.headers} == {f"Bearer {secret}"}
            for status in ("400", "500", "401"):
                endpoint.fault = lambda n, body, status=status: f"{status} key {secret} is wrong"
                try:
                    messages += [
                        reply.status for reply in client.ask(requests_of(1, logprobs=status == "400", schema={}))
                    ]
                except EndpointError as error:
                    messages.append(str(error))
        endpoint.headers.clear()
        with client_of(endpoint, "other.sqlite") as client:  # no key: not the Hub's token either
            endpoint.fault = lambda n, body: None
            client.ask(requests_of(1))
            assert endpoint.headers[-1]["authorization"] == "Bearer none"
    assert any("<key>" in message for message in messages)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    captured = capfd.readouterr()
    for text in (written.decode("utf-8", "replace"), caplog.text, captured.out, captured.err, *messages):
        assert secret not in text and "hf_un_altro" not in text


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_a_key_is_sent_without_the_end_of_its_line(client_of, monkeypatch, end):
    """With it no header could be made of the key, and the refusal quoted it back."""
    monkeypatch.setenv("LLM_API_KEY", f"sk-abcdefghijklmnop{end}")
    with FakeEndpoint(echo) as endpoint, client_of(endpoint) as client:
        assert client.ask(requests_of(1))[0].ok
    assert endpoint.headers[-1]["authorization"] == "Bearer sk-abcdefghijklmnop"


@pytest.mark.parametrize("key", ["chiàve", "una\nchiave"])
def test_what_is_no_key_is_refused_and_not_shown(client_of, monkeypatch, key):
    monkeypatch.setenv("LLM_API_KEY", key)
    with pytest.raises(UsageError, match="LLM_API_KEY holds is no key") as error:
        client_of("http://localhost/v1")
    assert "chi" not in str(error.value)


@pytest.mark.parametrize("key", ["test", "1", "qualunque"])
def test_a_word_for_a_key_is_left_in_the_answers(client_of, monkeypatch, key):
    """Servers that want no key are given any word; «testo» became «<key>o», and a list of 1 and 0 unreadable."""
    monkeypatch.setenv("LLM_API_KEY", key)
    answer = '{"spiegazione": "parole del testo in qualunque frase", "risposte": [1, 0]}'
    with FakeEndpoint(lambda body: answer) as endpoint, client_of(endpoint) as client:
        assert client.ask(requests_of(1))[0].text == answer
