"""Ask, and read what a model answered: strictly where it kept to the form, leniently where it nearly did.

What a model thought aloud is left out, and of several answers the last complete one counts. Every reader returns what it
found, or raises `Unusable` with a reason. Nothing is guessed: a list of the wrong length is not cut to fit, and a word
that is neither yes nor no is no answer. Every step takes time in proportion to the answer's length.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sae_italian.autointerp.llm.client import Client
from sae_italian.autointerp.llm.cost import DryClient
from sae_italian.autointerp.llm.ledger import Reply, Request, TokenLogprobs
from sae_italian.autointerp.llm.prompts import load_prompts

LONGEST_EXPLANATION = 600  # characters
LONGEST_LINE = 100  # of a numbered yes or no
EXPLANATION_KEYS = ("spiegazione", "explanation")
_YES = {"1", "true", "yes", "sì", "si", "y", "s"}
_NO = {"0", "false", "no", "n"}
_THOUGHT = r"think|thinking|thoughts?|reason|reasoning|analysis|reflection|scratchpad"
_TAG = rf"[<◁\[]\|?(/|end_(?:of_)?)?(?:begin_of_|start_|seed:)?(?:{_THOUGHT})(?:\s[^<>]{{0,200}})?\|?[>▷\]]"
_TAGS = re.compile(_TAG, re.IGNORECASE)
_CLOSING = {"}": "{", "]": "["}


PROBLEMS = {  # why an answer cannot be used
    "length": "cut at the token limit (finish_reason length); max_output_tokens=N gives more room",
    "empty": "nothing is said",
    "json": "the form asked for cannot be found in it",
    "count": "another number of values than asked for",
    "value": "a value that was not asked for",
}


@dataclass
class Unusable(Exception):  # noqa: N818
    """`name` is one of PROBLEMS, which but for `length` the prompts know too; `values` go into the text there."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)


def schema(key: str, n: int | None = None, top: int = 0) -> dict[str, Any]:
    """Return the JSON schema of an object with one text, or with n whole numbers from 0 to `top`."""
    whole = {"type": "integer", "minimum": 0, "maximum": top}
    value = {"type": "string"} if n is None else {"type": "array", "items": whole, "minItems": n, "maxItems": n}
    return {"type": "object", "properties": {key: value}, "required": [key], "additionalProperties": False}


def read_explanation(reply: Reply) -> str:
    """Return the one text that an answer holds; a plain sentence is taken as it is, a broken object is not.

    Raises: Unusable.
    """
    text = _answer(reply)
    if "{" in text or "[" in text:
        found = next((value for value in _values(text) if isinstance(value, dict)), {})
        strings = {str(key).lower(): part for key, part in found.items() if isinstance(part, str) and part.strip()}
        named = [strings[key] for key in EXPLANATION_KEYS if key in strings] or list(strings.values())
        if len(named) != 1:
            raise Unusable("json")
        text = named[0]
    text = re.sub(rf"^\W*({'|'.join(EXPLANATION_KEYS)})\W*:\s*", "", text.strip(), flags=re.IGNORECASE)
    text = " ".join(text.split()).strip(" *`")
    if not any(letter.isalpha() for letter in text):
        raise Unusable("empty")
    if len(text) > LONGEST_EXPLANATION:
        raise Unusable("json")
    return text


def read_numbers(reply: Reply, n: int, top: int) -> Int[np.ndarray, " n"]:
    """Return n whole numbers from 0 to `top` (yes and no count as 1 and 0 where top is 1). Raises: Unusable."""
    text = _answer(reply)
    lists = (_list_of(value) for value in _values(text))
    found = next((one for one in lists if one is not None), None) or _numbered_lines(text)
    if not found:
        raise Unusable("json")
    if len(found) != n:
        raise Unusable("count", {"found": len(found), "expected": n})
    return np.array([_number(one, top) for one in found], dtype=np.int64)


def _answer(reply: Reply) -> str:
    """Return what was said after any thinking. Raises: Unusable for nothing, and for what the token limit cut off."""
    text = _without_thoughts(reply.text).strip()
    if reply.finish == "length" and _decoded(text) is None:  # what stands before the cut may be a draft
        raise Unusable("length")
    if not text:
        raise Unusable("empty")
    return text


