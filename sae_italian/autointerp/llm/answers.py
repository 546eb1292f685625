"""What a model is asked in words, and what it answered.

The questions are versioned texts, in Italian or in English, around the examples. Servers that keep the state of a prompt's
beginning compute its constant part once per task, and once per latent for a judge: so the order is instructions, worked
examples, explanation, passages.

Answers are read strictly where they kept to the form, leniently where they nearly did. What a model thought aloud is left out,
and of several answers the last complete one counts. Every reader returns what it found, or raises `Unusable` with a reason.
Nothing is guessed: a list of the wrong length is not cut to fit, and a word that is neither yes nor no is no answer. Every
step takes time in proportion to the answer's length.
"""

import ast
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float, Int

from sae_italian.autointerp.examples import Example
from sae_italian.autointerp.llm.calls import Messages, Reply, TokenLogprobs
from sae_italian.base.storage import fingerprint

FOLDER = Path(__file__).parent / "data" / "prompts"
LONGEST_QUOTE = 1000  # characters of a bad answer that are sent back
KEYS = {"it": ("spiegazione", "risposte", "valori"), "en": ("explanation", "answers", "values")}
LONGEST_EXPLANATION = 600  # characters
LONGEST_LINE = 100  # of a numbered yes or no
EXPLANATION_KEYS = ("spiegazione", "explanation")
_YES, _NO = {"1", "true", "yes", "sì", "si", "y", "s"}, {"0", "false", "no", "n"}
_THOUGHT = r"think|thinking|thoughts?|reason|reasoning|analysis|reflection|scratchpad"
_TAG = rf"[<◁\[]\|?(/|end_(?:of_)?)?(?:begin_of_|start_|seed:)?(?:{_THOUGHT})(?:\s[^<>]{{0,200}})?\|?[>▷\]]"
_TAGS = re.compile(_TAG, re.IGNORECASE)
_PARTNER = {"}": "{", "]": "["}
_BRACKETS = r"[{}\[\]]"
_QUOTED_OR_BRACKETS = r'"(?:[^"\\]|\\.){0,1000}"|' + _BRACKETS  # bounded: quotes may have no end
PROBLEMS = {  # why an answer cannot be used
    "length": "cut at the token limit (finish_reason length); max_output_tokens=N gives more room",
    "empty": "nothing is said",
    "json": "the form asked for cannot be found in it",
    "count": "another number of values than asked for",
    "value": "a value that was not asked for",
}


# --- questions ---------------------------------------------------------------------------------------------------------


class Prompts:
    """The texts of one language, it or en. `name` (language and version) and `hash` say which they were."""

    def __init__(self, language: str):
        self._texts = texts = yaml.safe_load((FOLDER / f"{language}.yaml").read_text(encoding="utf-8"))
        self.name, self.hash = f"{language}{texts['version']}", fingerprint(texts)
        self.answer_key, self.list_key, self.values_key = KEYS[language]

    def _messages(self, task: str, user: str) -> Messages:
        texts = self._texts[task]
        messages = [{"role": "system", "content": texts["system"].strip()}]
        for shot in texts["shots"]:
            messages.append({"role": "user", "content": shot["user"].strip()})
            messages.append({"role": "assistant", "content": shot["assistant"]})
        return (*messages, {"role": "user", "content": user.strip()})

    def explain(self, examples: Sequence[Example], maximum: float, promoted: Sequence[str] = ()) -> Messages:
        """Ask for an explanation from marked examples with strengths 0 to 10; `promoted` is the latent's output."""
        texts = self._texts["explain"]
        user = fill(texts["user"], examples=numbered(self._shown(example, maximum) for example in examples))
        if promoted:
            tokens = ", ".join(f"«{token.strip() or token}»" for token in promoted)
            user = user.rstrip() + "\n" + fill(texts["promoted"], tokens=tokens)
        return self._messages("explain", user)

    def _shown(self, example: Example, maximum: float) -> str:
        strengths = example.strengths(maximum)
        marks = strengths > 0 if example.marks is None else example.marks
        pieces = [example.text[start:end].strip() for start, end in example.spans.tolist()]
        listed = ", ".join(f"«{pieces[i]}» {strengths[i]}" for i in marks.nonzero()[0])
        shown = fill(self._texts["explain"]["strengths"], strengths=listed)
        return f"{one_line(example.marked_text())}\n{shown}"

    def judge(self, question: str, explanation: str, examples: Sequence[Example]) -> Messages:
        """Ask for yes or no on each example; `fuzzing` shows its marks, `detection` does not."""
        shown = (example.marked_text() if question == "fuzzing" else example.text for example in examples)
        values = {"explanation": one_line(explanation), "examples": numbered(map(one_line, shown))}
        return self._messages(question, fill(self._texts[question]["user"], **values))

    def simulate(self, explanation: str, example: Example) -> Messages:
        """Ask for a number 0 to 10 on each token of one example."""
        pieces = [f"«{one_line(example.text[start:end])}»" for start, end in example.spans.tolist()]
        values: dict[str, Any] = {"text": one_line(example.text), "n": len(pieces), "tokens": numbered(pieces)}
        user = fill(self._texts["simulation"]["user"], explanation=one_line(explanation), **values)
        return self._messages("simulation", user)

    def repair(self, messages: Messages, answer: str, form: str, problem: str, **values: object) -> Messages:
        """Ask once more after an answer with a problem, with its values; of a long one only the start is sent back."""
        text = fill(self._texts["repair"].strip(), problem=fill(self._texts["problems"][problem], **values), form=form)
        shown = answer.strip()[:LONGEST_QUOTE] or "..."
        return (*messages, {"role": "assistant", "content": shown}, {"role": "user", "content": text})


