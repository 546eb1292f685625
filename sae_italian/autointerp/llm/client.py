"""Ask a model many questions at once and lose no answer: retries, a bound on what is in flight, a budget, a ledger.

The client runs an event loop in a thread of its own; `ask` may be called from any thread, by several at once. Every
answer is in the ledger before `ask` returns it, so a run that is killed asks nothing twice when it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sae_italian.autointerp.llm.budget import Budget
from sae_italian.autointerp.llm.ledger import Account, Ledger, Reply, Request
from sae_italian.autointerp.llm.prices import PRICE_FILE, Price, TokenCounter, price_of
from sae_italian.autointerp.llm.transport import Answer, Failure, attempt, open_client
from sae_italian.base.errors import UsageError

KEY_VARIABLE = "LLM_API_KEY"
NO_ANSWER, TOO_LONG, REJECTED = "no answer", "prompt too long", "rejected"
MAX_CONCURRENCY = 100  # connections that huggingface_hub's client opens at most
LONGEST_WAIT = 300.0  # seconds that a server may ask for before we stop instead
GIVE_UP_AFTER = 3  # requests in a row that ran out of attempts: the server is down

T = TypeVar("T")


class EndpointError(UsageError):
    """The endpoint does not answer, or will not answer anything. What was answered is kept."""


def key_of(variable: str | None) -> str | None:
    """Return the key that the environment holds. Raises: UsageError when the variable that was named is not set."""
    key = os.environ.get(variable or KEY_VARIABLE)
    if variable and not key:
        raise UsageError(f"the environment has no {variable}; keys are read from there and from nowhere else.")
    return key


class Client:
    """One model behind one endpoint. Use as a context manager.

    `attempts` is per request; between them the client waits about `backoff` seconds, doubled each time, at random
    around that, and as long as a Retry-After says. `features` are what the server is found to take of JSON schemas and
    log-probabilities; `counts` what happened so far.

    Raises: UsageError for settings that cannot hold (a budget for a model without a price among them).
    """

    def __init__(
        self,
        url: str,
        model: str,
        ledger: Path,
        *,
        concurrency: int = 8,
        max_usd: float | None = None,
        prices: Path = PRICE_FILE,
        key_variable: str | None = None,
        timeout: float = 120.0,
        attempts: int = 6,
        backoff: float = 1.0,
        temperature: float = 0.0,
        seed: int | None = 0,
        counter: TokenCounter | None = None,
    ):
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"--endpoint is {url!r}; a URL such as http://localhost:8000/v1 was expected.")
        if not 1 <= concurrency <= MAX_CONCURRENCY:
            raise UsageError(f"--concurrency is {concurrency}; it must be from 1 to {MAX_CONCURRENCY}.")
        self.price: Price | None = price_of(model, prices)
        if max_usd is not None and self.price is None:
            raise UsageError(
                f"{prices.name} has no price for {model!r}, so --max-usd cannot be kept. Give --prices FILE with its "
                "price (0 for a server of your own), or leave --max-usd out."
            )
        self.url, self.model, self.concurrency, self.timeout = url, model, concurrency, timeout
        self.attempts, self.backoff = attempts, backoff
        self.settings: dict[str, Any] = {"temperature": temperature} | ({} if seed is None else {"seed": seed})
        self.counter = counter or TokenCounter()
        self.features = {"schema", "logprobs"}
        self.missing: dict[str, str] = {}  # features found missing, and how
        self.counts = {"asked": 0, "from ledger": 0, "retries": 0, "failed": 0}
        self._key, self._max_usd, self._ledger_path = key_of(key_variable), max_usd, ledger
        self._pending: dict[str, asyncio.Future[Reply]] = {}
        self._stopped: UsageError | None = None
        self._answered = self._given_up = 0
        self._resume_at = 0.0
        self._random = random.Random(0)

    # --- life ----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Client:
        self._ledger = Ledger(self._ledger_path)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm-client", daemon=True)
        self._thread.start()
        self._run(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._ledger.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _open(self) -> None:
        self.budget = Budget(self._max_usd)
        self._stopping = asyncio.Event()
        self._slots = asyncio.Semaphore(self.concurrency)
        self._http = open_client(self.url, self._key, self.timeout)

    async def _close(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.close()

    # --- asking --------------------------------------------------------------------------------------------------------

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Return one reply per request, in order; equal requests are asked once.

        Raises: BudgetReached, or EndpointError when the server is down or will answer nothing; what was in flight is
        waited for and kept first.
        """
        return self._run(self._all(requests))

    def worst_usd(self, request: Request) -> float:
        """Return the most that a request can cost, 0 where the price is not known."""
        if self.price is None:
            return 0.0
        return self.price.usd(self.counter.messages(request.messages), request.max_tokens)

    async def _all(self, requests: Sequence[Request]) -> list[Reply]:
        outcomes = await asyncio.gather(*(self._one(request) for request in requests), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, Reply)]

    async def _one(self, request: Request) -> Reply:
        key = request.key(self.model, self.settings)
        if kept := self._ledger.find(key):
            self.counts["from ledger"] += 1
            self._notice(request, kept)
            return kept
        if key in self._pending:
            return await asyncio.shield(self._pending[key])
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._pending[key] = future
        try:
            reply = await self._ask(request, key)
        except asyncio.CancelledError:
            future.cancel()
            raise
        except BaseException as error:
            future.set_exception(error)
            future.exception()  # somebody looked: no warning when nobody else waits for it
            raise
        finally:
            del self._pending[key]
        future.set_result(reply)
        return reply

    async def _ask(self, request: Request, key: str) -> Reply:
        account = Account()
        async with self._slots:  # also between attempts: a server in trouble is not sent the next question instead
            reply = await self._attempts(request, account)
        if not reply.ok:
            self.counts["failed"] += 1
        self._ledger.add(key, self.model, request, reply, account)
        return reply

    async def _attempts(self, request: Request, account: Account) -> Reply:
        blamed: list[str] = []
        while True:
            try:
                return await self._attempt(request, account)
            except Failure as failure:
                failure.why = self._redacted(failure.why)
                if failure.kind == "feature":
                    blamed.append(failure.feature)
                delay, reply = self._after(failure, account.attempts)
            if reply is not None:
                self._restore(blamed)
                return reply
            self.counts["retries"] += 1
            await self._sleep(delay)

    async def _attempt(self, request: Request, account: Account) -> Reply:
        """Send once, within the bounds, and book it. Raises: Failure, BudgetReached, EndpointError."""
        while self._stopped is None and (wait := self._resume_at - time.monotonic()) > 0:
            await self._sleep(wait)
        worst = self.worst_usd(request)
        if self._stopped is not None:
            raise self._stopped
        await self.budget.reserve(worst)
        if self._stopped is not None:
            await self.budget.settle(worst)
            raise self._stopped
        account.attempts += 1
        started = time.monotonic()
        spent, lost = 0.0, worst  # whatever interrupts this, the call may have been billed
        try:
            answer = await attempt(self._http, self.model, request, self.settings, set(self.features), self.timeout)
            account.latency = time.monotonic() - started
            account.tokens_in, account.tokens_cached = answer.tokens_in, answer.tokens_cached
            account.tokens_out, account.usd = answer.tokens_out, self._usd(answer)
            spent, lost = (worst if account.usd is None else account.usd), 0.0
        except Failure as failure:
            lost = worst if failure.may_be_billed else 0.0
            raise
        finally:
            account.usd_uncertain += lost
            await self.budget.settle(worst, spent=spent, uncertain=lost)
        self.counts["asked"] += 1
        self._answered += 1
        self._given_up = 0
        self._notice(request, answer.reply)
        return replace(answer.reply, text=self._redacted(answer.reply.text))

    def _usd(self, answer: Answer) -> float | None:
        if self.price is None or answer.tokens_in is None or answer.tokens_out is None:
            return None
        return self.price.usd(answer.tokens_in, answer.tokens_out, answer.tokens_cached or 0)

    def _notice(self, request: Request, reply: Reply) -> None:
        """See once that log-probabilities were wanted and did not come, and ask for them no more."""
        if request.logprobs and reply.text and reply.logprobs is None and "logprobs" in self.features:
            self._without("logprobs", "the answers carry none")

    def _without(self, feature: str, why: str) -> None:
        self.features.discard(feature)
        self.missing.setdefault(feature, why)

    def _restore(self, features: Sequence[str]) -> None:
        """Believe again in features that a request was not refused for: without them it was refused all the same."""
        for feature in features:
            self.features.add(feature)
            self.missing.pop(feature, None)

    def _after(self, failure: Failure, attempts: int) -> tuple[float, Reply | None]:
        """Return what follows on a failed attempt: a delay before the next one, or the reply that ends it."""
        if failure.kind == "stop":
            raise self._stop(f"{self.url}: {failure.why}. Check --endpoint, --llm-model and the key's variable.")
        if failure.kind == "feature":
            self._without(failure.feature, failure.why)
            return 0.0, None
        if failure.kind in ("too long", "refused"):
            return 0.0, Reply(f"{TOO_LONG if failure.kind == 'too long' else REJECTED}: {failure.why}")
        if failure.wait is not None:
            if failure.wait > LONGEST_WAIT:
                raise self._stop(f"{self.url} asks to wait {failure.wait:.0f} s ({failure.why}). Run again then.")
            self._resume_at = max(self._resume_at, time.monotonic() + failure.wait)
        if failure.unreachable and not self._answered and attempts >= 2:
            raise self._stop(f"no server answers at {self.url} ({failure.why}). Start it, or give another --endpoint.")
        if attempts < self.attempts:
            base = min(60.0, self.backoff * 2 ** (attempts - 1))
            return base * self._random.uniform(0.5, 1.5), None
        self._given_up += 1
        if self._given_up >= GIVE_UP_AFTER or not self._answered:
            raise self._stop(
                f"{self.url} does not answer: {self.attempts} attempts each at {self._given_up} requests, the last: "
                f"{failure.why}. What was answered is kept; run again when it is back."
            )
        return 0.0, Reply(f"{NO_ANSWER}: {failure.why}")

    def _stop(self, message: str) -> UsageError:
        """Remember that nothing more is to be sent, wake who waits, and return the error to raise."""
        self._stopped = self._stopped or EndpointError(message)
        self._stopping.set()
        return self._stopped

    async def _sleep(self, seconds: float) -> None:
        """Sleep, or wake early when everything stops."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    def _redacted(self, text: str) -> str:
        """Return a server's words without the key, which some quote back."""
        return text.replace(self._key, "<key>") if self._key else text
