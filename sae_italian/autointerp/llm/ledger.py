"""A question to a language model, what came back, and the account of all that was asked, which answers a rerun."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from sae_italian.autointerp.database import connect
from sae_italian.autointerp.store import CALLS, TABLES, Call
from sae_italian.base.storage import utc_now

NO_ANSWER, TOO_LONG, REJECTED = "no answer", "prompt too long", "rejected"  # how a status begins that is not ok
LONGEST_BODY = 2**24  # bytes


@dataclass(frozen=True)
class Request:
    """One question to a model. What decides its answer decides its `key`; where it is sent does not."""

    messages: tuple[dict[str, str], ...]
    purpose: str = ""
    max_tokens: int = 256
    schema: dict[str, Any] | None = None  # the JSON that is wanted back
    logprobs: bool = False  # wanted, if the server has them

    def key(self, model: str, sampling: dict[str, Any]) -> str:
        """Return a hash of model, messages and parameters. `purpose` is for the account only."""
        parts = [model, list(self.messages), self.max_tokens, self.schema, self.logprobs, sampling]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class TokenLogprobs:
    """One token of an answer and the likeliest tokens in its place, with natural logarithms of their probabilities."""

    token: str
    logprob: float
    top: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What came back. `status` is `ok`, or why there is no answer; a refusal is an answer with `refusal` set."""

    status: str
    text: str = ""
    finish: str = ""
    refusal: str = ""
    logprobs: tuple[TokenLogprobs, ...] | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"


@dataclass
class Account:
    """What one call took: tokens and dollars, None where the server or the price file does not say."""

    tokens_in: int | None = None
    tokens_cached: int | None = None
    tokens_out: int | None = None
    usd: float | None = None
    usd_uncertain: float = 0.0  # upper bound for attempts whose answer was lost, and for answers without a true usage
    latency: float = 0.0  # seconds, its attempts and the waits between them
    attempts: int = 0
    worst: float = 0.0  # dollars that one attempt may cost at most
    open: bool = False  # an attempt is under way


class Ledger:
    """The table `call` of a store. A reply is on disk, through a power cut too, before anybody reads it. For any thread."""

    def __init__(self, path: Path):
        self._connection, self._lock = connect(path, TABLES.values(), durable=True), threading.Lock()

    def find(self, key: str) -> Reply | None:
        """Return the answer kept under a key, if there is one; failures are asked again."""
        query = "SELECT reply FROM call WHERE request_hash = ? AND status = 'ok'"
        with self._lock:
            row = self._connection.execute(query, (key,)).fetchone()
        if row is None:
            return None
        values = json.loads(row[0])
        logprobs = values.pop("logprobs")
        tokens = None if logprobs is None else tuple(TokenLogprobs(**token) for token in logprobs)
        return Reply(status="ok", logprobs=tokens, **values)

    def add(self, key: str, model: str, request: Request, reply: Reply, account: Account) -> None:
        """Keep a reply; it takes the place of an earlier failure, whose attempts and uncertain cost are added."""
        values = asdict(reply)
        kept = {name: values[name] for name in ("text", "finish", "refusal", "logprobs")} if reply.ok else None
        took = {name: value for name, value in asdict(account).items() if name in Call._fields}
        call = Call(key, model, request.purpose, reply.status, kept, **took, created=utc_now())
        query = "SELECT attempts, usd_uncertain FROM call WHERE request_hash = ?"
        with self._lock, self._connection:
            if failed := self._connection.execute(query, (key,)).fetchone():
                call = call._replace(attempts=call.attempts + failed[0], usd_uncertain=call.usd_uncertain + failed[1])
            CALLS.add(self._connection, [call], replace=True)

    def close(self) -> None:
        self._connection.close()


# --- a server's body, whatever stands in it ---------------------------------------------------------------------------


class WholeInTime(httpx2.SyncByteStream):
    """A body that must be whole in time: httpx bounds each wait alone, and a server may drip for hours."""

    def __init__(self, stream: Any, seconds: float):
        self.stream, self.until = stream, time.monotonic() + seconds

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self.stream:
            size += len(part)
            if time.monotonic() > self.until:
                raise httpx2.ReadTimeout("the answer came by drops")
            if size > LONGEST_BODY:
                raise httpx2.DecodingError(f"the answer is longer than {LONGEST_BODY:,} bytes")
            yield part

    def close(self) -> None:
        self.stream.close()


def parsed(text: str) -> Any:
    """Return the JSON of a text, None where it is none."""
    try:
        return json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return None


def sentence_of(text: str, key: str | None) -> str:
    """Return a server's own sentence out of the body of a failure: of JSON its message, of a page its words.

    The key, which some quote back, is left out.
    """
    value = parsed(text)
    for name in ("error", "message", "detail"):
        value = value.get(name, value) if isinstance(value, dict) else value
    said = value if isinstance(value, str) else text
    if said.lstrip().startswith("<"):
        said = re.sub(r"<(style|script)\b.*?</\1\s*>|<[^<>]*>", " ", said[:5000], flags=re.DOTALL | re.IGNORECASE)
    return " ".join((said.replace(key, "<key>") if key else said).split())[:300]


def is_completion(body: Any) -> bool:
    """Return whether a body holds an answer at all."""
    choices = body.get("choices") if isinstance(body, dict) else None
    return isinstance(choices, list) and bool(choices) and isinstance(choices[0], dict)


def reply_of(body: dict[str, Any]) -> Reply:
    """Return the answer in a body. Odd values become empty ones: an answer that was paid for can always be kept."""
    choice = body["choices"][0]
    message = _dict(choice.get("message"))
    finish = _text(choice.get("finish_reason"))
    refusal = _text(message.get("refusal")) or ("content filter" if finish == "content_filter" else "")
    return Reply("ok", _text(message.get("content")), finish, refusal, _logprobs(choice.get("logprobs")))


def usage_of(body: dict[str, Any], most_in: int, most_out: int) -> tuple[int | None, int | None, int | None]:
    """Return the tokens in, cached and out that a server counted; None for what no such question can have."""

    def count(value: Any, most: int) -> int | None:
        return value if type(value) is int and 0 <= value <= most else None

    usage = _dict(body.get("usage"))
    tokens_in = count(usage.get("prompt_tokens"), most_in)
    cached = count(_dict(usage.get("prompt_tokens_details")).get("cached_tokens"), tokens_in or 0)
    return tokens_in, cached, count(usage.get("completion_tokens"), most_out)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    """Return a text, or those of a list of parts without what was thought, as something that can be written.

    There are no lone surrogates in it then.
    """
    if isinstance(value, list):
        parts = [
            part for part in value if isinstance(part, dict) and part.get("type", "text") in ("text", "output_text")
        ]
        value = "".join(_text(part.get("text")) for part in parts)
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def _logprobs(value: Any) -> tuple[TokenLogprobs, ...] | None:
    """Return the tokens of an answer; None where there are none, or anything but texts and numbers stands in them."""
    try:
        tokens = []
        for token in value["content"]:
            top = {_text(other["token"]): float(other["logprob"] + 0) for other in token.get("top_logprobs") or ()}
            tokens.append(TokenLogprobs(_text(token["token"]), float(token["logprob"] + 0), top))
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError):
        return None
    return tuple(tokens) or None
