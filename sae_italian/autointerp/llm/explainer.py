"""The explainer that asks a language model, and what becomes of its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sae_italian.autointerp.examples import Example, LatentExamples
from sae_italian.autointerp.llm.answers import Answer, Asker, read_explanation, schema
from sae_italian.autointerp.llm.ledger import TOO_LONG, Request
from sae_italian.autointerp.store import NO_ANSWER, Explanation
from sae_italian.base.errors import UsageError

EXPLANATION_TOKENS = 160
LEAST_EXAMPLES = 3
LANGUAGE_LETTERS = 20  # shorter texts are too short to tell a language
UNLIKELY = 0.05  # a text is in another language when the wanted one is less probable than this
_DECIDING = ("language", "shown", "n_shown", "promoted", "context_tokens", "sampling")


class LLMExplainer(Asker):
    """One explanation per latent, in the language of the client's settings."""

    n_train = property(lambda self: 2 * self.config.n_shown)  # training positives that the shown ones are chosen from

    @property
    def settings(self) -> dict[str, Any]:
        """Return what its explanations depend on, for the store to hold it to."""
        return {"prompt": self.prompt} | {name: getattr(self.config, name) for name in _DECIDING}

    def explain(self, examples: LatentExamples) -> list[Explanation]:
        """Return one explanation. Status: ok; `failed`, when the answer is unusable; `no answer`, to be asked again.

        Raises: UsageError when not even three examples fit into the model's context, or the client's errors.
        """
        shown = chosen(examples.train, self.config.shown, self.config.n_shown)
        if not shown:
            return [self._explanation(examples.latent, "too few activations")]
        answer, n = self._asked(examples, shown)
        notes: dict[str, Any] = {"examples": n} | ({"examples_dropped": len(shown) - n} if n < len(shown) else {})
        notes |= {"repaired": answer.repaired} if answer.repaired else {}
        if answer.value is None:
            notes |= {"problem": answer.why} | ({"answer": answer.reply.text[:500]} if answer.reply.ok else {})
            return [self._explanation(examples.latent, NO_ANSWER if answer.again else "failed", "", notes)]
        if other := other_language(answer.value, self.config.language):
            notes["wrong_language"] = other
        return [self._explanation(examples.latent, "ok", answer.value, notes)]

    def _asked(self, examples: LatentExamples, shown: Sequence[Example]) -> tuple[Answer, int]:
        """Ask with as many examples as fit: by our count one less at a time, by the server's refusal half as many."""
        context, room = self.config.context_tokens, self.config.max_output_tokens or EXPLANATION_TOKENS
        n = len(shown)
        while True:
            request = self._request(examples, shown[:n])
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

    def _request(self, examples: LatentExamples, shown: Sequence[Example]) -> Request:
        promoted = examples.promoted if self.config.promoted else ()
        messages = self.prompts.explain(shown, examples.maximum, promoted)
        return Request(messages, "explain", EXPLANATION_TOKENS, schema(self.prompts.answer_key))

    def _explanation(
        self, latent: int, status: str, text: str = "", notes: dict[str, Any] | None = None
    ) -> Explanation:
        texts = (text, "") if self.config.language == "it" else ("", text)
        return Explanation(latent, self.name, status, *texts, None, "llm", self.prompt, notes)


def chosen(examples: Sequence[Example], draw: str, n: int) -> list[Example]:
    """Return n positives: the strongest, or equally many of each tenth (decile), the strongest first in either case."""

    def strength(example: Example) -> float:
        return -float(example.activations.max(initial=0.0))

    positives = sorted((example for example in examples if example.positive), key=strength)
    if draw == "top" or len(positives) <= n:
        return positives[:n]
    bins: dict[int, list[Example]] = {}
    for example in positives:
        bins.setdefault(example.decile, []).append(example)
    # round by round the strongest of each tenth that is left, the highest tenth first
    ranked = [(i, -decile, example) for decile, held in bins.items() for i, example in enumerate(held)]
    return sorted((example for *_, example in sorted(ranked, key=lambda one: one[:2])[:n]), key=strength)


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
