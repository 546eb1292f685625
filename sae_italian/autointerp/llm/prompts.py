"""What is asked, in Italian or in English: versioned texts around the examples, the constant part first.

Servers that keep the state of a prompt's beginning then compute it once per task, and once per latent for a judge: the
order is instructions, worked examples, explanation, passages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from sae_italian.autointerp.examples import Example
from sae_italian.base.storage import fingerprint

FOLDER = Path(__file__).parent / "data" / "prompts"
LONGEST_QUOTE = 1000  # characters of a bad answer that are sent back
Question = Literal["detection", "fuzzing"]
Messages = tuple[dict[str, str], ...]


class Prompts:
    """The texts of one language. `name` (language and version) and `hash` say which they were."""

    def __init__(self, texts: dict[str, Any]):
        self._texts = texts
        self.language: str = texts["language"]
        self.name, self.hash = f"{self.language}{texts['version']}", fingerprint(texts)
        self.answer_key = {"it": "spiegazione", "en": "explanation"}[self.language]
        self.list_key = {"it": "risposte", "en": "answers"}[self.language]
        self.values_key = {"it": "valori", "en": "values"}[self.language]

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
        user = fill(texts["user"], examples="\n".join(self._shown(i, e, maximum) for i, e in enumerate(examples, 1)))
        if promoted:
            tokens = ", ".join(f"«{token.strip() or token}»" for token in promoted)
            user = user.rstrip() + "\n" + fill(texts["promoted"], tokens=tokens)
        return self._messages("explain", user)

    def _shown(self, number: int, example: Example, maximum: float) -> str:
        strengths = example.strengths(maximum)
        marks = strengths > 0 if example.marks is None else example.marks
        pieces = [example.text[start:end].strip() for start, end in example.spans.tolist()]
        listed = ", ".join(f"«{pieces[i]}» {strengths[i]}" for i in marks.nonzero()[0])
        shown = fill(self._texts["explain"]["strengths"], strengths=listed)
        return f"{number}. {one_line(example.marked_text())}\n{shown}"

    def judge(self, question: Question, explanation: str, examples: Sequence[Example]) -> Messages:
        """Ask for yes or no on each example; `fuzzing` shows its marks, `detection` does not."""
        shown = [example.marked_text() if question == "fuzzing" else example.text for example in examples]
        listed = "\n".join(f"{number}. {one_line(text)}" for number, text in enumerate(shown, 1))
        values = {"explanation": one_line(explanation), "examples": listed}
        return self._messages(question, fill(self._texts[question]["user"], **values))

    def simulate(self, explanation: str, example: Example) -> Messages:
        """Ask for a number 0 to 10 on each token of one example."""
        pieces = [example.text[start:end] for start, end in example.spans.tolist()]
        listed = "\n".join(f"{number}. «{one_line(piece)}»" for number, piece in enumerate(pieces, 1))
        values = {"explanation": one_line(explanation), "n": len(pieces), "text": one_line(example.text)}
        return self._messages("simulation", fill(self._texts["simulation"]["user"], tokens=listed, **values))

    def repair(self, messages: Messages, answer: str, form: str, problem: str, **values: object) -> Messages:
        """Ask once more after an answer with a problem, with its values; of a long one only the start is sent back."""
        text = fill(self._texts["repair"].strip(), problem=fill(self._texts["problems"][problem], **values), form=form)
        shown = answer.strip()[:LONGEST_QUOTE] or "..."
        return (*messages, {"role": "assistant", "content": shown}, {"role": "user", "content": text})


def without_system(messages: Messages) -> list[dict[str, str]]:
    """Return messages with what the system says at the head of the first question."""
    said = "".join(f"{message['content']}\n\n" for message in messages if message["role"] == "system")
    first, *rest = [message for message in messages if message["role"] != "system"]
    return [{**first, "content": said + first["content"]}, *rest]


def fill(template: str, **values: object) -> str:
    """Put values in the place of {names}, once: braces inside a value stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda found: str(values.get(found[1], found[0])), template)


def one_line(text: str) -> str:
    """Return a passage on one line, so that the numbering stays readable; blanks inside lines are kept."""
    return text.replace("\r", " ").replace("\n", " ⏎ ").strip()


@lru_cache
def load_prompts(language: str) -> Prompts:
    """Return the prompts of a language, it or en."""
    return Prompts(yaml.safe_load((FOLDER / f"{language}.yaml").read_text(encoding="utf-8")))
