"""What a rule's text is worth for its length: balanced accuracy by how many of its keys are read, and the bits it saves.

A rule tells its keys in the order of what each adds, so its first b keys are a shorter explanation. The description length
is that of a two-part code in bits: of the rule (how many keys; which list and which key each is, by its frequency in the
training text) and of the examples it gets wrong (RIPPER's code of exceptions, Cohen 1995), against the code of all answers
without a rule. An example that a text saves nothing on is told as cheaply without it. Ours: no published score of
explanations charges for their length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import comb, log2
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sae_italian.autointerp.choose import FAMILIES, MAX_NODES
from sae_italian.autointerp.examples import LatentExamples
from sae_italian.autointerp.scorers import Asked, Score, scorer
from sae_italian.base.statistics import NOTHING

BUDGETS = (1, 2, 3, 6, 12)  # keys that are read; a text tells at most twelve
SOURCE = "random"  # the negatives
N_LISTS = len({*FAMILIES, *MAX_NODES})  # that a key may be of


@scorer(needs="keys", metric="saved_bits")
def budget(asked: Sequence[Asked], examples: LatentExamples) -> Iterator[tuple[Asked, Score]]:
    """Score rules on whole segments with random negatives; of the explanation that is asked about first the curve too."""
    shown: Any = examples.test
    if SOURCE not in shown.questions:
        return
    positive, negative = shown.questions[SOURCE]
    rows = np.concatenate([positive, negative])
    truth = np.arange(len(rows)) < len(positive)
    for number, one in enumerate(asked):
        first, frequency = one.judge.keys(one.explanation, shown)
        first = first[rows]
        found = {"saved_bits": saved_bits(first > 0, truth, frequency)}
        if number == 0:
            curve = [accuracy((first > 0) & (first <= n), truth) for n in BUDGETS]
            found |= {f"balanced_accuracy_{n}": value for n, value in zip(BUDGETS, curve, strict=True)}
            found["area"] = area(curve)
        metrics = {name: NOTHING._replace(value=value) for name, value in found.items()}
        yield one, Score(SOURCE, metrics, len(positive), len(negative))


def accuracy(said: Bool[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> float:
    """Return the balanced accuracy of answers."""
    return (float(said[truth].mean()) + 1 - float(said[~truth].mean())) / 2


def area(curve: Sequence[float]) -> float:
    """Return the mean of a curve over BUDGETS on the scale log2(1 + keys), with 0.5 for no key."""
    x, y = np.log2(1 + np.array([0, *BUDGETS])), np.array([0.5, *curve])
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / x[-1])


def saved_bits(
    said: Bool[np.ndarray, " n"], truth: Bool[np.ndarray, " n"], frequency: Float[np.ndarray, " keys"]
) -> float:
    """Return the bits that a rule saves per example, at most 1; below 0 where its text costs more than it tells.

    `frequency` is the share of training tokens that each of the rule's keys stands on.
    """
    rule = whole_number(1 + len(frequency)) + float((log2(N_LISTS) - np.log2(frequency)).sum())
    right = chosen(int(said.sum()), int((said & ~truth).sum())) + chosen(int((~said).sum()), int((~said & truth).sum()))
    return (chosen(len(truth), int(truth.sum())) - rule - right) / len(truth)


def chosen(n: int, k: int) -> float:
    """Return the bits that tell which k of n there are, k among it."""
    return log2(n + 1) + log2(comb(n, k))


def whole_number(n: int) -> float:
    """Return the bits of a number from 1 on in Rissanen's universal code (1983): log2 2.865 + log2 n + log2 log2 n + ..."""
    bits, left = log2(2.865064), float(n)
    while (left := log2(left)) > 0:
        bits += left
    return bits
