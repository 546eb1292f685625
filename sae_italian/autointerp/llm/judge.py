"""The judge that asks a language model: yes or no on passages, and numbers on tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sae_italian.autointerp.examples import Example
from sae_italian.autointerp.judges import Verdicts
from sae_italian.autointerp.llm.answers import Unusable, distributions, read_numbers, schema
from sae_italian.autointerp.llm.client import Client
from sae_italian.autointerp.llm.cost import DryClient
from sae_italian.autointerp.llm.ledger import Reply, Request
from sae_italian.autointerp.llm.prompts import Question, load_prompts
from sae_italian.autointerp.store import UNANSWERED, Explanation

BATCH = 5  # passages per question
STRONGEST = 10  # of a simulated token
ANSWER_TOKENS = 24  # around the numbers of an answer


class LLMJudge:
    """Judges by an explanation's text. Safe to use from several threads."""

    def __init__(self, client: Client | DryClient, batch: int = BATCH):
        self.client, self.batch, self.language = client, batch, client.settings.language
        self.prompts = load_prompts(self.language)
        self.name = f"llm:{client.model}:{self.prompts.name}"
        self.concurrency = client.concurrency

    @property
    def settings(self) -> dict[str, Any]:
        """Return what its verdicts depend on, for the store to hold it to."""
        return {
            "prompt": f"{self.prompts.name}-{self.prompts.hash}",
            "batch": self.batch,
            "sampling": self.client.settings.sampling,
        }

    # --- yes or no -----------------------------------------------------------------------------------------------------

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
            read = self._numbers(requests, [len(batch) for batch in batches], top=1)
            for batch, (values, spread) in zip(batches, read, strict=True):
                said[batch] = values
                if spread is not None:
                    probability[batch] = [weights[1] for weights in spread]
        return Verdicts(said, probability if np.isfinite(probability).any() else None)

    def _yes_or_no(self, text: str, examples: Sequence[Example]) -> Request:
        question: Question = "detection" if examples[0].marks is None else "fuzzing"
        messages, form = self.prompts.judge(question, text, examples), schema(self.prompts.list_key, len(examples), 1)
        return Request(messages, question, ANSWER_TOKENS + 4 * len(examples), form, logprobs=True)

    # --- numbers on tokens ---------------------------------------------------------------------------------------------

    def simulate(
        self, explanation: Explanation, examples: Sequence[Example]
    ) -> list[Float[np.ndarray, " tokens"] | None]:
        """Return the expected number per token where the server gives log-probabilities, else the number it said."""
        text = explanation.text(self.language)
        sizes = [len(example.tokens) for example in examples]
        requests = []
        for example, n in zip(examples, sizes, strict=True):
            messages, form = self.prompts.simulate(text, example), schema(self.prompts.values_key, n, STRONGEST)
            requests.append(Request(messages, "simulation", ANSWER_TOKENS + 4 * n, form, logprobs=True))
        levels = np.arange(STRONGEST + 1)
        simulated: list[Float[np.ndarray, " tokens"] | None] = []
        for values, spread in self._numbers(requests, sizes, top=STRONGEST):
            if isinstance(values, int):
                simulated.append(None)
            else:
                simulated.append(values * 1.0 if spread is None else np.array([one @ levels for one in spread]))
        return simulated

    # --- both ----------------------------------------------------------------------------------------------------------

    def _numbers(
        self, requests: Sequence[Request], sizes: Sequence[int], top: int
    ) -> list[tuple[Int[np.ndarray, " n"] | int, list[Float[np.ndarray, " values"]] | None]]:
        """Return the numbers of each answer, after one repair, and their distributions, None where there are none.

        Where there are no numbers -1 stands for an unusable answer, and -2 for none at all.
        """
        replies = self.client.ask(requests)
        read = [_read(reply, n, top) for reply, n in zip(replies, sizes, strict=True)]
        again, repairs = [], []
        for i, (request, reply, outcome) in enumerate(zip(requests, replies, read, strict=True)):
            if isinstance(outcome, Unusable) and reply.ok and not reply.refusal and outcome.name != "length":
                why = self.prompts.problem(outcome.name, **outcome.values)
                form = f'{{"{next(iter((request.schema or {})["properties"]))}": [...]}}'
                messages = self.prompts.repair(request.messages, reply.text, why, form)
                again.append(i)
                repairs.append(replace(request, messages=messages, purpose="repair"))
        for i, reply in zip(again, self.client.ask(repairs), strict=True):
            read[i], replies[i] = _read(reply, sizes[i], top), reply
        found = []
        for reply, outcome in zip(replies, read, strict=True):
            if isinstance(outcome, Unusable):
                outcome = (-1 if reply.ok and outcome.name != "length" else UNANSWERED), None
            found.append(outcome)
        return found


def _read(reply: Reply, n: int, top: int) -> tuple[np.ndarray, list[np.ndarray] | None] | Unusable:
    try:
        values = read_numbers(reply, n, top)
    except Unusable as problem:
        return problem
    spread = None if reply.logprobs is None else distributions(reply.logprobs, values.tolist(), top)
    return values, spread
