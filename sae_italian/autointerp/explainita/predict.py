"""Answers to ExplainITA's tasks: by an LLM where one is given, else by what the file alone shows.

Without an LLM task 1 gets a rule on the tokens, words, endings, shapes or preceding words that the marked tokens share,
and task 2 a lexical baseline: a sequence is explained when it holds a word that the explanation quotes, or a word with
an ending it names (-mente), or, where it does neither, a word of the same stem as one in it. Neither needs the model or
the SAE.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sae_italian.autointerp.examples import Example
from sae_italian.autointerp.explainers import Explainer
from sae_italian.autointerp.explainers.counts import Tally
from sae_italian.autointerp.explainers.rules import KeyRule
from sae_italian.autointerp.explainers.text import Language, statement
from sae_italian.autointerp.explainita.data import Excerpt, Latent, Task, as_example, as_examples, by_id
from sae_italian.autointerp.places import PREFIXES, SUFFIXES, Family, shape_of
from sae_italian.autointerp.store import Explanation
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import progress
from sae_italian.base.units import in_threads

MOST_KEYS = 12  # of a rule: a longer list is no explanation
WORTH = 0.02  # F1 that each doubling of a rule's keys must bring
NO_PATTERN = {"it": "nessuno schema evidente", "en": "no evident pattern"}
STEM = 5  # letters that words of one stem share
_FEW_LETTERS = 4  # words shorter than this are mostly articles and prepositions
_QUOTED = re.compile(r"«([^»]+)»|\"([^\"]+)\"|“([^”]+)”|(?<!\w)'([^']{2,})'(?!\w)")
_ENDING = re.compile(r"(?<!\w)-(\w{2,})")


class Predicted(NamedTuple):
    """Answers by latent id as a submission takes them, and how many the LLM left open."""

    answers: dict[str, Any]
    unanswered: int


def predict(
    latents: Sequence[Latent],
    task: Task,
    *,
    explainer: Explainer | None = None,
    judge: Any | None = None,
    language: Language = "it",
) -> Predicted:
    """Return a text per latent (task 1) or a yes or no per sequence (task 2).

    What an explainer or a judge gives no usable answer to is answered as without one, and counted. Raises: UsageError
    without any latent, DataError for one that is there twice.
    """
    if not by_id(latents):
        raise UsageError("the file holds no rows: there is nothing to predict.")

    def answer(latent: Latent) -> tuple[str, tuple[Any, int]]:
        return latent.id, _explained(latent, explainer, language) if task == 1 else _judged(latent, judge)

    concurrency = getattr(explainer if task == 1 else judge, "concurrency", 1)
    under_way = in_threads(answer, latents, concurrency)
    done = list(progress("predict", under_way, total=len(latents), unit="latent"))
    return Predicted({name: given for name, (given, _) in done}, sum(failed for _, (_, failed) in done))


def _explained(latent: Latent, explainer: Explainer | None, language: Language) -> tuple[str, int]:
    if explainer is not None:
        found = explainer.explain(as_examples(latent))[0]
        if found.status == "ok":
            return found.text(language), 0
    rule = rule_of_passages(latent.sequences)
    return NO_PATTERN[language] if rule is None else statement(rule, language), int(explainer is not None)


def rule_of_passages(passages: Sequence[Excerpt]) -> KeyRule | None:
    """Return the keys of one family that tell active tokens from the others best (F1 per token); None without any.

    The others are the silent tokens of the same passages: the file holds no passage on which the latent is silent.
    """
    examples = [as_example(passage) for passage in passages if passage.strengths is not None]
    if not any(example.activations.any() for example in examples):
        return None
    value = np.concatenate([example.activations for example in examples])
    found = [[keys_at(example, i) for i in range(len(example.tokens))] for example in examples]
    keys = [here for example in found for here in example]
    families: list[Family] = list(dict.fromkeys(family for here in keys for family in here))
    fitted = [_fit(family, [here.get(family) for here in keys], value) for family in families]
    return max(fitted, key=lambda scored: scored[0])[1]


def keys_at(example: Example, i: int) -> dict[Family, str]:
    """Return what a rule can look at in token i: itself, the word it ends, the word's shape, and the word before."""
    start, end = (int(x) for x in example.spans[i])
    token = example.text[start:end].strip()
    # a file does not say where a token stands in its word: all are told as words are
    found: dict[Family, str] = {"token": f" {token}" if token[:1].isalnum() else token}
    words = [match.span() for match in re.finditer(r"\w+['’]?|[^\w\s]+", example.text)]
    here = next((n for n, (first, last) in enumerate(words) if first < end <= last), None)
    if here is None or not token:
        return found if token else {}
    first, last = words[here]
    word = example.text[first:last] if end == last else ""  # "": it goes on
    found["shape"] = shape_of(word)
    if word:
        letters = found["word"] = word.lower()
        found |= {f: letters[-n:] for f, n in SUFFIXES.items() if len(letters) > n and letters[-n:].isalpha()}
    if here > 0:
        before = words[here - 1]
        found["previous-word"] = example.text[slice(*before)].lower()
    begun = example.text[first:end].lower()
    found |= {f: begun[:n] for f, n in PREFIXES.items() if len(begun) > n and begun[:n].isalpha()}
    return found


