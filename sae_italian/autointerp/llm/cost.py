"""What calls cost: a dated price file, a count of tokens, a budget that holds, and a run's estimate beforehand."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import openai

from sae_italian.autointerp.llm.ledger import Reply, Request
from sae_italian.autointerp.llm.settings import LLMSettings
from sae_italian.base.errors import UsageError

PRICE_FILE = Path(__file__).parent / "data" / "prices.json"
CHARACTERS_PER_TOKEN = 3.0
MESSAGE_TOKENS = 8  # what a chat template adds around a message
APPROXIMATION = f"1 token per {CHARACTERS_PER_TOKEN:g} characters and {MESSAGE_TOKENS} per message"
MILLION = 1_000_000
OUT_EXPLANATION, OUT_NUMBER, OUT_FRAME = 40, 2, 10  # tokens an answer is taken to have
EXPLANATION = "parola o desinenza che si ripete negli esempi, di solito dopo un articolo o una preposizione articolata"


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens, and where the figures are from."""

    tokens_in: float
    tokens_out: float
    tokens_cached: float
    source: str = ""

    def usd(self, tokens_in: int, tokens_out: int, tokens_cached: int = 0) -> float:
        """Return the cost of a call; `tokens_cached` of its input tokens came from the server's prefix cache."""
        fresh = tokens_in - tokens_cached
        total = fresh * self.tokens_in + tokens_cached * self.tokens_cached + tokens_out * self.tokens_out
        return total / MILLION


def price_of(settings: LLMSettings) -> Price | None:
    """Return a model's price, None when the price file does not know it. Raises: UsageError when it is no price file."""
    file, model = settings.prices or PRICE_FILE, settings.llm_model
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        if model in table.get("free", ()):
            return Price(0.0, 0.0, 0.0, f"prices of {table['version']}, free in {file.name}")
        if (entry := table["models"].get(model)) is None:
            return None
        figures = (float(entry["in"]), float(entry["out"]), float(entry.get("cached", entry["in"])))
        source = f"prices of {entry.get('date', table['version'])}, {entry.get('source', file.name)}"
        if min(figures) < 0:
            raise ValueError(f"{model} has a price below 0")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} is no price file ({type(error).__name__}: {error}): expected "
            '{"version": ..., "models": {NAME: {"in": USD, "out": USD per million tokens}}}.'
        ) from error
    return Price(*figures, source)


@dataclass(frozen=True)
class TokenCounter:
    """Counts prompt tokens: exactly with a tokenizer of the model, else by the stated approximation."""

    count_text: Callable[[str], int] | None = None
    how: str = APPROXIMATION

    @classmethod
    def of(cls, settings: LLMSettings) -> TokenCounter:
        """Return the counter that the settings ask for."""
        from sae_italian.models import load_tokenizer

        if settings.llm_tokenizer is None:
            return cls()
        tokenizer = load_tokenizer(settings.llm_tokenizer)
        return cls(lambda text: len(tokenizer(text)["input_ids"]), f"the tokenizer of {settings.llm_tokenizer}")

    def messages(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Return the tokens of a prompt."""
        count = self.count_text or (lambda text: math.ceil(len(text) / CHARACTERS_PER_TOKEN))
        return sum(count(message["content"]) + MESSAGE_TOKENS for message in messages)


class EndpointError(UsageError, openai.OpenAIError):
    """The endpoint does not answer, or will not answer anything. What was answered is kept.

    It is one of openai's errors too: these alone pass through the library without another attempt.
    """


class BudgetReached(EndpointError):
    """The next call might cost more than what is left. What was answered is kept, and a rerun goes on from there."""


class Budget:
    """Dollars spent, set aside for the calls in flight, and possibly spent on lost answers. For any thread."""

    def __init__(self, limit: float | None):
        self.limit = limit
        self.spent = self.uncertain = self._reserved = 0.0
        self._in_flight = 0
        self._changed = threading.Condition()

    def reserve(self, usd: float) -> None:
        """Set `usd` aside, waiting for calls in flight to give back what they did not use.

        Raises: BudgetReached when nothing is in flight and there is still too little left.
        """
        with self._changed:
            while self.limit is not None and self.spent + self.uncertain + self._reserved + usd > self.limit:
                if not self._in_flight:
                    raise BudgetReached(
                        f"the next call may cost ${usd:.4f} and ${self.spent + self.uncertain:.4f} of the ${self.limit:g} "
                        "of --max-usd are gone. What was answered is kept: run again with a higher --max-usd to go on."
                    )
                self._changed.wait()
            self._reserved += usd
            self._in_flight += 1

    def settle(self, reserved: float, *, spent: float = 0.0, uncertain: float = 0.0) -> None:
        """Give a reservation back and book what the call took."""
        with self._changed:
            self._reserved -= reserved
            self._in_flight -= 1
            self.spent += spent
            self.uncertain += uncertain
            self._changed.notify_all()


@dataclass(frozen=True)
class CostEstimate:
    """Calls, tokens and dollars of a whole run. `usd` is None where the price is not known."""

    model: str
    latents: int
    sampled: int
    calls: int
    tokens_in: int
    tokens_constant: int  # of tokens_in: the same in every call of a kind, so that a server may have them cached
    tokens_out: int
    usd: float | None
    usd_at_most: float | None  # every answer as long as it may be, and everything asked twice (repairs)
    counted_with: str
    price: str
    of_random: int = 0  # of the latents: the randomly initialised SAE's


class DryClient:
    """Takes questions as a client does, counts them and answers them without asking anybody."""

    def __init__(self, settings: LLMSettings):
        self.settings, self.model, self.concurrency = settings, settings.llm_model or "", 1
        self.counter = TokenCounter.of(settings)
        self.asked: dict[str, tuple[int, int, int, int]] = {}  # tokens in, constant, out, and out at most

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Reply:
        (key, value), *_ = (request.schema or {})["properties"].items()
        n = value.get("minItems", 0)
        constant = self.counter.messages(request.messages[:-1])
        out = OUT_FRAME + OUT_NUMBER * n if n else OUT_EXPLANATION
        most = self.settings.max_output_tokens or request.max_tokens
        took = (constant + self.counter.messages(request.messages[-1:]), constant, out, most)
        self.asked.setdefault(request.key(self.model, {}), took)
        answer = [0] * n if n else f"{EXPLANATION} {len(self.asked)}"  # no two explanations are the same
        return Reply("ok", json.dumps({key: answer}), "stop")

    def estimate(self, latents: int, sampled: int, of_random: int = 0) -> CostEstimate:
        """Return what `latents` take when `sampled` of them took what was asked so far."""
        scale, price = latents / max(1, sampled), price_of(self.settings)
        sums = [round(scale * sum(column)) for column in zip(*self.asked.values(), strict=True)] or [0] * 4
        return CostEstimate(
            self.model,
            latents,
            sampled,
            round(scale * len(self.asked)),
            *sums[:3],
            usd=None if price is None else price.usd(sums[0], sums[2]),
            usd_at_most=None if price is None else 2 * price.usd(sums[0], sums[3]),
            counted_with=self.counter.how,
            price="" if price is None else price.source,
            of_random=of_random,
        )
