"""What servers do, one behaviour a row, and what must become of it: the table behind docs/endpoints.md.

A behaviour is a function of the number of a request (0, 1, ...) and its body that returns what is sent back.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, NamedTuple

from sae_italian.autointerp.llm.answers import PROBLEMS

RIGHT = "verbi al futuro"
GOOD, DRAFT = json.dumps({"spiegazione": RIGHT}), json.dumps({"spiegazione": "nomi"})
LENGTH, EMPTY, FORM = PROBLEMS["length"], PROBLEMS["empty"], PROBLEMS["json"]
Outcome = str  # answered, unreadable or stopped


class Sent(NamedTuple):
    """What a server sends back. `drip` is the seconds between pieces of the body, or of the headers (`slow_head`), of so
    many bytes each; `cut` how many bytes are kept back.
    """

    body: bytes
    status: int = 200
    headers: tuple[str, ...] = ("Content-Type: application/json",)
    drip: float = 0.0
    cut: int = 0
    late: float = 0.0  # seconds before anything is sent
    length: bool = True  # Content-Length is told
    slow_head: bool = False
    piece: int = 1


class Behaviour(NamedTuple):
    """`words` is what the reason or the line must hold; `asked` how many requests it takes, None where that is open.

    `question` is what the server is asked for: an explanation, yes or no on three passages, or numbers on three tokens.
    """

    name: str
    serve: Callable[[int, dict[str, Any]], Sent | None]  # None: the line is cut
    outcome: Outcome
    words: str = ""
    asked: int | None = 1
    settings: tuple[str, ...] = ()
    question: str = "explanation"


def completion(message: Any, finish: str = "stop", usage: Any = None, **more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 100, "completion_tokens": 10} if usage is None else usage
    return {"choices": [{"index": 0, "finish_reason": finish, "message": message, **more}], "usage": usage}


def as_json(body: Any, status: int = 200, *headers: str, **how: Any) -> Sent:
    return Sent(json.dumps(body).encode(), status, ("Content-Type: application/json", *headers), **how)


def page(text: str, status: int) -> Sent:
    style = "<style>body { color: red }</style>"
    return Sent(f"<!doctype html><html><head>{style}</head><body><h1>{text}</h1></body></html>".encode(), status, ())


FINE = as_json(completion({"role": "assistant", "content": GOOD}))


def says(content: Any, finish: str = "stop", **message: Any) -> Callable[[int, Any], Sent]:
    return always(as_json(completion({"role": "assistant", "content": content, **message}, finish)))


def numbers(name: str, content: Any, outcome: Outcome = "answered", words: str = "", asked: int = 1) -> list[Behaviour]:
    """Behaviours of a server that is asked for yes or no, and for numbers; `content` has 1, 0, 1 somewhere."""
    return [
        Behaviour(f"{question}: {name}", says(content), outcome, words, asked, question=question)
        for question in ("detection", "simulation")
    ]


def always(sent: Sent | None) -> Callable[[int, Any], Sent | None]:
    return lambda n, body: sent


def once(sent: Sent | None) -> Callable[[int, Any], Sent | None]:
    return lambda n, body: sent if n == 0 else FINE


def error(message: Any, status: int = 400, *headers: str) -> Sent:
    return as_json({"error": {"message": message, "type": "x", "code": None}}, status, *headers)


def refuses(*parameters: str, message: str | None = None, status: int = 400) -> Callable[[int, Any], Sent]:
    """Refuse the first of some parameters that a request has, by its name or with a message."""

    def serve(n: int, body: dict[str, Any]) -> Sent:
        found = next((name for name in parameters if name in body), None)
        return FINE if found is None else error(message or f"Unsupported parameter: '{found}'.", status)

    return serve


def no_system(n: int, body: dict[str, Any]) -> Sent:
    return error("System role not supported") if body["messages"][0]["role"] == "system" else FINE


def usage(value: Any) -> Callable[[int, Any], Sent]:
    return always(as_json(completion({"role": "assistant", "content": GOOD}, usage=value)))


def thinking(name: str, text: str) -> Behaviour:
    return Behaviour(f"thinks: {name}", says(text), "answered")


LATER = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
BEFORE = format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)
ONE_BY_ONE = ("max_tokens", "temperature", "seed", "response_format")
TOO_LONG = "This model's maximum context length is 8 tokens"
STREAM = b'data: {"choices": [{"index": 0, "delta": {"content": "verbi"}}]}\n\ndata: [DONE]\n\n'
PLAIN = json.loads(FINE.body)

BEHAVIOURS = [
    # --- thinking --------------------------------------------------------------------------------------------------
    thinking("<think>draft</think> answer", f"<think>{DRAFT}</think>\n{GOOD}"),
    thinking("the opening tag is left out", f"{DRAFT} hmm</think>{GOOD}"),
    thinking("a tag with an attribute", f"<think time=1>{DRAFT}</think>{GOOD}"),
    thinking("a tag in capitals", f"<Think>{DRAFT}</THINK>{GOOD}"),
    thinking("<thinking>", f"<thinking>{DRAFT}</thinking>{GOOD}"),
    thinking("<reasoning>, and a fenced answer", f"<reasoning>{DRAFT}</reasoning>```json\n{GOOD}\n```"),
    thinking("[THINK]", f"[THINK]{DRAFT}[/THINK]{GOOD}"),
    thinking("◁think▷ (Kimi)", f"◁think▷{DRAFT}◁/think▷{GOOD}"),
    thinking("<seed:think> (Seed)", f"<seed:think>{DRAFT}</seed:think>{GOOD}"),
    thinking("<|START_THINKING|> (Command)", f"<|START_THINKING|>{DRAFT}<|END_THINKING|>{GOOD}"),
    thinking("<|begin_of_thought|>", f"<|begin_of_thought|>{DRAFT}<|end_of_thought|>{GOOD}"),
    thinking("nested", f"<think>a <think>{DRAFT}</think> b {DRAFT}</think>{GOOD}"),
    thinking("again after the answer, without an end", f"{GOOD}<think>{DRAFT}"),
    thinking(
        "channels (gpt-oss)",
        f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>{GOOD}<|return|>",
    ),
    thinking("channels whose signs are left out", f"analysis{DRAFT} no, meglio:assistantfinal{GOOD}"),
    thinking("a draft in prose", f"Prima idea: {DRAFT}. No: {GOOD}"),
    Behaviour("thinks: in reasoning_content", says(GOOD, reasoning_content=DRAFT), "answered"),
    Behaviour("thinks: in reasoning and reasoning_details", says(GOOD, reasoning=DRAFT), "answered"),
    Behaviour(
        "thinks: in a part of its own (Mistral)",
        says([{"type": "thinking", "thinking": [{"type": "text", "text": DRAFT}]}, {"type": "text", "text": GOOD}]),
        "answered",
    ),
    Behaviour(
        "thinks: in a part with a text",
        says([{"type": "text", "text": GOOD}, {"type": "reasoning", "text": DRAFT}]),
        "answered",
    ),
    Behaviour("thinks: without an end", says(f"<think>{DRAFT}"), "unreadable", EMPTY, 2),
    Behaviour("thinks: in its channel alone", says(f"<|channel|>analysis<|message|>{DRAFT}"), "unreadable", EMPTY, 2),
    Behaviour("thinks: in reasoning_content alone", says(None, reasoning_content=f"{DRAFT}"), "unreadable", EMPTY, 2),
    Behaviour("thinks until the token limit", says(f"<think>{DRAFT}", "length"), "unreadable", LENGTH),
    Behaviour("thinks until the token limit, without tags", says(f"Idea: {DRAFT}", "length"), "unreadable", LENGTH),
    Behaviour("thinks until the token limit, elsewhere", says("", "length"), "unreadable", LENGTH),
    Behaviour("thinks until the token limit, content null", says(None, "length"), "unreadable", LENGTH),
    # --- the form of an answer ---------------------------------------------------------------------------------------
    Behaviour("the object asked for", says(GOOD), "answered"),
    Behaviour("the object, and the token limit at its end", says(GOOD, "length"), "answered"),
    Behaviour("a fence around it", says(f"Ecco:\n```json\n{GOOD}\n```\nSpero che aiuti!"), "answered"),
    Behaviour("single quotes and a comma too many", says("{'spiegazione': 'verbi al futuro',}"), "answered"),
    Behaviour("another language's key", says('{"explanation": "verbi al futuro"}'), "answered"),
    Behaviour("a plain sentence", says(f"**Spiegazione:** {RIGHT}"), "answered"),
    Behaviour("one more key before it", says('{"note": "x", "spiegazione": "verbi al futuro"}'), "answered"),
    Behaviour("content in parts", says([{"type": "text", "text": t} for t in (GOOD[:9], GOOD[9:])]), "answered"),
    Behaviour("content as an object", says({"spiegazione": RIGHT}), "answered"),
    Behaviour("content with half a letter", says(f"{GOOD} \ud800"), "answered"),
    Behaviour("an object that does not end", says('{"spiegazione": "verbi'), "unreadable", FORM, 2),
    Behaviour("two texts, neither named", says('{"a": "nomi", "b": "verbi"}'), "unreadable", FORM, 2),
    Behaviour("a list of numbers", says("[1, 0, 1]"), "unreadable", FORM, 2),
    Behaviour("a number", says(7), "unreadable", EMPTY, 2),
    Behaviour("a number of 5,000 digits", says(f"[{'9' * 5000}]"), "unreadable", FORM, 2),
    Behaviour("a thousand open brackets", says("[" * 1000), "unreadable", FORM, 2),
    Behaviour("an essay", says("parole " * 500), "unreadable", FORM, 2),
    Behaviour("sixteen thousand empty lines", says("\n" * 16_000), "unreadable", EMPTY, 2),
    Behaviour("content empty", says(""), "unreadable", EMPTY, 2),
    Behaviour("content null", says(None), "unreadable", EMPTY, 2),
    Behaviour("message null", always(as_json(completion(None))), "unreadable", EMPTY, 2),
    Behaviour("no message", always(as_json({"choices": [{"index": 0}]})), "unreadable", EMPTY, 2),
    Behaviour(
        "a tool call",
        says(None, "tool_calls", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": GOOD}}]),
        "unreadable",
        EMPTY,
        2,
    ),
    Behaviour("a refusal by the model", says(None, refusal="I cannot help"), "unreadable", "refused: I cannot help"),
    Behaviour("a content filter", says("", "content_filter"), "unreadable", "refused: content filter"),
    # --- usage ---------------------------------------------------------------------------------------------------------
    Behaviour("usage null", always(as_json({"choices": PLAIN["choices"], "usage": None})), "answered"),
    Behaviour("no usage", always(as_json({"choices": PLAIN["choices"]})), "answered"),
    Behaviour("usage as a text", usage("7"), "answered"),
    Behaviour("usage below 0", usage({"prompt_tokens": -9_000_000, "completion_tokens": 1}), "answered"),
    Behaviour("usage beyond reason", usage({"prompt_tokens": 1, "completion_tokens": 10**9}), "answered"),
    Behaviour("usage with fractions", usage({"prompt_tokens": 1.5, "completion_tokens": "2"}), "answered"),
    # --- parameters ----------------------------------------------------------------------------------------------------
    Behaviour("refuses max_tokens", refuses("max_tokens"), "answered", asked=2),
    Behaviour("refuses another temperature than 1", refuses("temperature"), "answered", asked=2),
    Behaviour("refuses seed", refuses("seed"), "answered", asked=2),
    Behaviour("refuses response_format", refuses("response_format"), "answered", asked=2),
    Behaviour("refuses all four, one by one", refuses(*ONE_BY_ONE), "answered", asked=5),
    Behaviour(
        "refuses all four in one sentence",
        refuses(*ONE_BY_ONE, message="Unsupported: max_tokens, temperature, seed, response_format"),
        "answered",
        asked=5,
    ),
    Behaviour(
        "refuses a schema without a word", refuses("response_format", message="Bad Request"), "answered", asked=2
    ),
    Behaviour(
        "answers 500 to a schema", refuses("response_format", message="grammar", status=500), "answered", asked=3
    ),
    Behaviour("has no system role", no_system, "answered", asked=2),
    Behaviour(
        "refuses a parameter that was asked for",
        refuses("reasoning_effort", message="reasoning_effort 'max' is not supported"),
        "stopped",
        "reasoning_effort 'max' is not supported",
        None,
        ("reasoning_effort=max",),
    ),
    # --- refusals ------------------------------------------------------------------------------------------------------
    Behaviour("401", always(error("Incorrect API key provided", 401)), "stopped", "Incorrect API key provided"),
    Behaviour("401 as a page", always(page("Authorization Required", 401)), "stopped", "Authorization Required"),
    Behaviour("402", always(error("Insufficient credits", 402)), "stopped", "Insufficient credits"),
    Behaviour("403 as a page", always(page("Access denied", 403)), "stopped", "Access denied"),
    Behaviour("404", always(as_json({"detail": "Not Found"}, 404)), "stopped", "Not Found"),
    Behaviour("400 for every question", always(error("policy violation")), "stopped", "policy violation", 2),
    Behaviour("400 as a page", always(page("Bad Request", 400)), "stopped", "Bad Request", 2),
    Behaviour("405", always(as_json({"message": "Method Not Allowed"}, 405)), "stopped", "Method Not Allowed", 2),
    Behaviour(
        "422 with a list of details",
        always(as_json({"detail": [{"loc": ["body"], "msg": "value is wrong"}]}, 422)),
        "stopped",
        "value is wrong",
        2,
    ),
    Behaviour("501", always(error("Not implemented here", 501)), "stopped", "Not implemented here", None),
    Behaviour("the prompt is too long", always(error(TOO_LONG)), "stopped", TOO_LONG),
    Behaviour("413 as a page", always(page("Request Entity Too Large", 413)), "stopped", "Request Entity Too Large"),
    Behaviour(
        "307 to another host",
        always(Sent(b"", 307, ("Location: http://127.0.0.1:1/v1/chat/completions",))),
        "stopped",
        "sends on to http://127.0.0.1:1/v1/chat/completions",
    ),
    Behaviour("301 to https", always(Sent(b"", 301, ("Location: https://x/v1",))), "stopped", "sends on to https://x"),
    Behaviour("302 without a place", always(Sent(b"", 302, ())), "stopped", "sends on to ?"),
    # --- 200, and no answer ----------------------------------------------------------------------------------------------
    Behaviour("200 with an error", always(error("in manutenzione", 200)), "stopped", "in manutenzione", 2),
    Behaviour("200 with a text as error", always(as_json({"error": "overloaded"})), "stopped", "overloaded", 2),
    Behaviour("200 without choices", always(as_json({"id": "x", "choices": []})), "stopped", "no chat completion", 2),
    Behaviour("200 with choices null", always(as_json({"choices": None})), "stopped", "no chat completion", 2),
    Behaviour("200 with a list", always(as_json([])), "stopped", "no chat completion", 2),
    Behaviour("200 with nothing", always(Sent(b"")), "stopped", "no chat completion", 2),
    Behaviour("204", always(Sent(b"", 204, ())), "stopped", "no chat completion", 2),
    Behaviour("200 with a page", always(page("Sign in to the network", 200)), "stopped", "Sign in to the network", 2),
    Behaviour("a stream nobody asked for", always(Sent(STREAM)), "stopped", "no chat completion", 2),
    Behaviour("an answer of 20 MB", always(Sent(b" " * 20_000_000)), "stopped", "longer than", 2),
    Behaviour("JSON a thousand deep", always(Sent(b"[" * 100_000)), "stopped", "no chat completion", 2),
    # --- busy, broken, slow ------------------------------------------------------------------------------------------------
    Behaviour("429, Retry-After 0", once(error("busy", 429, "Retry-After: 0")), "answered", asked=2),
    Behaviour("429, Retry-After 0.01", once(error("busy", 429, "Retry-After: 0.01")), "answered", asked=2),
    Behaviour(
        "429, Retry-After a date that is past", once(error("b", 429, f"Retry-After: {BEFORE}")), "answered", asked=2
    ),
    Behaviour("429, Retry-After no number", once(error("busy", 429, "Retry-After: soon")), "answered", asked=2),
    Behaviour("429, Retry-After below 0", once(error("busy", 429, "Retry-After: -5")), "answered", asked=2),
    Behaviour("429, retry-after-ms", once(error("busy", 429, "retry-after-ms: 5")), "answered", asked=2),
    Behaviour("429 without Retry-After", once(error("busy", 429)), "answered", asked=2),
    Behaviour("429 for an hour", always(error("b", 429, "Retry-After: 3600")), "stopped", "asks to wait 3600 s", None),
    Behaviour("429 until a date", always(error("b", 429, f"Retry-After: {LATER}")), "stopped", f"wait {LATER}", None),
    Behaviour("429 for good", always(error("You exceeded your quota", 429)), "stopped", "You exceeded your quota", 2),
    Behaviour("408 once", once(error("timeout", 408)), "answered", asked=2),
    Behaviour("409 once", once(error("conflict", 409)), "answered", asked=2),
    Behaviour("500 once", once(error("oops", 500)), "answered", asked=2),
    Behaviour("502 once, without a body", once(Sent(b"", 502, ())), "answered", asked=2),
    Behaviour("503 once, as a page", once(page("Service Unavailable", 503)), "answered", asked=2),
    Behaviour("500 for good", always(error("CUDA out of memory", 500)), "stopped", "CUDA out of memory", None),
    Behaviour("the line cut once", once(None), "answered", asked=2),
    Behaviour("the line cut always", always(None), "stopped", "does not answer", 2),
    Behaviour("half an answer once", once(FINE._replace(cut=30)), "answered", asked=2),
    Behaviour("broken JSON once", once(Sent(b'{"choices": [{"index"')), "answered", asked=2),
    Behaviour("late once", once(FINE._replace(late=3.0)), "answered", asked=2),
    Behaviour("late always", always(FINE._replace(late=3.0)), "stopped", "no answer within 0.6 s", 2),
    Behaviour("headers by drops, in time", always(FINE._replace(drip=0.001, slow_head=True, piece=40)), "answered"),
    Behaviour(
        "headers by drops, without an end",
        always(FINE._replace(drip=0.05, slow_head=True)),
        "stopped",
        "no answer within 0.6 s",
        2,
    ),
    Behaviour("by drops, in time", always(FINE._replace(drip=0.001, piece=40)), "answered"),
    Behaviour("by drops, without an end", always(FINE._replace(drip=0.05)), "stopped", "no answer within 0.6 s", 2),
    # --- how a body is wrapped -----------------------------------------------------------------------------------------------
    Behaviour(
        "gzip", always(Sent(gzip.compress(FINE.body), headers=(*FINE.headers, "Content-Encoding: gzip"))), "answered"
    ),
    Behaviour("gzip that is none, once", once(FINE._replace(headers=("Content-Encoding: gzip",))), "answered", asked=2),
    Behaviour("no Content-Length", always(FINE._replace(length=False)), "answered"),
    Behaviour("no Content-Type", always(FINE._replace(headers=())), "answered"),
    Behaviour("Content-Type text/plain", always(FINE._replace(headers=("Content-Type: text/plain",))), "answered"),
    Behaviour("a byte order mark", always(FINE._replace(body=b"\xef\xbb\xbf" + FINE.body)), "answered"),
    Behaviour("blank lines before it", always(FINE._replace(body=b"\n \n" + FINE.body)), "answered"),
    # --- other questions ---------------------------------------------------------------------------------------------------
    *numbers("the object asked for", '{"risposte": [1, 0, 1]}'),
    *numbers("after thinking", '<think>{"risposte": [0, 0, 0]}?</think>{"risposte": [1, 0, 1]}'),
    *numbers("a fence, single quotes, a comma too many", "```json\n{'valori': [1, 0, 1,]}\n```"),
    *numbers("by number", '{"1": 1, "2": 0, "3": 1}'),
    *numbers("one object for each", '[{"1": 1}, {"2": 0}, {"3": 1}]'),
    *numbers("numbered lines", "1. 1\n2. 0\n3. 1"),
    *numbers("numbers as texts", '["1", "0", "1.0"]'),
    Behaviour("detection: yes and no", says('["sì", "no", "Sì."]'), "answered", question="detection"),
    Behaviour("detection: true and false", says("[true, false, true]"), "answered", question="detection"),
    *numbers("one too few", "[1, 0]", "unreadable", PROBLEMS["count"], 2),
    *numbers("one too many", "[1, 0, 1, 1]", "unreadable", PROBLEMS["count"], 2),
    *numbers("a number that was not asked for", "[1, 0, 11]", "unreadable", PROBLEMS["value"], 2),
    *numbers("a fraction", "[1, 0, 0.5]", "unreadable", PROBLEMS["value"], 2),
    *numbers("nothing for one", "[1, 0, null]", "unreadable", PROBLEMS["value"], 2),
    *numbers("prose", "Mi dispiace, non posso.", "unreadable", FORM, 2),
    *numbers("a list that does not end", "[1, 0,", "unreadable", FORM, 2),
    *numbers("nothing", None, "unreadable", EMPTY, 2),
]