def _without_thoughts(text: str) -> str:
    """Return what follows the last thought; thinking that never ends leaves nothing.

    Some servers leave out the opening tag, so that all before a closing one is thought. gpt-oss answers in channels, of
    which the final one counts.
    """
    *_, last = channels = text.split("<|channel|>")
    if len(channels) > 1:
        name, _, said = last.partition("<|message|>")
        return re.split(r"<\|\w+\|>", said)[0] if name.strip().startswith("final") else ""
    start, stop = 0, len(text)
    for tag in _TAGS.finditer(text):
        if tag[1]:
            start, stop = tag.end(), len(text)
        else:
            stop = min(stop, tag.start())
    return text[start:stop]


def _values(text: str) -> Iterator[Any]:
    """Yield the JSON objects and lists of a text that stand in no other, the last one first.

    Single quotes and trailing commas are forgiven.
    """
    found = list(_spans(text, strings=True)) or list(_spans(text, strings=False))
    for start, stop in reversed(found):
        if (value := _decoded(text[start:stop])) is not None:
            yield value


def _spans(text: str, *, strings: bool) -> list[tuple[int, int]]:
    """Return where brackets open and close again, the outermost only; with `strings` those inside quotes are text."""
    found: list[tuple[int, int]] = []
    opened: list[int] = []
    inside = {"{": 0, "[": 0}
    quoted = escaped = False
    for i, sign in enumerate(text):
        if quoted:
            quoted, escaped = escaped or sign != '"', not escaped and sign == "\\"
        elif sign == '"' and strings and opened:
            quoted = True
        elif sign in inside:
            opened.append(i)
            inside[sign] += 1
        elif sign in _CLOSING and inside[_CLOSING[sign]]:
            while True:  # what was opened after the partner never closed
                start = opened.pop()
                inside[text[start]] -= 1
                if text[start] == _CLOSING[sign]:
                    break
            while found and found[-1][0] > start:
                found.pop()
            found.append((start, i + 1))
    return found


