"""Those who ask a language model: the explainer, and the judge of yes or no on passages and numbers on tokens.

What they ask are versioned texts, in Italian or in English, around the examples. Servers that keep the state of a prompt's
beginning compute its constant part once per task, and once per latent for a judge: so the order is instructions, worked
examples, explanation, passages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float, Int

from sae_italian.autointerp.examples import Example, LatentExamples
from sae_italian.autointerp.judges import Verdicts
from sae_italian.autointerp.llm.answers import PROBLEMS, Unusable, distributions, read_explanation, read_numbers
from sae_italian.autointerp.llm.calls import TOO_LONG, DryClient, Messages, Reply, Request
from sae_italian.autointerp.llm.client import Client
from sae_italian.autointerp.store import NO_ANSWER, UNANSWERED, Explanation
from sae_italian.base.errors import UsageError
from sae_italian.base.storage import fingerprint

FOLDER = Path(__file__).parent / "data" / "prompts"
LONGEST_QUOTE = 1000  # characters of a bad answer that are sent back
KEYS = {"it": ("spiegazione", "risposte", "valori"), "en": ("explanation", "answers", "values")}
EXPLANATION_TOKENS = 160
LEAST_EXAMPLES = 3
LANGUAGE_LETTERS = 20  # shorter texts are too short to tell a language
UNLIKELY = 0.05  # a text is in another language when the wanted one is less probable than this
_DECIDING = ("language", "shown", "n_shown", "promoted", "context_tokens", "sampling")
STRONGEST = 10  # of a simulated token
ANSWER_TOKENS, NUMBER_TOKENS = 24, 4  # around the numbers of an answer, and for each of them
Numbers = tuple[Int[np.ndarray, " n"], list[Float[np.ndarray, " values"]] | None]


class Prompts:
    """The texts of one language. `name` (language and version) and `hash` say which they were."""

    def __init__(self, texts: dict[str, Any]):
        self._texts = texts
        self.language: str = texts["language"]
        self.name, self.hash = f"{self.language}{texts['version']}", fingerprint(texts)
        self.answer_key, self.list_key, self.values_key = KEYS[self.language]

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
        values: dict[str, Any] = {"explanation": one_line(explanation), "text": one_line(example.text)}
        values["n"] = len(pieces)
        values["tokens"] = numbered(pieces)
        return self._messages("simulation", fill(self._texts["simulation"]["user"], **values))

    def repair(self, messages: Messages, answer: str, form: str, problem: str, **values: object) -> Messages:
        """Ask once more after an answer with a problem, with its values; of a long one only the start is sent back."""
        named = fill(self._texts["problems"][problem], **values)
        text = fill(self._texts["repair"].strip(), problem=named, form=form)
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


@lru_cache
def load_prompts(language: str) -> Prompts:
    """Return the prompts of a language, it or en."""
    return Prompts(yaml.safe_load((FOLDER / f"{language}.yaml").read_text(encoding="utf-8")))


# --- asking, and asking once more -------------------------------------------------------------------------------------


def schema(key: str, n: int | None = None, top: int = 0) -> dict[str, Any]:
    """Return the JSON schema of an object with one text, or with n whole numbers from 0 to `top`."""
    whole = {"type": "integer", "minimum": 0, "maximum": top}
    value = {"type": "string"} if n is None else {"type": "array", "items": whole, "minItems": n, "maxItems": n}
    return {"type": "object", "properties": {key: value}, "required": [key], "additionalProperties": False}


@dataclass(frozen=True)
class Answer:
    """What a question came to: the value that was read, or why there is none."""

    reply: Reply
    value: Any = None
    problem: Unusable | None = None  # of a reply that cannot be read
    why: str = ""
    again: bool = False  # whether a rerun asks again: the server failed, or left no room to answer
    repaired: str = ""  # the problem that the answer before this one had


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
        todo = {i: one.problem for i, one in enumerate(found) if one.problem and not (one.again or one.reply.refusal)}
        repairs = [self._repair(requests[i], found[i].reply, problem) for i, problem in todo.items()]
        for (i, problem), reply in zip(todo.items(), self.client.ask(repairs), strict=True):
            found[i] = replace(_read(reply, readers[i]), repaired=problem.name)
        for one in found:
            if one.problem is not None:
                self.client.count("unreadable", one.why)
        return found

    def _repair(self, request: Request, reply: Reply, problem: Unusable) -> Request:
        ((key, value),) = (request.schema or {})["properties"].items()
        form = f'{{"{key}": [...]}}' if value["type"] == "array" else f'{{"{key}": "..."}}'
        messages = self.prompts.repair(request.messages, reply.text, form, problem.name, **problem.values)
        return replace(request, messages=messages, purpose="repair")


def _read(reply: Reply, reader: Callable[[Reply], Any]) -> Answer:
    if not reply.ok:
        return Answer(reply, why=reply.status, again=True)
    try:
        return Answer(reply, reader(reply))
    except Unusable as problem:
        why = f"refused: {reply.refusal}" if reply.refusal else PROBLEMS[problem.name]
        return Answer(reply, problem=problem, why=why, again=problem.name == "length")


class LLMExplainer(Asker):
    """One explanation per latent, in the language of the client's settings."""

    n_train = property(lambda self: 2 * self.config.n_shown)  # that the shown ones are chosen from

    @property
    def settings(self) -> dict[str, Any]:
        """Return what its explanations depend on, for the store to hold it to."""
        return {"prompt": self.prompt} | {name: getattr(self.config, name) for name in _DECIDING}

    def explain(self, examples: LatentExamples) -> list[Explanation]:
        """Return one explanation. Status: ok; `failed`, when the answer is unusable; `no answer`, to be asked again.

        Raises: UsageError when not even three examples fit into the model's context, or the client's errors.
        """
        shown = chosen(examples.train, self.config.shown, self.config.n_shown)
        explained = partial(Explanation, examples.latent, self.name, rule=None, kind="llm", prompt=self.prompt)
        if not shown:
            return [explained("too few activations", "", "")]
        answer, n = self._asked(examples, shown)
        facts = {"examples_dropped": len(shown) - n, "repaired": answer.repaired}
        notes: dict[str, Any] = {"examples": n} | {name: fact for name, fact in facts.items() if fact}
        if answer.value is None:
            notes["problem"] = answer.why
            notes |= {"answer": answer.reply.text[:500]} if answer.reply.ok else {}
            return [explained(NO_ANSWER if answer.again else "failed", "", "", notes=notes)]
        if other := other_language(answer.value, self.config.language):
            notes["wrong_language"] = other
        texts = (answer.value, "") if self.config.language == "it" else ("", answer.value)
        return [explained("ok", *texts, notes=notes)]

    def _asked(self, examples: LatentExamples, shown: Sequence[Example]) -> tuple[Answer, int]:
        """Ask with as many examples as fit: by our count one less at a time, by the server's refusal half as many."""
        context, room = self.config.context_tokens, self.config.max_output_tokens or EXPLANATION_TOKENS
        n = len(shown)
        while True:
            request = self.request(examples, shown[:n])
            if context is not None and self.client.counter.messages(request.messages) > context - room:
                why, fewer = f"{context} tokens", n - 1
            else:
                (answer,) = self.answers([request], [read_explanation])
                why, fewer = answer.reply.status, n // 2
                if not why.startswith(TOO_LONG):
                    return answer, n
            if n <= LEAST_EXAMPLES:
                raise UsageError(
                    f"even {n} examples do not fit into the context of {self.client.model} ({why}). Use a model with a "
                    "longer one, or give its true context with context_tokens=N."
                )
            n = max(LEAST_EXAMPLES, fewer)

    def request(self, examples: LatentExamples, shown: Sequence[Example]) -> Request:
        """Return the question about a latent with these of its examples."""
        promoted = examples.promoted if self.config.promoted else ()
        messages = self.prompts.explain(shown, examples.maximum, promoted)
        return Request(messages, "explain", EXPLANATION_TOKENS, schema(self.prompts.answer_key))


