"""Those who ask a language model: the explainer, and the judge of yes or no on passages and numbers on tokens."""

import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sae_italian.autointerp.draws import in_turn
from sae_italian.autointerp.examples import Example, LatentExamples, Verdicts
from sae_italian.autointerp.llm import LLMSettings
from sae_italian.autointerp.llm.answers import PROBLEMS, Prompts, Unusable, read_explanation, read_numbers
from sae_italian.autointerp.llm.calls import TOO_LONG, DryClient, Messages, Reply, Request
from sae_italian.autointerp.run import STORE_FILE, TWIN_FOLDER, random_sae_control, run_autointerp
from sae_italian.autointerp.store import NO_ANSWER, UNANSWERED, Explanation, Store
from sae_italian.autointerp.summary import comparison_table, side_by_side
from sae_italian.autointerp.work import AutointerpConfig
from sae_italian.base.errors import SaeItalianError, UsageError
from sae_italian.base.report import plain
from sae_italian.cache import FeatureCache
from sae_italian.corpora.filters import identifier
from sae_italian.saes.baselines import random_twin

if TYPE_CHECKING:
    from sae_italian.autointerp.llm.client import Client

EXPLANATION_TOKENS = 160
LEAST_EXAMPLES = 3
LANGUAGE_LETTERS = 20  # shorter texts are too short to tell a language
UNLIKELY = 0.05  # a text is in another language when the wanted one is less probable than this
_DECIDING = ("language", "shown", "n_shown", "promoted", "context_tokens", "sampling")
STRONGEST = 10  # of a simulated token
ANSWER_TOKENS, NUMBER_TOKENS = 24, 4  # around the numbers of an answer, and for each of them


# --- asking, and asking once more -------------------------------------------------------------------------------------


def schema(key: str, n: int | None = None, top: int = 0) -> dict[str, Any]:
    """Return the JSON schema of an object with one text, or with n whole numbers from 0 to `top`."""
    whole = {"type": "integer", "minimum": 0, "maximum": top}
    value = {"type": "string"} if n is None else {"type": "array", "items": whole, "minItems": n, "maxItems": n}
    return {"type": "object", "properties": {key: value}, "required": [key], "additionalProperties": False}


class Answer(NamedTuple):
    """What a question came to: the value that was read, or why there is none."""

    reply: Reply
    value: Any = None
    problem: Unusable | None = None  # of a reply that cannot be read
    why: str = ""
    again: bool = False  # whether a rerun asks again: the server failed, or left no room to answer
    repaired: str = ""  # the problem that the answer before this one had


class Asker:
    """One who asks a model through a client. Safe to use from several threads."""

    def __init__(self, client: "Client | DryClient"):
        self.client, self.config, self.concurrency = client, client.settings, client.concurrency
        self.prompts = Prompts(self.config.language)
        self.name = f"llm:{client.model}:{self.prompts.name}"
        self.prompt = f"{self.prompts.name}-{self.prompts.hash}"

    def answers(self, requests: Sequence[Request], readers: Sequence[Callable[[Reply], Any]]) -> list[Answer]:
        """Ask all at once, and once more, with what is wrong with it, what is answered and cannot be read."""
        found = [_read(*both) for both in zip(self.client.ask(requests), readers, strict=True)]
        todo = {i: one.problem for i, one in enumerate(found) if one.problem and not (one.again or one.reply.refusal)}
        repairs = [self._repair(requests[i], found[i].reply, problem) for i, problem in todo.items()]
        for (i, problem), reply in zip(todo.items(), self.client.ask(repairs), strict=True):
            found[i] = _read(reply, readers[i])._replace(repaired=problem.name)
        for one in found:
            if one.problem is not None:
                self.client.count("unreadable", one.why)
        return found

    def _repair(self, request: Request, reply: Reply, problem: Unusable) -> Request:
        ((key, value),) = (request.schema or {})["properties"].items()
        form = f'{{"{key}": [...]}}' if value["type"] == "array" else f'{{"{key}": "..."}}'
        messages = self.prompts.repair(request.messages, reply.text, form, problem.name, **problem.values)
        return request._replace(messages=messages, purpose="repair")


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
            notes |= {"problem": answer.why} | ({"answer": answer.reply.text[:500]} if answer.reply.ok else {})
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
            if context is not None and self.client.counter(request.messages) > context - room:
                why, fewer = f"{context} tokens", n - 1
            else:
                (answer,) = self.answers([request], [read_explanation])
                why, fewer = answer.reply.status, n // 2
                if not why.startswith(TOO_LONG):
                    return answer, n
            if n <= LEAST_EXAMPLES:
                raise UsageError(
                    f"even {n} examples do not fit into the context of {self.client.model} ({why}). Use "
                    "a model with a longer one, or give its true context with context_tokens=N."
                )
            n = max(LEAST_EXAMPLES, fewer)

    def request(self, examples: LatentExamples, shown: Sequence[Example]) -> Request:
        """Return the question about a latent with these of its examples."""
        messages = self.prompts.explain(shown, examples.maximum, examples.promoted if self.config.promoted else ())
        return Request(messages, "explain", EXPLANATION_TOKENS, schema(self.prompts.answer_key))


