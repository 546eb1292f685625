"""Read what a model answered: strictly where it kept to the form, leniently where it nearly did.

Every reader returns what it found, or raises `Unusable` with a reason. Nothing is guessed: a list of the wrong length is
not cut to fit, and a word that is neither yes nor no is no answer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sae_italian.autointerp.llm.ledger import Reply, TokenLogprobs

LONGEST_EXPLANATION = 600  # characters
_YES = {"1", "true", "yes", "sì", "si", "y", "s"}
_NO = {"0", "false", "no", "n"}


@dataclass
class Unusable(Exception):  # noqa: N818
    """`name` is the problem's name in the prompts, `values` what goes into its text."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)


def explanation_schema(key: str) -> dict[str, Any]:
    return _object(key, {"type": "string"})


def numbers_schema(key: str, n: int, top: int) -> dict[str, Any]:
    items = {"type": "integer", "minimum": 0, "maximum": top}
    return _object(key, {"type": "array", "items": items, "minItems": n, "maxItems": n})


def _object(key: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {key: value}, "required": [key], "additionalProperties": False}


def read_explanation(reply: Reply) -> str:
    """Return the one string that an answer holds; a plain sentence is taken as it is, a broken object is not.

    Raises: Unusable.
    """
    text = _without_thoughts(reply.text)
    value = _first_json(text)
    if isinstance(value, dict):
        strings = [part for part in value.values() if isinstance(part, str) and part.strip()]
        if len(strings) != 1:
            raise Unusable("json")
        text = strings[0]
    elif isinstance(value, str):
        text = value
    elif value is not None or "{" in text or "[" in text:
        raise Unusable("json")
    text = re.sub(r"^\W*(spiegazione|explanation)\W*:\s*", "", text.strip(), flags=re.IGNORECASE)
    text = " ".join(text.split()).strip(" *`")
    if not text:
        raise Unusable("empty")
    if len(text) > LONGEST_EXPLANATION or reply.finish == "length":
        raise Unusable("json")
    return text


def read_numbers(reply: Reply, n: int, top: int) -> Int[np.ndarray, " n"]:
    """Return n whole numbers from 0 to `top` (yes and no count as 1 and 0 where top is 1). Raises: Unusable."""
    text = _without_thoughts(reply.text)
    if not text.strip():
        raise Unusable("empty")
    found = _list_of(_first_json(text))
    if found is None:
        found = _loose_list(text)
    if found is None:
        raise Unusable("json")
    if len(found) != n:
        raise Unusable("count", {"found": len(found), "expected": n})
    return np.array([_number(one, top) for one in found], dtype=np.int64)


def _number(value: Any, top: int) -> int:
    if isinstance(value, dict):  # {"1": 0} or {"token": "il", "value": 3}
        numbers = [one for one in value.values() if isinstance(one, int | float)]
        value = numbers[0] if len(numbers) == 1 else None
    if top == 1 and isinstance(value, bool | str):
        word = str(value).strip().strip(".").lower()
        if word in _YES or word in _NO:
            return int(word in _YES)
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.0+)?\s*", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unusable("value", {"allowed": f"0-{top}"})
    if value != int(value) or not 0 <= value <= top:
        raise Unusable("value", {"allowed": f"0-{top}"})
    return int(value)


def _list_of(value: Any) -> list[Any] | None:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list)]
        if len(lists) == 1:
            return lists[0]
        if value and all(str(key).strip().isdigit() for key in value):  # {"1": 0, "2": 1}
            ordered = sorted(value, key=int)
            if [int(key) for key in ordered] == list(range(1, len(ordered) + 1)):
                return [value[key] for key in ordered]
    return None


def _loose_list(text: str) -> list[str] | None:
    """Return the answers of numbered lines: `1. sì`, `2: 0`, counted from 1 without a gap."""
    lines = re.findall(r"^\W*(\d+)\W*[.:)]\W*([\wì]+)\W*$", text, flags=re.MULTILINE)
    if lines and [int(number) for number, _ in lines] == list(range(1, len(lines) + 1)):
        return [answer for _, answer in lines]
    return None


def _without_thoughts(text: str) -> str:
    """Return the text without what a reasoning model thought aloud."""
    return re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL)


def _first_json(text: str) -> Any:
    """Return the first JSON object or list in a text, with single quotes and trailing commas forgiven; None without."""
    for candidate in (text, re.sub(r",\s*([}\]])", r"\1", text), re.sub(r",\s*([}\]])", r"\1", text.replace("'", '"'))):
        for found in re.finditer(r"[\[{]", candidate):
            try:
                return json.JSONDecoder().raw_decode(candidate, found.start())[0]
            except json.JSONDecodeError:
                continue
    return None


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
    places = [(lists[-1].start() + m.start(), m[0]) for m in re.finditer(r"\d+", lists[-1][0])]
    if [int(digits) for _, digits in places] != list(values):
        return None
    starts = np.cumsum([0, *(len(token.token) for token in tokens)])
    found = []
    for place, digits in places:
        index = int(np.searchsorted(starts, place, side="right")) - 1
        token, inside = tokens[index], place - int(starts[index])
        found.append(_distribution(token, inside, int(digits), top))
    return found


def _distribution(token: TokenLogprobs, inside: int, value: int, top: int) -> Float[np.ndarray, " values"]:
    """Return the distribution over 0..top at one token, the number starting at its character `inside`."""
    weights = np.zeros(top + 1)
    lead = token.token[:inside]
    for text, logprob in ({token.token: token.logprob} | token.top).items():
        if text == token.token:  # what was said, although it may go on in the next token (1|0)
            number = value
        else:
            match = re.match(r"\s*(\d+)", text[len(lead) :] if text.startswith(lead) else text)
            number = int(match[1]) if match else -1
        if 0 <= number <= top:
            weights[number] += math.exp(logprob)
    return weights / weights.sum()
