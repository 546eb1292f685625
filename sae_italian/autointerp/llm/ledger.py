"""The calls that were made and what came back: the account of a run, and the cache that a rerun reads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sae_italian.autointerp.database import connect
from sae_italian.base.storage import utc_now


@dataclass(frozen=True)
class Request:
    """One question to a model. What decides its answer decides its `key`; where it is sent does not."""

    messages: tuple[dict[str, str], ...]
    purpose: str = ""
    max_tokens: int = 256
    schema: dict[str, Any] | None = None  # the JSON that is wanted back
    logprobs: bool = False  # wanted, if the server has them

    def key(self, model: str, settings: dict[str, Any]) -> str:
        """Return a hash of model, messages and parameters. `purpose` is for the account only."""
        parts = [model, list(self.messages), self.max_tokens, self.schema, self.logprobs, settings]
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
    from_ledger: bool = False

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
    usd_uncertain: float = 0.0  # upper bound for attempts whose answer was lost on the way
    latency: float = 0.0
    attempts: int = 0


class Ledger:
    """The table `call` of a store. A reply is on disk before anybody sees it."""

    def __init__(self, path: Path):
        self.connection = connect(path)

    def find(self, key: str) -> Reply | None:
        """Return the answer kept under a key, if there is one; failures are asked again."""
        query = "SELECT reply FROM call WHERE request_hash = ? AND status = 'ok'"
        row = self.connection.execute(query, (key,)).fetchone()
        if row is None:
            return None
        values = json.loads(row[0])
        logprobs = values.pop("logprobs")
        tokens = None if logprobs is None else tuple(TokenLogprobs(**token) for token in logprobs)
        return Reply(status="ok", logprobs=tokens, from_ledger=True, **values)

    def add(self, key: str, model: str, request: Request, reply: Reply, account: Account) -> None:
        """Keep a reply; an answer takes the place of an earlier failure, whose uncertain cost is added."""
        values = asdict(reply)
        kept = {name: values[name] for name in ("text", "finish", "refusal", "logprobs")}
        text = json.dumps(kept, ensure_ascii=False) if reply.ok else None
        row = (key, model, request.purpose, reply.status, text, *asdict(account).values(), utc_now())
        with self.connection:
            self.connection.execute(
                """INSERT INTO call (request_hash, model, purpose, status, reply, tokens_in, tokens_cached, tokens_out,
                                     usd, usd_uncertain, latency, attempts, created)
                   VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
                   ON CONFLICT (request_hash) DO UPDATE SET status = excluded.status, reply = excluded.reply,
                     tokens_in = excluded.tokens_in, tokens_cached = excluded.tokens_cached,
                     tokens_out = excluded.tokens_out, usd = excluded.usd,
                     usd_uncertain = usd_uncertain + excluded.usd_uncertain, latency = excluded.latency,
                     attempts = attempts + excluded.attempts, created = excluded.created
                   WHERE call.status != 'ok'""",
                row,
            )

    def close(self) -> None:
        self.connection.close()