def chosen(examples: Sequence[Example], draw: str, n: int) -> list[Example]:
    """Return n positives: the strongest, or equally many of each tenth (decile), the strongest first in either case."""

    def strength(example: Example) -> float:
        return -float(example.activations.max(initial=0.0))

    positives = sorted((example for example in examples if example.positive), key=strength)
    if draw == "deciles" and len(positives) > n:
        tenth = np.array([example.decile for example in positives])
        positives = [positives[i] for i in in_turn(np.arange(len(tenth)), tenth - tenth.min(), n)]
    return sorted(positives[:n], key=strength)


def other_language(text: str, wanted: str) -> str | None:
    """Return the language a text is in when it is clearly not the one wanted; quoted words do not count."""
    bare = re.sub(r"«[^»]*»|\"[^\"]*\"|“[^”]*”", " ", text)
    if sum(letter.isalpha() for letter in bare) < LANGUAGE_LETTERS:
        return None
    ranked = identifier("it", "en", "es", "fr", "de", "pt").rank(bare)
    return str(ranked[0][0]) if dict(ranked)[wanted] < UNLIKELY else None


class LLMJudge(Asker):
    """Judges by an explanation's text, `batch` passages at a time."""

    batch = 5
    scores = property(lambda self: self.config.scores)

    @property
    def settings(self) -> dict[str, Any]:
        """Return what its verdicts depend on, and which scores there are if not all, for the store to hold it to."""
        own = {"prompt": self.prompt, "batch": self.batch, "order": "mixed", "sampling": self.config.sampling}
        return own if self.scores == LLMSettings.scores else {**own, "scores": self.scores}

    def detect(self, explanation: Explanation, examples: Sequence[Example]) -> Verdicts:
        """Answer batch by batch, all at once; a batch that stays unusable after a repair is asked one by one.

        The examples are all marked (fuzzing) or none is. No usable answer then is -1, and -2 where the server failed or had
        no room to answer, so that a rerun asks again. Raises: the client's errors.
        """
        text = explanation.text(self.config.language)
        question = "fuzzing" if any(example.marks is not None for example in examples) else "detection"
        said, probability = np.full(len(examples), -1, dtype=np.int64), np.full(len(examples), np.nan)
        # mixed for each set of examples anew: a model that answers by place alone then comes to 0.5
        order = np.random.default_rng([len(e.text) for e in examples]).permutation(len(examples)).tolist()
        for size in dict.fromkeys((self.batch, 1)):
            todo = [i for i in order if said[i] < 0]
            batches = [todo[start : start + size] for start in range(0, len(todo), size)]
            asked = [(self.prompts.judge(question, text, [examples[i] for i in own]), len(own)) for own in batches]
            answers = self._numbers(asked, question, self.prompts.list_key, 1)
            for batch, one in zip(batches, answers, strict=True):
                said[batch], expected = one.value or (UNANSWERED if one.again else -1, None)
                if expected is not None:
                    probability[batch] = expected
        known = np.isfinite(probability[said >= 0])  # where one answer has none there is no ranking of all
        return Verdicts(said, probability if len(known) and known.all() else None)

    def simulate(
        self, explanation: Explanation, examples: Sequence[Example]
    ) -> list[Float[np.ndarray, " tokens"] | int | None]:
        """Return the expected number per token where the server gives log-probabilities, else the number it said.

        No usable answer is None, and -2 as in `detect` where a rerun asks again.
        """
        text = explanation.text(self.config.language)
        asked = [(self.prompts.simulate(text, example), len(example.tokens)) for example in examples]
        simulated: list[Float[np.ndarray, " tokens"] | int | None] = []
        for one in self._numbers(asked, "simulation", self.prompts.values_key, STRONGEST):
            values, expected = one.value or (UNANSWERED if one.again else None, None)
            simulated.append(values if expected is None else expected)
        return simulated

    def _numbers(self, asked: Sequence[tuple[Messages, int]], purpose: str, key: str, top: int) -> list[Answer]:
        """Return the answers to questions for so many numbers each, as `read_numbers` reads them."""
        requests = [
            Request(messages, purpose, ANSWER_TOKENS + NUMBER_TOKENS * n, schema(key, n, top), logprobs=True)
            for messages, n in asked
        ]
        return self.answers(requests, [partial(read_numbers, n=n, top=top) for _, n in asked])