def fill(template: str, **values: object) -> str:
    """Put values in the place of {names}, once: braces inside a value stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda found: str(values.get(found[1], found[0])), template)


def numbered(lines: Iterable[str]) -> str:
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


def one_line(text: str) -> str:
    """Return a passage on one line, so that the numbering stays readable; blanks inside lines are kept."""
    return text.replace("\r", " ").replace("\n", " ⏎ ").strip()


# --- answers -----------------------------------------------------------------------------------------------------------


@dataclass
class Unusable(Exception):  # noqa: N818
    """`name` is one of PROBLEMS, which but for `length` the prompts know too; `values` go into the text there."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)


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


def read_numbers(reply: Reply, n: int, top: int) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"] | None]:
    """Return n whole numbers from 0 to `top` (yes and no count as 1 and 0 where top is 1), and the expected number in the
    place of each, None without log-probabilities. Raises: Unusable.
    """
    text = _answer(reply)
    lines = [line for line in text.splitlines() if len(line) <= LONGEST_LINE]
    found = [re.fullmatch(r"\W*(\d+)\W*[.:)]\W*(\w+)\W*", line) for line in lines]
    numbered = {line[1]: line[2] for line in found if line}  # `1. sì`, `2: 0`
    found = next(filter(None, map(_list_of, [*_values(text), numbered])), None)
    if not found:
        raise Unusable("json")
    if len(found) != n:
        raise Unusable("count", {"found": len(found), "expected": n})
    values = np.array([_number(one, top) for one in found], dtype=np.int64)
    spread = None if reply.logprobs is None else distributions(reply.logprobs, values.tolist(), top)
    return values, None if spread is None else spread @ np.arange(top + 1)


def _answer(reply: Reply) -> str:
    """Return what was said after any thinking. Raises: Unusable for nothing, and for what the token limit cut off."""
    text = _without_thoughts(reply.text).strip()
    if reply.finish == "length" and _decoded(text) is None:  # what stands before the cut may be a draft
        raise Unusable("length")
    if not text:
        raise Unusable("empty")
    return text


def _without_thoughts(text: str) -> str:
    """Return what follows the last thought; thinking that never ends leaves nothing. Some servers leave out its opening tag."""
    *_, last = channels = text.split("<|channel|>")
    if len(channels) > 1:  # gpt-oss; the final one counts
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
    """Yield the JSON objects and lists of a text that stand in no other, the last first; some faults are forgiven."""
    for start, stop in reversed(_spans(text, _QUOTED_OR_BRACKETS) or _spans(text, _BRACKETS)):
        if (value := _decoded(text[start:stop])) is not None:
            yield value


