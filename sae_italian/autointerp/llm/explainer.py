"""The explainer that asks a language model, and what becomes of its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sae_italian.autointerp.examples import Example, LatentExamples
from sae_italian.autointerp.llm.answers import Unusable, read_explanation, schema
from sae_italian.autointerp.llm.client import TOO_LONG, Client
from sae_italian.autointerp.llm.cost import DryClient
from sae_italian.autointerp.llm.ledger import Reply, Request
from sae_italian.autointerp.llm.prompts import load_prompts
from sae_italian.autointerp.store import NO_ANSWER, Explanation
from sae_italian.base.errors import UsageError

EXPLANATION_TOKENS = 160
LEAST_EXAMPLES = 3
LANGUAGE_LETTERS = 20  # shorter texts are too short to tell a language
UNLIKELY = 0.05  # a text is in another language when the wanted one is less probable than this
CUT = "cut at the token limit (finish_reason length); max_output_tokens=N gives more room"


class LLMExplainer:
    """One explanation per latent, in the language of the client's settings. Safe to use from several threads."""

    def __init__(self, client: Client | DryClient):
        self.client, self.config = client, client.settings
        self.prompts = load_prompts(self.config.language)
        self.name = f"llm:{client.model}:{self.prompts.name}"
        self.concurrency = client.concurrency
        self.n_train = 2 * self.config.n_shown  # of so many training positives the shown ones are chosen
        self.prompt = f"{self.prompts.name}-{self.prompts.hash}"

    @property
    def settings(self) -> dict[str, Any]:
        """Return what its explanations depend on, for the store to hold it to."""
        names = ("language", "shown", "n_shown", "promoted", "context_tokens", "sampling")
        return {"prompt": self.prompt} | {name: getattr(self.config, name) for name in names}

    def explain(self, examples: LatentExamples) -> list[Explanation]:
        """Return one explanation. Status: ok; `failed`, when the answer is unusable; `no answer`, to be asked again.

        Raises: UsageError when not even three examples fit into the model's context, or the client's errors.
        """
        shown = chosen(examples.train, self.config.shown, self.config.n_shown)
        if not shown:
            return [self._explanation(examples.latent, "too few activations", "")]
        request, reply, n = self._asked(examples, shown)
        notes: dict[str, Any] = {"examples": n} | ({"examples_dropped": len(shown) - n} if n < len(shown) else {})
        if not reply.ok:
            return [self._explanation(examples.latent, NO_ANSWER, "", notes | {"problem": reply.status})]
        try:
            text = self._read(request, reply, notes)
        except Unusable as problem:
            notes |= {"problem": self._why(problem, reply), "answer": reply.text[:500]}
            status = NO_ANSWER if problem.name == "length" else "failed"
            return [self._explanation(examples.latent, status, "", notes)]
        if other := other_language(text, self.config.language):
            notes["wrong_language"] = other
        return [self._explanation(examples.latent, "ok", text, notes)]

    def _asked(self, examples: LatentExamples, shown: Sequence[Example]) -> tuple[Request, Reply, int]:
        """Ask with as many examples as fit: by our count one less at a time, by the server's refusal half as many."""
        context, answer = self.config.context_tokens, self.config.max_output_tokens or EXPLANATION_TOKENS
        n = len(shown)
        while True:
            request = self._request(examples, shown[:n])
            if context is not None and self.client.counter.messages(request.messages) > context - answer:
                why, fewer = f"{context} tokens", n - 1
            else:
                (reply,) = self.client.ask([request])
                if not reply.status.startswith(TOO_LONG):
                    return request, reply, n
                why, fewer = reply.status, n // 2
            if n <= LEAST_EXAMPLES:
                raise UsageError(
                    f"even {n} examples do not fit into the context of {self.client.model} ({why}). Use a model with a "
                    "longer one, or give its true context with context_tokens=N."
                )
            n = max(LEAST_EXAMPLES, fewer)

    def _request(self, examples: LatentExamples, shown: Sequence[Example]) -> Request:
        promoted = examples.promoted if self.config.promoted else ()
        messages = self.prompts.explain(shown, examples.maximum, promoted)
        return Request(messages, "explain", EXPLANATION_TOKENS, schema(self.prompts.answer_key))

    def _read(self, request: Request, reply: Reply, notes: dict[str, Any]) -> str:
        """Return the text of an answer, after one more question where it cannot be used. Raises: Unusable."""
        try:
            return read_explanation(reply)
        except Unusable as problem:
            if reply.refusal or problem.name == "length":
                raise
            form = f'{{"{self.prompts.answer_key}": "..."}}'
            messages = self.prompts.repair(request.messages, reply.text, self._why(problem, reply), form)
            again = self.client.ask([Request(messages, "repair", EXPLANATION_TOKENS, request.schema)])[0]
            if not again.ok:
                raise
            notes["repaired"] = problem.name
            return read_explanation(again)

    def _why(self, problem: Unusable, reply: Reply) -> str:
        if reply.refusal:
            return f"refused: {reply.refusal}"
        return CUT if problem.name == "length" else self.prompts.problem(problem.name, **problem.values)

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
