"""The explainer that asks a language model, and what becomes of its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

from sae_italian.autointerp.llm.answers import Unusable, explanation_schema, read_explanation
from sae_italian.autointerp.llm.client import NO_ANSWER, TOO_LONG
from sae_italian.autointerp.llm.ledger import Reply, Request
from sae_italian.autointerp.llm.prices import TokenCounter
from sae_italian.autointerp.llm.prompts import load_prompts
from sae_italian.autointerp.protocols import Example, LatentExamples
from sae_italian.autointerp.store import Explanation
from sae_italian.base.errors import UsageError

EXPLANATION_TOKENS = 160
LEAST_EXAMPLES = 3
LANGUAGE_LETTERS = 20  # shorter texts are too short to tell a language
UNLIKELY = 0.05  # a text is in another language when the wanted one is less probable than this


class Asks(Protocol):
    """A client, or what counts for one."""

    model: str
    concurrency: int
    counter: TokenCounter

    def ask(self, requests: Sequence[Request]) -> list[Reply]: ...


@dataclass(frozen=True)
class ExplainerConfig:
    """What decides the prompt besides its text."""

    language: str = "it"
    draw: Literal["top", "deciles"] = "deciles"
    """Show the strongest training examples, or equally many of each tenth, the strongest first."""
    n_examples: int = 20
    promoted: bool = False
    """Show the tokens that the latent promotes as well: its output, not when it is active."""
    context: int | None = None
    """Tokens that prompt and answer may take together; examples are dropped from the end until they fit."""


class LLMExplainer:
    """One explanation per latent, in one language. Safe to use from several threads."""

    def __init__(self, client: Asks, config: ExplainerConfig | None = None):
        self.client, self.config = client, config or ExplainerConfig()
        self.prompts = load_prompts(self.config.language)
        self.name = f"llm:{client.model}:{self.prompts.name}"
        self.concurrency = client.concurrency
        self.prompt = f"{self.prompts.name}-{self.prompts.hash}"

    @property
    def settings(self) -> dict[str, Any]:
        """Return what its explanations depend on, for the store to hold it to."""
        return {"prompt": self.prompt, **asdict(self.config)}

    def explain(self, examples: LatentExamples) -> list[Explanation]:
        """Return one explanation. Status: ok; `failed`, when the answer is unusable; `no answer`, to be asked again.

        Raises: UsageError when not even three examples fit into the model's context, or the client's errors.
        """
        shown = chosen(examples.train, self.config.draw, self.config.n_examples)
        if not shown:
            return [self._explanation(examples.latent, "too few activations", "")]
        n = self._fitting(examples, shown)
        while True:
            notes: dict[str, Any] = {"examples": n} | ({"examples_dropped": len(shown) - n} if n < len(shown) else {})
            request = self._request(examples, shown[:n])
            reply = self.client.ask([request])[0]
            if not reply.status.startswith(TOO_LONG):
                break
            if n <= LEAST_EXAMPLES:
                raise UsageError(self._too_long(n, reply.status))
            n = max(LEAST_EXAMPLES, n // 2)
        if not reply.ok:
            status = "no answer" if reply.status.startswith(NO_ANSWER) else "failed"
            return [self._explanation(examples.latent, status, "", notes | {"problem": reply.status})]
        try:
            text = self._read(request, reply, notes)
        except Unusable as problem:
            why = f"refused: {reply.refusal}" if reply.refusal else self.prompts.problem(problem.name, **problem.values)
            return [
                self._explanation(examples.latent, "failed", "", notes | {"problem": why, "answer": reply.text[:500]})
            ]
        if other := other_language(text, self.config.language):
            notes["wrong_language"] = other
        return [self._explanation(examples.latent, "ok", text, notes)]

    def _request(self, examples: LatentExamples, shown: Sequence[Example]) -> Request:
        promoted = examples.promoted if self.config.promoted else ()
        messages = self.prompts.explain(shown, examples.maximum, promoted)
        return Request(messages, "explain", EXPLANATION_TOKENS, explanation_schema(self.prompts.answer_key))

    def _fitting(self, examples: LatentExamples, shown: Sequence[Example]) -> int:
        """Return how many of the examples fit, by our count of tokens."""
        if self.config.context is None:
            return len(shown)
        room = self.config.context - EXPLANATION_TOKENS
        for n in range(len(shown), min(LEAST_EXAMPLES, len(shown)) - 1, -1):
            if self.client.counter.messages(self._request(examples, shown[:n]).messages) <= room:
                return n
        raise UsageError(self._too_long(min(LEAST_EXAMPLES, len(shown)), f"{self.config.context} tokens"))

    def _too_long(self, n: int, what: str) -> str:
        return (
            f"even {n} examples do not fit into the context of {self.client.model} ({what}). Use a model with a longer "
            "one, or give its true context with --context-tokens."
        )

    def _read(self, request: Request, reply: Reply, notes: dict[str, Any]) -> str:
        """Return the text of an answer, after one more question where it cannot be used. Raises: Unusable."""
        try:
            return read_explanation(reply)
        except Unusable as problem:
            if reply.refusal:
                raise
            form = f'{{"{self.prompts.answer_key}": "..."}}'
            why = self.prompts.problem(problem.name, **problem.values)
            messages = self.prompts.repair(request.messages, reply.text, why, form)
            again = self.client.ask([Request(messages, "repair", EXPLANATION_TOKENS, request.schema)])[0]
            if not again.ok:
                raise
            notes["repaired"] = problem.name
            return read_explanation(again)

    def _explanation(self, latent: int, status: str, text: str, notes: dict[str, Any] | None = None) -> Explanation:
        texts = (text, "") if self.config.language == "it" else ("", text)
        return Explanation(latent, self.name, status, *texts, None, "llm", self.prompt, notes or None)


def chosen(examples: Sequence[Example], draw: str, n: int) -> list[Example]:
    """Return n positives: the strongest, or equally many of each tenth (decile), the strongest first in either case."""
    positives = [example for example in examples if example.positive]
    positives.sort(key=lambda example: -float(example.activations.max(initial=0.0)))
    if draw == "top" or len(positives) <= n:
        return positives[:n]
    bins: dict[int, list[Example]] = {}
    for example in positives:
        bins.setdefault(example.decile, []).append(example)
    queues = [bins[decile] for decile in sorted(bins, reverse=True)]
    rounds = [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)][:n]
    return sorted(rounds, key=lambda example: -float(example.activations.max(initial=0.0)))


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