def _spans(text: str, signs: str) -> list[tuple[int, int]]:
    """Return where brackets open and close again, the outermost only; `signs` finds the brackets that count."""
    found: list[tuple[int, int]] = []
    opened: list[tuple[str, int]] = []
    inside = {"{": 0, "[": 0}
    for sign in re.finditer(signs, text):
        if sign[0] in inside:
            opened.append((sign[0], sign.start()))
            inside[sign[0]] += 1
        elif inside.get(partner := _PARTNER.get(sign[0], "")):
            bracket, start = "", 0
            while bracket != partner:  # what was opened after the partner never closed
                bracket, start = opened.pop()
                inside[bracket] -= 1
            while found and found[-1][0] > start:
                found.pop()
            found.append((start, sign.end()))
    return found


def _decoded(text: str) -> Any:
    """Return the value of a JSON text, of one with trailing commas, or of a Python literal; None for none of them."""
    for read in (json.loads, lambda given: json.loads(re.sub(r",(\s*[}\]])", r"\1", given)), ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # a literal's odd escapes
                return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def _list_of(value: Any) -> list[Any] | None:
    """Return a list, the one list in an object, or the values of an object that counts from 1."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else None
    lists = [part for part in value.values() if isinstance(part, list)]
    if len(lists) == 1:
        return lists[0]
    counted = {str(key).strip(): part for key, part in value.items()}
    wanted = [str(number) for number in range(1, len(counted) + 1)]
    return [counted[key] for key in wanted] if set(wanted) == set(counted) else None


def _number(value: Any, top: int) -> int:
    """Return a whole number from 0 to `top`, also of `{"1": 0}`, `"3.0"` and, where top is 1, a yes or no. Raises: Unusable."""
    if isinstance(value, dict):  # in {"passage": 1, "answer": "no"} the one number is not the answer
        value = next(iter(value.values())) if len(value) == 1 else None
    near = isinstance(value, str) or (isinstance(value, int | float) and 0 <= value <= top)
    text = str(value).strip() if near else ""
    if top == 1 and (word := text.strip(".").lower()) in _YES | _NO:
        return int(word in _YES)
    whole = re.fullmatch(r"([0-9]{1,4})(\.0{1,4})?", text)
    if whole is None or int(whole[1]) > top:
        raise Unusable("value", {"allowed": f"0-{top}"})
    return int(whole[1])


# --- log-probabilities -----------------------------------------------------------------------------------------------


def distributions(
    tokens: Sequence[TokenLogprobs], values: Sequence[int], top: int
) -> Float[np.ndarray, "numbers values"] | None:
    """Return, for each number of an answer, the probabilities of 0 to `top` in its place, from the tokens' alternatives.

    The numbers are looked for in the last list of the answer; None when they do not stand there one by one (so that
    nothing is read off the wrong token).
    """
    lists = list(re.finditer(r"\[[\d\s,]*\]", "".join(token["token"] for token in tokens)))
    numbers = list(re.finditer(r"[0-9]{1,9}", lists[-1][0])) if lists else []
    if not lists or [int(number[0]) for number in numbers] != list(values):
        return None
    starts, found = np.cumsum([0, *(len(token["token"]) for token in tokens)]), []
    for number, value in zip(numbers, values, strict=True):
        place = lists[-1].start() + number.start()
        index = int(np.searchsorted(starts, place, side="right")) - 1
        found.append(_distribution(tokens[index], place - int(starts[index]), value, top))
    return np.array(found) if np.isfinite(found).all() else None


def _distribution(token: TokenLogprobs, inside: int, value: int, top: int) -> Float[np.ndarray, " values"]:
    """Return the distribution over 0..top at one token, the number starting at its character `inside`."""
    weights, said = np.zeros(top + 1), token["token"]
    lead = said[:inside]
    for text, logprob in ({said: token["logprob"]} | token["top"]).items():
        match = re.match(r"\s*([0-9]{1,9})", text.removeprefix(lead))
        number = int(match[1]) if match else -1
        number = value if text == said else number  # what was said may go on in the next token (1|0)
        if 0 <= number <= top:
            weights[number] += math.exp(min(logprob, 0.0))
    with np.errstate(invalid="ignore"):
        return weights / weights.sum()
