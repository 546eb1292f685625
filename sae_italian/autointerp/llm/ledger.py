"""The calls that were made and what came back: the account of a run, and the memory that answers a rerun."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from sae_italian.autointerp.database import connect
from sae_italian.autointerp.llm.reply import Reply, Request, TokenLogprobs
from sae_italian.autointerp.store import CALLS, TABLES, Call
from sae_italian.base.storage import utc_now


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


class Ledger:
    """The table `call` of a store. A reply is on disk before anybody reads it. For any thread."""

    def __init__(self, path: Path):
        # a paid answer is on the disk itself before anybody reads it
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
        return Reply(status="ok", logprobs=tokens, from_ledger=True, **values)

    def add(self, key: str, model: str, request: Request, reply: Reply, account: Account) -> None:
        """Keep a reply; it takes the place of an earlier failure, whose attempts and uncertain cost are added."""
        values = asdict(reply)
        kept = {name: values[name] for name in ("text", "finish", "refusal", "logprobs")} if reply.ok else None
        call = Call(key, model, request.purpose, reply.status, kept, **asdict(account), created=utc_now())
        query = "SELECT attempts, usd_uncertain FROM call WHERE request_hash = ?"
        with self._lock, self._connection:
            if failed := self._connection.execute(query, (key,)).fetchone():
                call = call._replace(attempts=call.attempts + failed[0], usd_uncertain=call.usd_uncertain + failed[1])
            CALLS.add(self._connection, [call], replace=True)

    def close(self) -> None:
        self._connection.close()
