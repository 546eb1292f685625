"""Ask a model many questions at once and lose no answer.

The openai library sends, waits (also as long as a Retry-After says, up to two minutes) and tries again. What it does not
have is here: a ledger that answers a rerun, a budget that holds, servers that take less than the whole API, and an early
end where no answer is to be had. `ask` may be called from several threads at once.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2
import openai

from sae_italian.autointerp.llm import LLMSettings, calls
from sae_italian.autointerp.llm.calls import Account, Reply, Request
from sae_italian.autointerp.store import NO_ANSWER, connect, insert
from sae_italian.base.errors import UsageError
from sae_italian.base.storage import utc_now

UNREACHED_ATTEMPTS = 3  # without any response so far: a wrong address is told soon
GIVE_UP_AFTER = 3  # questions in a row that came to nothing
TOP_LOGPROBS = 20
MOST_REASONS = 8
LONGEST_BODY = 2**24  # bytes
# What a server may refuse and an answer can do without -> its parameters, and words that a refusal has for it.
OPTIONAL = {
    "schema": (("response_format",), ("response_format", "json_schema", "grammar", "guided", "structured")),
    "logprobs": (("logprobs", "top_logprobs"), ("logprob",)),
    "max_tokens": (("max_tokens",), ("max_tokens", "max_completion_tokens")),  # sent by its newer name
    "temperature": (("temperature",), ("temperature",)),
    "seed": (("seed",), ("seed",)),
    # sent at the head of the first question instead: the templates of Gemma and of older Mistral models have no such role
    "system": (("messages",), ("system role", "system message", "only user and assistant", "must alternate")),
}
# The ledger is the table `call` of a store; failures are asked again.
FIND_CALL = "SELECT reply FROM call WHERE request_hash = ? AND status = 'ok'"
ADD_CALL = """INSERT OR REPLACE INTO call
    SELECT :key, :model, :purpose, :status, :reply, :tokens_in, :tokens_cached, :tokens_out, :usd,
           :usd_uncertain + total(usd_uncertain), :latency, :attempts + coalesce(sum(attempts), 0), :created
    FROM call WHERE request_hash = :key"""
HOPELESS = {  # statuses that no later question will fare better with
    401: "refuses the key",
    402: "wants to be paid",
    403: "refuses the key",
    404: "has no such model or path",
}
# Questions sent, and of these what was answered, refused by the server, and failed; answers that an earlier run paid for;
# of the answers of both kinds, which could not be used, and which were cut at the token limit; attempts after the first.
COUNTED = ("asked", "answered", "refused", "failed", "from ledger", "unreadable", "cut", "retries")


class EndpointError(UsageError, openai.OpenAIError):
    """The endpoint does not answer, or will not answer anything. What was answered is kept.

    It is one of openai's errors too: these alone pass through the library without another attempt.
    """


class BudgetReached(EndpointError):
    """The next call might cost more than what is left. What was answered is kept, and a rerun goes on from there."""


class Budget:
    """Dollars spent, set aside for the calls in flight, and possibly spent on lost answers. For any thread."""

    def __init__(self, limit: float | None):
        self.limit = math.inf if limit is None else limit
        self.spent = self.uncertain = 0.0
        self._reserved: list[float] = []  # a number for each attempt in flight
        self._changed = threading.Condition()

    @contextmanager
    def attempt(self, account: Account) -> Iterator[None]:
        """Set aside what an attempt may cost, then book the account's `usd`, or all of it as uncertain while it is `lost`.

        Where too little is left it waits for calls in flight to give back what they did not use. Raises: BudgetReached when
        none is in flight.
        """
        with self._changed:
            while (gone := self.spent + self.uncertain) + sum(self._reserved) + account.worst > self.limit:
                if not self._reserved:
                    raise BudgetReached(
                        f"the next call may cost ${account.worst:.4f} and ${gone:.4f} of the ${self.limit:g} of --max-usd "
                        "are gone. What was answered is kept: run again with a higher --max-usd to go on."
                    )
                self._changed.wait()
            self._reserved.append(account.worst)
        account.attempts += 1
        account.lost = True  # until the block says otherwise: it may have been billed all the same
        try:
            yield
        finally:
            uncertain = account.worst if account.lost else 0.0
            account.usd_uncertain += uncertain
            with self._changed:
                self._reserved.remove(account.worst)
                self.spent += account.usd or 0.0
                self.uncertain += uncertain
                self._changed.notify_all()


class Client:
    """One model behind one endpoint. Use as a context manager.

    `counts` says what became of the questions so far and `reasons` why, each reason with its number; `missing` which
    parameters the server was found to do without, and why.
    Raises: UsageError for settings that cannot hold (a budget for a model without a price among them).
    """

    def __init__(self, settings: LLMSettings, ledger: Path):
        settings.check()
        self.settings, self.concurrency = settings, settings.concurrency
        self.model, self.url = settings.llm_model or "", settings.endpoint or ""
        self.price = calls.price_of(settings)
        if settings.max_usd is not None and self.price is None:
            raise UsageError(
                f"there is no price for {self.model!r}, so --max-usd cannot be kept. Give prices=FILE "
                "with its price (0 for a server of your own), or leave --max-usd out."
            )
        self.counter, self.budget = calls.token_counter(settings), Budget(settings.max_usd)
        self.missing: dict[str, str] = {}
        self.counts: dict[str, int] = dict.fromkeys(COUNTED, 0)
        self.reasons: Counter[str] = Counter()
        self._key, self._ledger_path = settings.key(), ledger
        self._lock, self._local = threading.Lock(), threading.local()
        self._pending: dict[str, Future[Reply]] = {}
        self._stopped: EndpointError | None = None
        self._reached = False  # whether any response came
        self._in_vain = 0  # questions in a row without an answer

    def __enter__(self) -> Client:
        # Without a key nothing of the environment (OPENAI_API_KEY, the Hub's token) may reach the server.
        where = {"base_url": self.url, "api_key": self._key or "none", "timeout": self.settings.timeout}
        self._openai = openai.OpenAI(**where, http_client=_Http(self._attempt, self.settings.timeout))
        self._ledger = connect(self._ledger_path, durable=True)  # paid answers survive a power cut
        self._pool = ThreadPoolExecutor(self.concurrency, "llm")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop("stopped")  # no further attempt; what is in flight is waited for and kept
        self._pool.shutdown()
        self._openai.close()
        self._ledger.close()

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Return one reply per request, in order; equal requests are asked once.

        Raises: BudgetReached, or EndpointError when the server is down or will answer nothing; what was in flight is
        waited for and kept first.
        """
        futures = []
        with self._lock:
            for request in requests:
                request = request._replace(max_tokens=self.settings.max_output_tokens or request.max_tokens)
                key = request.key(self.model, self.settings.sampling)
                if key not in self._pending:
                    self._pending[key] = self._pool.submit(self._one, request, key)
                futures.append(self._pending[key])
        wait(futures)
        return [future.result() for future in futures]

    def _one(self, request: Request, key: str) -> Reply:
        """Return the kept answer, or ask and keep it."""
        try:
            reply = self._kept(key)
            if reply is None:
                worst = self.price.usd(self.counter(request.messages), request.max_tokens) if self.price else 0.0
                reply = self._asked(request, account := Account(worst))
                self._keep(key, request, reply, account)
                self.count("retries", n=max(0, account.attempts - 1))
                self.count("asked")
                failure = "failed" if reply.status.startswith(NO_ANSWER) else "refused"
                self.count("answered" if reply.ok else failure, "" if reply.ok else reply.status)
            else:
                self.count("from ledger")
            self.count("cut", n=reply.finish == "length")
            if request.logprobs and reply.text and not (reply.logprobs or "logprobs" in self.missing):
                self._lacks({"logprobs": "the answers carry none"})
            return reply
        finally:
            with self._lock:
                del self._pending[key]

    def _kept(self, key: str) -> Reply | None:
        with self._lock:
            row = self._ledger.execute(FIND_CALL, (key,)).fetchone()
        return None if row is None else Reply("ok", **json.loads(row[0]))

    def _keep(self, key: str, request: Request, reply: Reply, account: Account) -> None:
        """Keep a reply; it takes the place of an earlier failure, whose attempts and uncertain cost are added."""
        kept = {name: value for name, value in reply._asdict().items() if name != "status"}
        text = json.dumps(kept, ensure_ascii=False) if reply.ok else None
        asked = {"key": key, "model": self.model, "purpose": request.purpose}
        answered = {"status": reply.status, "reply": text, "created": utc_now()}
        with self._lock, self._ledger:
            self._ledger.execute(ADD_CALL, asdict(account) | asked | answered)

    def _lacks(self, found: dict[str, str]) -> None:
        """Note in the store what the server lacks, at once: a rerun may have nothing left to ask it."""
        self.missing |= found
        notes = [(f"endpoint without {name}", f"{self.model}: {why}") for name, why in found.items()]
        with self._lock, self._ledger:
            insert(self._ledger, "run", notes, replace=True)

    def count(self, name: str, why: str = "", n: int = 1) -> None:
        """Count what became of a question or an answer, and why."""
        with self._lock:
            self.counts[name] += n
            self.reasons.update([f"{name}: {why}"] if why else [])

    def must_have_answered(self) -> None:
        """Raise EndpointError when there was something to ask and not one answer."""
        if self.counts["asked"] and not self.counts["answered"] + self.counts["from ledger"]:
            raise EndpointError(f"{self.url} answered none of {self.counts['asked']} questions: {self.told()[1]}.")

    def told(self) -> list[str]:
        """Return what became of the questions in a line, and each reason with its number, the commonest first."""
        counts = ", ".join(f"{n} {name}" for name, n in self.counts.items())
        return [f"calls: {counts}", *(f"{n} x {why}" for why, n in self.reasons.most_common(MOST_REASONS))]

    def _asked(self, request: Request, account: Account) -> Reply:
        """Return what the server answers, after doing without what it refuses. Raises: BudgetReached, EndpointError."""
        self._local.asked, started = (request, account), time.monotonic()
        blamed: dict[str, str] = {}
        while True:
            wanted = self._wanted(request)
            most = self.settings.attempts if self._reached else min(self.settings.attempts, UNREACHED_ATTEMPTS)
            try:
                client = self._openai.with_options(max_retries=max(0, most - account.attempts - 1))
                client.post("/chat/completions", body=wanted, cast_to=object)
            except openai.APIStatusError as error:
                said = calls.sentence_of(error.response.text, self._key)
                if not self._do_without(wanted, error.status_code, said, blamed):
                    for name in blamed:  # refused without these all the same: they were not the reason
                        self.missing.pop(name, None)
                    return self._refused(error.response, said, account)
            except openai.APIConnectionError as error:
                cause, late = error.__cause__ or error, isinstance(error, openai.APITimeoutError)
                why = calls.sentence_of(f"{type(cause).__name__}: {cause}", self._key)
                why = f"no answer within {self.settings.timeout:g} s" if late else why
                return self._failed(NO_ANSWER, why, account)
            else:
                account.latency, self._in_vain = time.monotonic() - started, 0
                self._lacks(blamed)
                reply = calls.reply_of(self._local.body)
                # a short key is a word ("test", "1") that an answer may well hold; who has that key has no secret
                secret = self._key if len(self._key or "") >= 16 else None
                return reply._replace(text=reply.text.replace(secret, "<key>")) if secret else reply

    def _attempt(self, send: Callable[[], httpx2.Response]) -> httpx2.Response:
        """Send what openai sends, each time it tries, and book it.

        Raises: EndpointError when nothing is to be sent any more, httpx's DecodingError for an answer that is none, which
        openai then asks for again.
        """
        request, account = self._local.asked
        if self._stopped is not None:
            raise self._stopped
        with self.budget.attempt(account):
            response = send()
            self._reached = True
            if not response.is_success:
                account.lost = False  # a refusal is not billed
                return response
            self._local.body = body = calls.completion(response.text)
            if body is None:
                raise httpx2.DecodingError(
                    f"the answer is no chat completion: {calls.sentence_of(response.text, self._key)}"
                )
            most = 10 * self.counter(request.messages) + 1000, 10 * request.max_tokens + 1000
            account.tokens_in, account.tokens_cached, account.tokens_out = calls.usage_of(body, *most)
            if account.tokens_in is not None and account.tokens_out is not None:
                account.lost, cached = False, account.tokens_cached or 0
                account.usd = self.price and self.price.usd(account.tokens_in, account.tokens_out, cached)
            return response

    def _stop(self, message: str) -> EndpointError:
        """Let nothing more be sent, and return the error to raise."""
        self._stopped = self._stopped or EndpointError(message)
        return self._stopped

    def _wanted(self, request: Request) -> dict[str, Any]:
        """Return the parameters of a request, without those that the server was found to refuse."""
        wanted: dict[str, Any] = {"model": self.model, "messages": list(request.messages)}
        wanted |= {"max_tokens": request.max_tokens, **self.settings.sampling}
        if request.schema is not None:
            json_schema = {"name": "answer", "schema": request.schema, "strict": True}
            wanted["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        if request.logprobs:
            wanted |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        refused = [parameter for name in list(self.missing) for parameter in OPTIONAL[name][0]]
        instead = {"max_completion_tokens": request.max_tokens} if "max_tokens" in refused else {}
        instead |= {"messages": calls.without_system(request.messages)} if "messages" in refused else {}
        return {name: value for name, value in wanted.items() if name not in refused} | instead

    def _do_without(self, wanted: dict[str, Any], status: int, said: str, blamed: dict[str, str]) -> bool:
        """Find what the next try leaves out: what a refusal names, else schema and log-probabilities; False for nothing.

        Some servers answer 500 to a schema, so a question with one is asked once more without before it is given up.
        """
        lower = said.lower()
        if status in HOPELESS or 300 <= status < 400 or status == 429 or _too_long(status, lower):
            return False
        sent = [name for name, (parameters, _) in OPTIONAL.items() if wanted.keys() & set(parameters)]
        named = [name for name in sent if name not in self.missing and any(w in lower for w in OPTIONAL[name][1])]
        unnamed = [name for name in ("schema", "logprobs") if name in sent][: 1 if status >= 500 else 2]
        if found := next((name for name in [*named, *unnamed] if name not in blamed), None):
            self.missing[found] = blamed[found] = f"HTTP {status}: {said}"
        return found is not None

    def _refused(self, response: httpx2.Response, said: str, account: Account) -> Reply:
        """Return the reply that a refusal amounts to. Raises: EndpointError where no other question would fare better."""
        status, headers = response.status_code, response.headers
        why = f"HTTP {status}{': ' + said if said else ''}"
        if 300 <= status < 400:
            raise self._stop(
                f"{self.url} sends on to {headers.get('Location', '?')}. If you trust it, give it as --endpoint."
            )
        if status in HOPELESS:
            raise self._stop(
                f"{self.url}: the endpoint {HOPELESS[status]} ({why}). "
                "Check --endpoint, --llm-model and the key's variable."
            )
        busy = status in (408, 409, 429) or status >= 500 and status != 501
        if not busy and _too_long(status, said.lower()):
            return Reply(f"{calls.TOO_LONG}: {why}")
        asks = f", asks to wait {headers['Retry-After']} s" if busy and "Retry-After" in headers else ""
        return self._failed(NO_ANSWER if busy else calls.REJECTED, why + asks, account)

    def _failed(self, kind: str, why: str, account: Account) -> Reply:
        """Return the reply to a question that came to nothing. Raises: EndpointError where others would fare no better."""
        self._in_vain += 1
        enough, answered = self._in_vain >= GIVE_UP_AFTER, bool(self.counts["answered"])
        if kind == calls.REJECTED and enough and not answered:
            raise self._stop(f"{self.url} refuses every question ({why}).")
        if kind == NO_ANSWER and (enough or not answered):
            raise self._stop(
                f"{self.url} does not answer: {account.attempts} attempts each at {self._in_vain} questions, the last: "
                f"{why}. What was answered is kept; run again when it is back, or give another --endpoint."
            )
        return Reply(f"{kind}: {why}")


def _too_long(status: int, said: str) -> bool:
    of_context = "context" in said and any(word in said for word in ("length", "window", "token", "size"))
    return status == 413 or of_context or "too long" in said or "max_new_tokens" in said


class _Http(openai.DefaultHttpxClient):
    """Does each attempt of openai's through `attempt`, and has its answer whole in time and of a bounded size."""

    def __init__(self, attempt: Callable[[Callable[[], httpx2.Response]], httpx2.Response], seconds: float):
        # A redirect could carry prompts and key to another host: it is refused, and its target named.
        super().__init__(follow_redirects=False)
        self.attempt, self.seconds = attempt, seconds

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        return self.attempt(lambda: self._in_time(request, options | {"stream": True}))

    def _in_time(self, request: httpx2.Request, options: dict[str, Any]) -> httpx2.Response:
        """httpx bounds each wait alone, and a server may drip for hours, the headers too: a thread waits for these."""
        found: Future[httpx2.Response] = Future()
        late = httpx2.ReadTimeout(f"no answer within {self.seconds:g} s", request=request)
        until = time.monotonic() + self.seconds

        def whole() -> None:
            try:
                response, body = super(_Http, self).send(request, **options), bytearray()
                with closing(response):
                    for part in response.iter_bytes():
                        body += part
                        if len(body) > LONGEST_BODY:
                            raise httpx2.DecodingError(f"the answer is longer than {LONGEST_BODY:,} bytes")
                        if time.monotonic() > until:
                            raise late
                coded = ("content-encoding", "content-length", "transfer-encoding")
                told = [header for header in response.headers.multi_items() if header[0] not in coded]
                answer = httpx2.Response(response.status_code, headers=told, content=bytes(body), request=request)
                found.set_result(answer)
            except BaseException as error:
                found.set_exception(error)

        threading.Thread(target=whole, daemon=True).start()
        try:
            return found.result(self.seconds)
        except TimeoutError:
            raise late from None
