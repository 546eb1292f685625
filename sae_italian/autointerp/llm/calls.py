"""One call of a language model: the question, what came back, and what it cost."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.autointerp.llm import LLMSettings
from sae_italian.base.errors import UsageError

TOO_LONG, REJECTED = "prompt too long", "rejected"  # these and NO_ANSWER begin a status
PRICE_FILE = Path(__file__).parent / "data" / "prices.json"
CHARACTERS_PER_TOKEN = 3.0
MESSAGE_TOKENS = 8  # what a chat template adds around a message
APPROXIMATION = f"1 token per {CHARACTERS_PER_TOKEN:g} characters and {MESSAGE_TOKENS} per message"
OUT_EXPLANATION, OUT_NUMBER, OUT_FRAME = 40, 2, 10  # tokens an answer is taken to have
EXPLANATION = "parola o desinenza che si ripete negli esempi, di solito dopo un articolo o una preposizione articolata"

Messages = tuple[dict[str, str], ...]


class Request(NamedTuple):
    """One question to a model. What decides its answer decides its `key`; where it is sent does not."""

    messages: Messages
    purpose: str = ""
    max_tokens: int = 256
    schema: dict[str, Any] | None = None  # the JSON that is wanted back
    logprobs: bool = False  # wanted, if the server has them

    def key(self, model: str, sampling: dict[str, Any]) -> str:
        """Return a hash of model, messages and parameters. `purpose` is for the account only."""
        parts = [model, list(self.messages), self.max_tokens, self.schema, self.logprobs, sampling]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def without_system(messages: Messages) -> list[dict[str, str]]:
    """Return messages with what the system says at the head of the first question."""
    said = "".join(f"{message['content']}\n\n" for message in messages if message["role"] == "system")
    first, *rest = [message for message in messages if message["role"] != "system"]
    return [{**first, "content": said + first["content"]}, *rest]


# One `token` of an answer with its `logprob` (natural), and by token those of the likeliest in its place: `top`.
TokenLogprobs = dict[str, Any]


class Reply(NamedTuple):
    """What came back. `status` is `ok`, or why there is no answer; a refusal is an answer with `refusal` set."""

    status: str
    text: str = ""
    finish: str = ""
    refusal: str = ""
    logprobs: list[TokenLogprobs] | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"


@dataclass
class Account:
    """What one call took: tokens and dollars, None where the server or the price file does not say."""

    worst: float  # dollars that one attempt may cost at most
    tokens_in: int | None = None
    tokens_cached: int | None = None
    tokens_out: int | None = None
    usd: float | None = None
    usd_uncertain: float = 0.0  # at most, of attempts whose answer or bill was lost
    latency: float = 0.0  # seconds, its attempts and the waits between them
    attempts: int = 0
    lost: bool = False  # whether the last attempt may have been billed without its bill being known


# --- a server's body, whatever stands in it ---------------------------------------------------------------------------


def parsed(text: str) -> Any:
    """Return the JSON of a text, None where it is none."""
    try:
        return json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return None


def sentence_of(text: str, key: str | None) -> str:
    """Return a server's own sentence out of a failure's body, JSON or a page, without the key, which some quote back."""
    value = parsed(text)
    for name in ("error", "message", "detail"):
        value = value.get(name, value) if isinstance(value, dict) else value
    said = value if isinstance(value, str) else text
    if said.lstrip().startswith("<"):
        said = re.sub(r"<(style|script)\b.*?</\1\s*>|<[^<>]*>", " ", said[:5000], flags=re.DOTALL | re.IGNORECASE)
    return _text(" ".join((said.replace(key, "<key>") if key else said).split())[:300])


def completion(text: str) -> dict[str, Any] | None:
    """Return a body that holds an answer, None for any other."""
    body = parsed(text)
    choices = body.get("choices") if isinstance(body, dict) else None
    return body if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None


def reply_of(body: dict[str, Any]) -> Reply:
    """Return the answer in a body. Odd values become empty ones: an answer that was paid for can always be kept."""
    choice = body["choices"][0]
    message, finish = _dict(choice.get("message")), _text(choice.get("finish_reason"))
    refusal = _text(message.get("refusal")) or ("content filter" if finish == "content_filter" else "")
    return Reply("ok", _text(message.get("content")), finish, refusal, _logprobs(choice.get("logprobs")))


def usage_of(body: dict[str, Any], most_in: int, most_out: int) -> tuple[int | None, int | None, int | None]:
    """Return the tokens in, cached and out that a server counted; None for what no such question can have."""
    usage = _dict(body.get("usage"))
    cached = _dict(usage.get("prompt_tokens_details")).get("cached_tokens")
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    counted = (read, most_in), (cached, most_in), (written, most_out)
    read, cached, written = (n if type(n) is int and 0 <= n <= most else None for n, most in counted)
    return read, None if (cached or 0) > (read or 0) else cached, written


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    """Return a text, or those of a list of parts without what was thought; never with half a surrogate pair."""
    if isinstance(value, list):
        parts = [part for part in value if _dict(part).get("type", "text") in ("text", "output_text")]
        value = "".join(_text(_dict(part).get("text")) for part in parts)
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def _logprobs(value: Any) -> list[TokenLogprobs] | None:
    """Return the tokens of an answer; None where there are none, or anything but texts and numbers stands in them."""
    try:
        tokens: list[TokenLogprobs] = []
        for token in value["content"]:
            top = {_text(other["token"]): float(other["logprob"] + 0) for other in token.get("top_logprobs") or ()}
            tokens.append({"token": _text(token["token"]), "logprob": float(token["logprob"] + 0), "top": top})
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError):
        return None
    return tokens or None


# --- what it costs --------------------------------------------------------------------------------------------------


class Price(NamedTuple):
    """US dollars per million tokens, and where the figures are from."""

    tokens_in: float
    tokens_out: float
    tokens_cached: float
    source: str = ""

    def usd(self, tokens_in: int, tokens_out: int, tokens_cached: int = 0) -> float:
        """Return the cost of a call; `tokens_cached` of its input tokens came from the server's prefix cache."""
        read = (tokens_in - tokens_cached) * self.tokens_in + tokens_cached * self.tokens_cached
        return (read + tokens_out * self.tokens_out) / 1e6


