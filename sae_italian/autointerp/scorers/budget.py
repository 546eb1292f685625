"""What a rule's text is worth for its length: balanced accuracy by how many of its keys are read, and the bits it saves.

A rule tells its keys in the order of what each adds, so its first b keys are a shorter explanation. The description length
is that of a two-part code in bits: of the rule (how many keys; which list and which key each is, by its frequency in the
training text) and of the examples it gets wrong (RIPPER's code of exceptions, Cohen 1995), against the code of all answers
without a rule. An example that a text saves nothing on is told as cheaply without it. Ours: no published score of
explanations charges for their length.
"""

from collections.abc import Iterator, Sequence
from math import log, log2
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import gammaln

from sae_italian.autointerp.choose import FAMILIES, MAX_NODES
from sae_italian.autointerp.examples import LatentExamples
from sae_italian.autointerp.scorers import Asked, Score, scorer
from sae_italian.autointerp.scorers.binary import falls_of, left_out
from sae_italian.base.statistics import NOTHING

BUDGETS = (1, 2, 3, 6, 12)  # keys that are read; a text tells at most twelve
SOURCE = "random"  # the negatives
N_LISTS = len({*FAMILIES, *MAX_NODES})  # that a key may be of
Says = Bool[np.ndarray, " n"]
Rows = Float[np.ndarray, " rows"]
Present = Float[np.ndarray, "rows n"]


@scorer(needs="keys", metric="saved_bits")
def budget(asked: Sequence[Asked], examples: LatentExamples) -> Iterator[tuple[Asked, Score]]:
    """Score rules on whole segments with random negatives; of the explanation that is asked about first the curve too."""
    shown: Any = examples.test
    if SOURCE not in shown.questions:
        return
    positive, negative = shown.questions[SOURCE]
    rows = np.concatenate([positive, negative])
    truth, present = np.arange(len(rows)) < len(positive), left_out(shown.document[rows])
    for number, one in enumerate(asked):
        first, frequency = one.judge.keys(one.explanation, shown)
        first = first[rows]
        found = {"saved_bits": saved_bits(first > 0, truth, frequency, present)}
        if number == 0:
            curve = [accuracy((first > 0) & (first <= n), truth, present) for n in BUDGETS]
            found |= {f"balanced_accuracy_{n}": value for n, value in zip(BUDGETS, curve, strict=True)}
            found["area"] = area(curve)
        metrics = {name: NOTHING._replace(value=float(each[0])) for name, each in found.items()}
        falls = {name: falls_of(each, present.sum(axis=1)) for name, each in found.items()}
        yield one, Score(SOURCE, metrics, len(positive), len(negative), falls=falls)


def accuracy(said: Says, truth: Says, present: Present) -> Rows:
    """Return the balanced accuracy of answers, of the examples that each row has present (1, else 0)."""
    with np.errstate(invalid="ignore"):  # where no example of a kind is left
        right, wrong = (present @ (said & kind) / (present @ kind) for kind in (truth, ~truth))
    return (right + 1 - wrong) / 2


def area(curve: Sequence[Any]) -> Any:
    """Return the mean of a curve over BUDGETS on the scale log2(1 + keys), with 0.5 for no key; of arrays one by one."""
    x, y = np.log2(1 + np.array([0, *BUDGETS])), np.stack([0.5 + 0 * np.asarray(curve[0]), *curve])
    return np.diff(x) @ (y[1:] + y[:-1]) / 2 / x[-1]


def saved_bits(said: Says, truth: Says, frequency: Float[np.ndarray, " keys"], present: Present) -> Rows:
    """Return the bits that a rule saves per example, at most 1; below 0 where its text costs more than it tells.

    `frequency` is the share of training tokens that each of the rule's keys stands on; `present` as in `accuracy`.
    """
    rule = whole_number(1 + len(frequency)) + float((log2(N_LISTS) - np.log2(frequency)).sum())
    kinds = np.ones(len(said)), truth, said, said & ~truth, ~said & truth
    n, true, on, wrongly, missed = (present @ np.stack(kinds, axis=1)).T
    bits = chosen(n, true) - rule - chosen(on, wrongly) - chosen(n - on, missed)
    return bits / np.where(n > 0, n, np.nan)


def chosen(n: Rows, k: Rows) -> Rows:
    """Return the bits that tell which k of n there are, k among it."""
    return np.log2(n + 1) + (gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)) / log(2)


def whole_number(n: int) -> float:
    """Return the bits of a number from 1 on in Rissanen's universal code (1983): log2 2.865 + log2 n + log2 log2 n + ..."""
    bits, left = log2(2.865064), float(n)
    while (left := log2(left)) > 0:
        bits += left
    return bits
