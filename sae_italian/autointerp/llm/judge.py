"""The judge that asks a language model: yes or no on passages, and numbers on tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sae_italian.autointerp.examples import Example
from sae_italian.autointerp.judges import Verdicts
from sae_italian.autointerp.llm.answers import Asker, distributions, read_numbers, schema
from sae_italian.autointerp.llm.client import Client
from sae_italian.autointerp.llm.cost import DryClient
from sae_italian.autointerp.llm.ledger import Reply, Request
from sae_italian.autointerp.llm.prompts import Question
from sae_italian.autointerp.store import UNANSWERED, Explanation

BATCH = 5  # passages per question
STRONGEST = 10  # of a simulated token
ANSWER_TOKENS, NUMBER_TOKENS = 24, 4  # around the numbers of an answer, and for each of them
Spread = list[Float[np.ndarray, " values"]]


class LLMJudge(Asker):
    """Judges by an explanation's text, `batch` passages at a time."""

    def __init__(self, client: Client | DryClient, batch: int = BATCH):
        super().__init__(client)
        self.batch, self.language = batch, self.config.language

    @property
    def settings(self) -> dict[str, Any]:
        """Return what its verdicts depend on, for the store to hold it to."""
        return {"prompt": self.prompt, "batch": self.batch, "sampling": self.config.sampling}

    def detect(self, explanation: Explanation, examples: Sequence[Example]) -> Verdicts:
        """Answer batch by batch, all at once; a batch that stays unusable after a repair is asked one by one.

        What still has no usable answer then is -1, and -2 where the server failed or had no room to answer, so that a
        rerun asks again. Raises: the client's errors, when the endpoint is down or the budget is reached.
        """
        text = explanation.text(self.language)
        said = np.full(len(examples), -1, dtype=np.int64)
        probability = np.full(len(examples), np.nan)
        # in an order that mixes the classes, the same for every explanation of the same examples
        order = np.random.default_rng(0).permutation(len(examples))
        for size in dict.fromkeys((self.batch, 1)):
            batches: list[list[int]] = []
            for marked in (False, True):  # passages with marks and those without are different questions
                todo = [i for i in order.tolist() if said[i] < 0 and (examples[i].marks is not None) == marked]
                batches += [todo[start : start + size] for start in range(0, len(todo), size)]
            requests = [self._yes_or_no(text, [examples[i] for i in batch]) for batch in batches]
            found = self._numbers(requests, [len(batch) for batch in batches], top=1)
            for batch, (values, spread) in zip(batches, found, strict=True):
                said[batch] = values
                if spread is not None:
                    probability[batch] = [weights[1] for weights in spread]
        return Verdicts(said, probability if np.isfinite(probability).any() else None)

    def _yes_or_no(self, text: str, examples: Sequence[Example]) -> Request:
        question: Question = "detection" if examples[0].marks is None else "fuzzing"
        messages = self.prompts.judge(question, text, examples)
        return self._request(messages, question, self.prompts.list_key, len(examples), 1)

    def simulate(
        self, explanation: Explanation, examples: Sequence[Example]
    ) -> list[Float[np.ndarray, " tokens"] | None]:
        """Return the expected number per token where the server gives log-probabilities, else the number it said."""
        text, key = explanation.text(self.language), self.prompts.values_key
        sizes = [len(example.tokens) for example in examples]
        asked = [self.prompts.simulate(text, example) for example in examples]
        both = zip(asked, sizes, strict=True)
        requests = [self._request(messages, "simulation", key, n, STRONGEST) for messages, n in both]
        levels = np.arange(STRONGEST + 1)
        simulated: list[Float[np.ndarray, " tokens"] | None] = []
        for values, spread in self._numbers(requests, sizes, top=STRONGEST):
            if isinstance(values, int):
                simulated.append(None)
            else:
                simulated.append(values * 1.0 if spread is None else np.array([one @ levels for one in spread]))
        return simulated

    def _request(self, messages: Any, purpose: str, key: str, n: int, top: int) -> Request:
        return Request(messages, purpose, ANSWER_TOKENS + NUMBER_TOKENS * n, schema(key, n, top), logprobs=True)

    def _numbers(
        self, requests: Sequence[Request], sizes: Sequence[int], top: int
    ) -> list[tuple[Int[np.ndarray, " n"] | int, Spread | None]]:
        """Return the numbers of each answer, and their distributions, None where there are none.

        Where there are no numbers -1 stands for an unusable answer, and -2 for none at all.
        """
        found = self.answers(requests, [partial(_read, n=n, top=top) for n in sizes])
        return [one.value or (UNANSWERED if one.again else -1, None) for one in found]


def _read(reply: Reply, n: int, top: int) -> tuple[Int[np.ndarray, " n"], Spread | None]:
    """Return n numbers and their distributions. Raises: Unusable."""
    values = read_numbers(reply, n, top)
    return values, None if reply.logprobs is None else distributions(reply.logprobs, values.tolist(), top)