def price_of(settings: LLMSettings) -> Price | None:
    """Return a model's price, None when the price file does not know it. Raises: UsageError when it is no price file."""
    file, model = settings.prices or PRICE_FILE, settings.llm_model
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        free = {"in": 0, "out": 0, "source": f"free in {file.name}"} if model in table.get("free", ()) else None
        if (entry := free or table["models"].get(model)) is None:
            return None
        figures = (float(entry["in"]), float(entry["out"]), float(entry.get("cached", entry["in"])))
        source = f"prices of {entry.get('date', table['version'])}, {entry.get('source', file.name)}"
        if not all(0 <= figure < math.inf for figure in figures):
            raise ValueError(f"{model} has a price that is none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} is no price file ({type(error).__name__}: {error}): expected "
            '{"version": ..., "models": {NAME: {"in": USD, "out": USD per million tokens}}}.'
        ) from error
    return Price(*figures, source)


def token_counter(settings: LLMSettings) -> Callable[[Sequence[Mapping[str, str]]], int]:
    """Return what counts the tokens of a prompt: exactly with a tokenizer of the model, else by the stated approximation."""
    from sae_italian.models import load_tokenizer

    tokenizer = load_tokenizer(settings.llm_tokenizer) if settings.llm_tokenizer else None

    def count(text: str) -> int:
        approximate = math.ceil(len(text) / CHARACTERS_PER_TOKEN)
        return len(tokenizer(text)["input_ids"]) if tokenizer else approximate

    return lambda messages: sum(count(message["content"]) + MESSAGE_TOKENS for message in messages)


class DryClient:
    """Takes questions as a client does, counts them and answers them without asking anybody."""

    def __init__(self, settings: LLMSettings):
        self.settings, self.model, self.concurrency = settings, settings.llm_model or "", 1
        self.counter = token_counter(settings)
        self.asked: dict[str, tuple[int, int, int, int]] = {}  # tokens in, constant, out, and out at most

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Reply:
        (key, value), *_ = (request.schema or {})["properties"].items()
        n, constant = value.get("minItems", 0), self.counter(request.messages[:-1])
        out = OUT_FRAME + OUT_NUMBER * n if n else OUT_EXPLANATION
        most = self.settings.max_output_tokens or request.max_tokens
        took = (constant + self.counter(request.messages[-1:]), constant, out, most)
        self.asked.setdefault(request.key(self.model, {}), took)
        answer = [0] * n if n else f"{EXPLANATION} {len(self.asked)}"  # no two explanations are the same
        return Reply("ok", json.dumps({key: answer}), "stop")

    def count(self, name: str, why: str = "") -> None:
        """Count nothing: what it answers can be read."""

    def estimate(self, latents: int, sampled: int, of_random: int = 0) -> dict[str, Any]:
        """Return what `latents` take when `sampled` of them took what was asked so far.

        Calls, tokens and dollars of a whole run; dollars are None where the price is not known. `tokens_constant` of the
        tokens in are the same in every call of a kind, so that a server may have them cached; `usd_at_most` is for answers
        as long as they may be, and everything asked twice (repairs); `of_random` latents are the random SAE's.
        """
        scale, price = latents / max(1, sampled), price_of(self.settings)
        tokenizer = self.settings.llm_tokenizer
        sums = [round(scale * sum(column)) for column in zip(*self.asked.values(), strict=True)] or [0] * 4
        return {
            "model": self.model,
            "latents": latents,
            "sampled": sampled,
            "calls": round(scale * len(self.asked)),
            **dict(zip(("tokens_in", "tokens_constant", "tokens_out"), sums, strict=False)),
            "usd": None if price is None else price.usd(sums[0], sums[2]),
            "usd_at_most": None if price is None else 2 * price.usd(sums[0], sums[3]),
            "counted_with": f"the tokenizer of {tokenizer}" if tokenizer else APPROXIMATION,
            "price": "" if price is None else price.source,
            "of_random": of_random,
        }