# --- a language model beside the rules -------------------------------------------------------------------------------


SAMPLE = 5  # latents that an estimate is worked out on; the rest is taken to be like them


def estimate_beside(
    cache: FeatureCache, tokenizer: Any, config: AutointerpConfig, sae: Any, settings: LLMSettings, *, control: bool
) -> dict[str, Any]:
    """Return what a run from nothing would take, from a few of its latents; nothing is sent and nothing kept.

    With `control` the random SAE's part is worked out on its cache, and taken to be as much as the trained one's before
    there is one.
    """
    client, caches = DryClient(settings), [(cache, sae)]
    with suppress(SaeItalianError):  # there is none yet
        caches += [(FeatureCache.open(cache.folder / TWIN_FOLDER), random_twin(sae, config.seed))] if control else []
    counted = []  # latents, and of these those that are asked about here
    for one, its_sae in caches:
        live = int((one.statistics["count"] > 0).sum())
        wanted = live if config.latents is None else min(config.latents, live)
        counted.append((wanted, min(SAMPLE, wanted)))
        with tempfile.TemporaryDirectory() as folder:
            few, store = replace(config, latents=min(SAMPLE, wanted)), Path(folder) / STORE_FILE
            run_autointerp(one, tokenizer, few, store=store, sae=its_sae, **_askers(client))
    of_random = counted[-1][0] if control else 0
    return client.estimate(counted[0][0] + of_random, sum(sampled for _, sampled in counted), of_random)


def _askers(client: "Client | DryClient") -> dict[str, Any]:
    """Return the explainers and judges that the client's settings ask for, as a run takes them."""
    explainers = [LLMExplainer(client)] if client.settings.explainer == "llm" else []
    return {"explainers": explainers, "judges": [LLMJudge(client)]}


def run_beside(
    cache: FeatureCache, model: Any, config: AutointerpConfig, sae: Any, settings: LLMSettings, *, control: bool
) -> tuple[dict[str, Any], str]:
    """Explain and judge with a language model, beside the rules.

    Return summaries, what became of the questions, spending and what was noticed; and the same as a table and lines. With
    `control` the same explainer and judge then do the same latents' number of the random SAE, on the same budget and the
    same ledger. Raises: EndpointError, also when there was something to ask and not one answer.
    """
    from sae_italian.autointerp.llm.client import Client

    path = cache.folder / STORE_FILE
    with Client(settings, path) as client:
        askers = _askers(client)
        run_autointerp(cache, model.tokenizer, config, store=path, sae=sae, **askers)
        random = side_by_side(random_sae_control(cache, sae, model, config, **askers)) if control else []
    client.must_have_answered()
    with Store(path, {}) as store:
        found = [e for explainer in askers["explainers"] for e in store.explanations(explainer.name).values()]
        spending = store.spending()
    n_foreign = sum(bool((explanation.notes or {}).get("wrong_language")) for explanation in found)
    summaries = side_by_side(path)
    facts = {
        "summaries": [one.as_dict() for one in summaries],
        "random": [one.as_dict() for one in random],
        "calls": client.counts,
        "why": client.told()[1:],
        "endpoint_without": client.missing,
        "wrong_language": n_foreign,
        "spending": spending,
    }
    lines = [comparison_table(summaries, random), "", *client.told()]
    for name, row in spending.items():
        usd = "cost not known" if row["usd"] is None else f"${row['usd']:.4f}"
        lines.append(f"{name}, ever: {row['tokens_in'] or 0:,} tokens in, {row['tokens_out'] or 0:,} out, {usd}")
    lines += [f"the endpoint does without {feature}: {why}" for feature, why in client.missing.items()]
    lines += [f"{n_foreign} explanations are in another language than asked for (flagged)"] * bool(n_foreign)
    return plain(facts), "\n".join(lines)
