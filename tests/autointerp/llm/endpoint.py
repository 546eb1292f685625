"""An OpenAI-compatible endpoint in a thread that answers as told, at once or late, wrongly, by halves or not at all."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
import time
from collections.abc import Callable
from typing import Any

Body = dict[str, Any]
FAULTS = ("429", "500", "drop", "half", "garbage", "broken json")


class FakeEndpoint:
    """`answer(body)` gives the text of an answer, or a whole message as dict; `fault(n, body)` one of FAULTS or None.

    `requests` holds every body that arrived; `most_at_once` how many were being answered together.
    """

    def __init__(
        self,
        answer: Callable[[Body], Any] | None = None,
        fault: Callable[[int, Body], str | None] = lambda n, body: None,
        *,
        latency: float = 0.0,
        logprobs: Callable[[str], list[Body]] | None = None,
        retry_after: str | None = "0",
        refuse: tuple[str, ...] = (),
    ):
        self.answer, self.fault, self.latency, self.logprobs = answer or stand_in, fault, latency, logprobs
        self.retry_after, self.refuse = retry_after, refuse
        self.requests: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.faults: list[str] = []
        self.served = self.at_once = self.most_at_once = 0

    def __enter__(self) -> FakeEndpoint:
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()

        async def start() -> None:
            self.server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"
            ready.set()

        self.loop.create_task(start())
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        assert ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            self.server.close()
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                self.headers.append({**headers, "authorization": re.search(r"Authorization: (.*)\r", head, re.I)[1]})
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                try:
                    if not await self._respond(body, writer):
                        return
                finally:
                    self.at_once -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    async def _respond(self, body: Body, writer: asyncio.StreamWriter) -> bool:
        number = len(self.requests)
        self.requests.append(body)
        fault = self.fault(number, body)
        if fault:
            self.faults.append(fault)
        if fault == "drop":
            return False
        if fault and fault.startswith("slow"):
            await asyncio.sleep(float(fault.split()[1]))
        elif self.latency:
            await asyncio.sleep(self.latency)
        status, text, extra = 200, "", ""
        unknown = [name for name in self.refuse if name in body]
        if unknown:
            status, text = 400, json.dumps({"error": {"message": f"{unknown[0]} is not supported"}})
        elif fault and fault.split()[0].isdigit():
            status, text = int(fault.split()[0]), json.dumps({"error": fault})
            extra = f"Retry-After: {self.retry_after}\r\n" if self.retry_after and status == 429 else ""
        elif fault == "broken json":
            text = '{"choices": [{"index"'
        else:
            text = json.dumps(self._completion(body, "non saprei" if fault == "garbage" else self.answer(body)))
            self.served += fault is None
        data = text.encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{extra}Content-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + (data[: len(data) // 2] if fault == "half" else data))
        await writer.drain()
        return fault != "half"

    def _completion(self, body: Body, answer: Any) -> Body:
        message = answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
        choice: Body = {"index": 0, "finish_reason": "stop", "message": message}
        if body.get("logprobs") and self.logprobs:
            choice["logprobs"] = {"content": self.logprobs(answer)}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        return {"id": "x", "created": int(time.time()), "model": body["model"], "choices": [choice], "usage": usage}


def stand_in(body: Body) -> str:
    """Answer each task in its form: one sentence, or a zero per passage or token."""
    properties = (body.get("response_format") or {}).get("json_schema", {}).get("schema", {}).get("properties", {})
    question = body["messages"][-1]["content"]
    if "Token (" in question or "Tokens (" in question:
        return json.dumps({"valori": [0] * passages(question)})
    if "risposte" in properties or "answers" in properties:
        return json.dumps({"risposte": [0] * passages(question)})
    return json.dumps({"spiegazione": "parole che iniziano con la lettera p, in qualunque posizione"})


def passages(question: str) -> int:
    """Return how many numbered lines a question ends with."""
    return len(re.findall(r"^\d+\. ", question, flags=re.MULTILINE))


def digits_with_logprobs(p: Callable[[int], dict[str, float]]) -> Callable[[str], list[Body]]:
    """Return log-probabilities for an answer cut into numbers and the rest; `p(i)` is what the i-th number could be."""

    def logprobs(answer: str) -> list[Body]:
        tokens, n = [], 0
        for piece in re.findall(r"\d+|[^\d]+", answer):
            alternatives = {piece: 1.0}
            if piece.isdigit():
                alternatives, n = p(n), n + 1
            top = [{"token": text, "logprob": math.log(value)} for text, value in alternatives.items()]
            tokens.append({"token": piece, "logprob": math.log(alternatives.get(piece, 1e-9)), "top_logprobs": top})
        return tokens

    return logprobs