def chosen(examples: Sequence[Example], draw: str, n: int) -> list[Example]:
    """Return n positives: the strongest, or equally many of each tenth (decile), the strongest first in either case."""

    def strength(example: Example) -> float:
        return -float(example.activations.max(initial=0.0))

    positives = sorted((example for example in examples if example.positive), key=strength)
    if draw == "deciles" and len(positives) > n:
        bins: dict[int, list[Example]] = {}
        for example in positives:
            bins.setdefault(example.decile, []).append(example)
        # round by round the strongest of each tenth that is left, the highest tenth first
        ranked = [(i, -decile, example) for decile, held in bins.items() for i, example in enumerate(held)]
        positives = [example for *_, example in sorted(ranked, key=lambda one: one[:2])]
    return sorted(positives[:n], key=strength)


@lru_cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(["it", "en", "es", "fr", "de", "pt"])
    return identifier


def other_language(text: str, wanted: str) -> str | None:
    """Return the language a text is in when it is clearly not the one wanted; quoted words do not count."""
    bare = re.sub(r"«[^»]*»|\"[^\"]*\"|“[^”]*”", " ", text)
    if sum(letter.isalpha() for letter in bare) < LANGUAGE_LETTERS:
        return None
    ranked = _identifier().rank(bare)
    return str(ranked[0][0]) if dict(ranked)[wanted] < UNLIKELY else None