def _decoded(text: str) -> Any:
    """Return the value of a JSON text, or of a Python literal; None for neither."""
    for read in (json.loads, lambda given: json.loads(re.sub(r",(\s*[}\]])", r"\1", given)), ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # a literal's odd escapes
                return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def _list_of(value: Any) -> list[Any] | None:
    """Return a list, the one list in an object, or the values of an object that counts from 1."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return None
    lists = [part for part in value.values() if isinstance(part, list)]
    if len(lists) == 1:
        return lists[0]
    counted = {str(key).strip(): part for key, part in value.items()}
    wanted = [str(number) for number in range(1, len(counted) + 1)]
    return [counted[key] for key in wanted] if set(wanted) == set(counted) else None


def _number(value: Any, top: int) -> int:
    if isinstance(value, dict):  # {"1": 0} or {"token": "il", "value": 3}
        numbers = [one for one in value.values() if isinstance(one, int | float)]
        value = numbers[0] if len(numbers) == 1 else None
    if top == 1 and isinstance(value, bool | str):
        word = str(value).strip().strip(".").lower()
        if word in _YES or word in _NO:
            return int(word in _YES)
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,4}(\.0{1,4})?\s*", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= top or value != int(value):
        raise Unusable("value", {"allowed": f"0-{top}"})
    return int(value)


def _numbered_lines(text: str) -> list[str] | None:
    """Return the answers of numbered lines: `1. sì`, `2: 0`, counted from 1 without a gap."""
    lines = [line.strip() for line in text.splitlines()]
    found = [re.fullmatch(r"\W*(\d+)\W*[.:)]\W*(\w+)\W*", line) for line in lines if len(line) <= LONGEST_LINE]
    answers = [(match[1], match[2]) for match in found if match]
    counted = [number for number, _ in answers] == [str(number) for number in range(1, len(answers) + 1)]
    return [answer for _, answer in answers] if answers and counted else None


# --- asking, and asking once more -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a question came to: the value that was read, or the problem with it."""

    reply: Reply
    value: Any = None
    problem: Unusable | None = None
    repaired: str = ""  # the problem that the answer before this one had

    @property
    def again(self) -> bool:
        """Return whether a rerun asks again: the server failed, or left no room to answer."""
        return not self.reply.ok or self.problem is not None and self.problem.name == "length"

    @property
    def why(self) -> str:
        """Return why there is no value."""
        if not self.reply.ok:
            return self.reply.status
        if self.reply.refusal:
            return f"refused: {self.reply.refusal}"
        return "" if self.problem is None else PROBLEMS[self.problem.name]


class Asker:
    """One who asks a model through a client. Safe to use from several threads."""

    def __init__(self, client: Client | DryClient):
        self.client, self.config, self.concurrency = client, client.settings, client.concurrency
        self.prompts = load_prompts(self.config.language)
        self.name = f"llm:{client.model}:{self.prompts.name}"
        self.prompt = f"{self.prompts.name}-{self.prompts.hash}"

    def answers(self, requests: Sequence[Request], readers: Sequence[Callable[[Reply], Any]]) -> list[Answer]:
        """Ask all at once, and once more, with what is wrong with it, what is answered and cannot be read."""
        found = [_read(*both) for both in zip(self.client.ask(requests), readers, strict=True)]
        todo = {
            i: one.problem for i, one in enumerate(found) if not one.again and not one.reply.refusal and one.problem
        }
        repairs = [self._repair(requests[i], found[i].reply, problem) for i, problem in todo.items()]
        for (i, problem), reply in zip(todo.items(), self.client.ask(repairs), strict=True):
            found[i] = replace(_read(reply, readers[i]), repaired=problem.name)
        for one in found:
            if one.problem is not None and one.reply.ok and isinstance(self.client, Client):
                self.client.count("unreadable", one.why)
        return found

    def _repair(self, request: Request, reply: Reply, problem: Unusable) -> Request:
        ((key, value),) = (request.schema or {})["properties"].items()
        form = f'{{"{key}": [...]}}' if value["type"] == "array" else f'{{"{key}": "..."}}'
        messages = self.prompts.repair(request.messages, reply.text, form, problem.name, **problem.values)
        return replace(request, messages=messages, purpose="repair")


def _read(reply: Reply, reader: Callable[[Reply], Any]) -> Answer:
    try:
        return Answer(reply, reader(reply))
    except Unusable as problem:
        return Answer(reply, problem=problem)


# --- log-probabilities -----------------------------------------------------------------------------------------------


def distributions(
    tokens: Sequence[TokenLogprobs], values: Sequence[int], top: int
) -> list[Float[np.ndarray, " values"]] | None:
    """Return, for each number of an answer, the probabilities of 0 to `top` in its place, from the tokens' alternatives.

    The numbers are looked for in the last list of the answer; None when they do not stand there one by one (so that
    nothing is read off the wrong token).
    """
    text = "".join(token.token for token in tokens)
    lists = list(re.finditer(r"\[[\d\s,]*\]", text))
    if not lists:
        return None
    places = [(lists[-1].start() + m.start(), m[0]) for m in re.finditer(r"[0-9]{1,9}", lists[-1][0])]
    if [int(digits) for _, digits in places] != list(values):
        return None
    starts = np.cumsum([0, *(len(token.token) for token in tokens)])
    found = []
    for place, digits in places:
        index = int(np.searchsorted(starts, place, side="right")) - 1
        found.append(_distribution(tokens[index], place - int(starts[index]), int(digits), top))
    return found if np.isfinite(found).all() else None


def _distribution(token: TokenLogprobs, inside: int, value: int, top: int) -> Float[np.ndarray, " values"]:
    """Return the distribution over 0..top at one token, the number starting at its character `inside`."""
    weights = np.zeros(top + 1)
    lead = token.token[:inside]
    for text, logprob in ({token.token: token.logprob} | token.top).items():
        if text == token.token:  # what was said, although it may go on in the next token (1|0)
            number = value
        else:
            match = re.match(r"\s*([0-9]{1,9})", text[len(lead) :] if text.startswith(lead) else text)
            number = int(match[1]) if match else -1
        if 0 <= number <= top:
            weights[number] += math.exp(min(logprob, 0.0))
    with np.errstate(invalid="ignore"):
        return weights / weights.sum()
