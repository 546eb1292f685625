"""How much of the allowed concurrency the LLM client uses: calls to an endpoint that takes a fixed time for each."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

LATENCY, ROUNDS, CONCURRENCIES = 0.5, 20, (1, 8, 32)


def measure_llm(
    *, latency: float = LATENCY, rounds: int = ROUNDS, concurrencies: tuple[int, ...] = CONCURRENCIES
) -> list[dict[str, Any]]:
    """Return one row per concurrency: seconds, the ideal (calls / concurrency x latency), and the share reached.

    Every row is `rounds` latencies long in the ideal case; client and endpoint run in this process.
    """
    from sae_italian.autointerp.llm import LLMSettings
    from sae_italian.autointerp.llm.client import Client

    rows = []
    server = _Server(latency)
    try:
        for concurrency in concurrencies:
            n = rounds * concurrency
            system = {"role": "system", "content": "Per ogni brano rispondi 1 o 0. " * 100}
            folder = tempfile.TemporaryDirectory()
            ledger = Path(folder.name) / "calls.sqlite"
            where = {"endpoint": server.url, "llm_model": "bench", "concurrency": concurrency}
            with folder, Client(LLMSettings(explainer="llm", **where), ledger) as client:
                client.ask([_request(system, f"prima {i}") for i in range(concurrency)])  # connections are opened once
                questions = [_request(system, f"brano {i}") for i in range(n)]
                started = time.perf_counter()
                client.ask(questions)
                seconds = time.perf_counter() - started
            ideal = n / concurrency * latency
            rows.append(
                {"concurrency": concurrency, "calls": n, "seconds": seconds, "ideal": ideal, "share": ideal / seconds}
            )
    finally:
        server.close()
    return rows


def _request(system: dict[str, str], question: str) -> Any:
    from sae_italian.autointerp.llm.calls import Request

    return Request((system, {"role": "user", "content": question}))


def llm_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = ["| calls at once | calls | seconds | ideal | share of the ideal |", "|---:|---:|---:|---:|---:|"]
    for row in rows:
        numbers = f"{row['seconds']:.2f} | {row['ideal']:.2f} | {100 * row['share']:.0f} %"
        lines.append(f"| {row['concurrency']} | {row['calls']} | {numbers} |")
    return "\n".join(lines)


class _Server:
    """Answers every POST after `latency` seconds, in a thread with an event loop of its own."""

    def __init__(self, latency: float):
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": '{"risposte": [1]}'}}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        body = json.dumps({"id": "", "created": 0, "model": "bench", "choices": [choice], "usage": usage}).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._answer, self._latency = head.encode() + body, latency
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        starting = asyncio.start_server(self._connection, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
                await asyncio.sleep(self._latency)
                writer.write(self._answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    def close(self) -> None:
        async def stop() -> None:
            self._server.close()
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