def _fit(family: Family, keys: list[str | None], value: np.ndarray) -> tuple[float, KeyRule]:
    """Return the worth of a family's best rule, and the rule: keys in order of their rate as long as F1 grows."""
    base, n_active = float((value > 0).mean()), int((value > 0).sum())
    value = value[[key is not None for key in keys]]
    names, at = np.unique([key for key in keys if key is not None], return_inverse=True)
    total, active, mass = (np.bincount(at, weights) for weights in (np.ones(len(at)), value > 0, value))
    tally = Tally(np.arange(len(names)), active, mass, total)
    order = np.flatnonzero(active > 0)
    order = order[np.lexsort((-active[order], -tally.rates(base)[order]))][:MOST_KEYS]
    f1 = 2 * np.cumsum(active[order]) / (np.cumsum(total[order]) + n_active)
    worth = f1 - WORTH * np.log2(np.arange(1, len(order) + 1))
    best = int(np.argmax(worth)) if len(order) else -1
    chosen = np.sort(order[: best + 1])
    rule = tally.take(chosen).rule(family, names[chosen].tolist(), n_active, base, float(mass.sum()) or 1.0)
    return (float(worth[best]) if len(order) else -1.0), rule


def _judged(latent: Latent, judge: Any | None) -> tuple[list[bool], int]:
    examples = [as_example(passage) for passage in latent.sequences]
    plain = [mentions(latent.explanation or "", example.text) for example in examples]
    if judge is None:
        return plain, 0
    said = judge.detect(Explanation(latent.index, "", "ok", latent.explanation or "", "", None), examples).said
    answers = [bool(one) if one >= 0 else other for one, other in zip(said.tolist(), plain, strict=True)]
    return answers, int((said < 0).sum())


def mentions(explanation: str, text: str) -> bool:
    """Return whether a text holds what an explanation quotes or ends with, or else a word of a stem in it."""
    words = re.findall(r"\w+", text.lower())
    quoted = [next(filter(None, groups)).lower().strip() for groups in _QUOTED.findall(explanation)]
    endings = tuple(ending.lower() for ending in _ENDING.findall(explanation))
    if quoted or endings:
        named = any(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", text.lower()) for one in quoted)
        return named or any(word.endswith(endings) for word in words)
    stems = {word[:STEM] for word in re.findall(r"\w+", explanation.lower()) if len(word) >= _FEW_LETTERS}
    return any(word[:STEM] in stems for word in words if len(word) >= _FEW_LETTERS)