class LLMJudge(Asker):
    """Judges by an explanation's text, `batch` passages at a time."""

    batch = 5

    @property
    def settings(self) -> dict[str, Any]:
        """Return what its verdicts depend on, for the store to hold it to."""
        return {"prompt": self.prompt, "batch": self.batch, "sampling": self.config.sampling}

    def detect(self, explanation: Explanation, examples: Sequence[Example]) -> Verdicts:
        """Answer batch by batch, all at once; a batch that stays unusable after a repair is asked one by one.

        The examples are all marked (fuzzing) or none is. No usable answer then is -1, and -2 where the server failed or had
        no room to answer, so that a rerun asks again. Raises: the client's errors.
        """
        text = explanation.text(self.config.language)
        question = "fuzzing" if any(example.marks is not None for example in examples) else "detection"
        said, probability = np.full(len(examples), -1, dtype=np.int64), np.full(len(examples), np.nan)
        # in an order that mixes the classes, the same for every explanation of the same examples
        order = np.random.default_rng(0).permutation(len(examples)).tolist()
        for size in dict.fromkeys((self.batch, 1)):
            todo = [i for i in order if said[i] < 0]
            batches = [todo[start : start + size] for start in range(0, len(todo), size)]
            shown = [[examples[i] for i in batch] for batch in batches]
            asked = [(self.prompts.judge(question, text, own), len(own)) for own in shown]
            answers = self._numbers(asked, question, self.prompts.list_key, 1)
            for batch, one in zip(batches, answers, strict=True):
                said[batch], spread = one.value or (UNANSWERED if one.again else -1, None)
                if spread is not None:
                    probability[batch] = [weights[1] for weights in spread]
        return Verdicts(said, probability if np.isfinite(probability).any() else None)

    def simulate(
        self, explanation: Explanation, examples: Sequence[Example]
    ) -> list[Float[np.ndarray, " tokens"] | None]:
        """Return the expected number per token where the server gives log-probabilities, else the number it said."""
        text, levels = explanation.text(self.config.language), np.arange(STRONGEST + 1)
        asked = [(self.prompts.simulate(text, example), len(example.tokens)) for example in examples]
        simulated: list[Float[np.ndarray, " tokens"] | None] = []
        for one in self._numbers(asked, "simulation", self.prompts.values_key, STRONGEST):
            values, spread = one.value or (None, None)
            simulated.append(values if spread is None else np.array([weights @ levels for weights in spread]))
        return simulated

    def _numbers(self, asked: Sequence[tuple[Messages, int]], purpose: str, key: str, top: int) -> list[Answer]:
        """Return the answers to questions for so many numbers each; their values are `Numbers`."""
        requests = [
            Request(messages, purpose, ANSWER_TOKENS + NUMBER_TOKENS * n, schema(key, n, top), logprobs=True)
            for messages, n in asked
        ]
        return self.answers(requests, [partial(_numbers_of, n=n, top=top) for _, n in asked])


def _numbers_of(reply: Reply, n: int, top: int) -> Numbers:
    """Return n numbers and their distributions, None where the reply has none. Raises: Unusable."""
    values = read_numbers(reply, n, top)
    return values, None if reply.logprobs is None else distributions(reply.logprobs, values.tolist(), top)
