"""Explanations without an LLM: a rule over tokens that the cache's statistics suggest, and its text in two languages.

Three families: the token itself, the token before it, and both together. A rule is a table from such a key to the
activation expected there. Keys are added in order of precision as long as F1 on the training documents grows; the family
and the threshold are chosen on the validation documents. The text says what the rule does; it does not name a concept.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_italian.autointerp.examples import Activity, ExampleSource
from sae_italian.cache.splits import PARTS

Family = Literal["token", "previous", "bigram"]
FAMILIES: tuple[Family, ...] = ("token", "previous", "bigram")  # simplest first
MAX_KEYS = 512


@dataclass(frozen=True)
class Rule:
    """Expected activation by key; a token fires when it is at least `threshold`. Keys are sorted."""

    family: Family
    keys: Int[np.ndarray, " keys"]
    weights: Float[np.ndarray, " keys"]
    mass: Float[np.ndarray, " keys"]  # share of the latent's activation on the key
    threshold: float
    precision: float  # on the training documents, token by token
    recall: float

    def as_dict(self) -> dict[str, Any]:
        arrays = {"keys": self.keys.tolist(), "weights": self.weights.tolist(), "mass": self.mass.tolist()}
        numbers = {name: getattr(self, name) for name in ("family", "threshold", "precision", "recall")}
        return {**numbers, **arrays}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Rule:
        arrays = {"keys": np.array(values["keys"], dtype=np.int64)}
        arrays |= {name: np.array(values[name], dtype=np.float64) for name in ("weights", "mass")}
        return cls(**{**values, **arrays})

    def with_threshold(self, threshold: float) -> Rule:
        return Rule(**{**self.__dict__, "threshold": threshold})


class KeyTable:
    """The keys of every position of a cache, and how often each occurs in the training documents."""

    def __init__(self, source: ExampleSource):
        self.vocab = int(source.tokens.max()) + 1
        self.by_family: dict[Family, np.ndarray] = {
            "token": source.tokens,
            "previous": source.previous,
            "bigram": source.previous * self.vocab + source.tokens,
        }
        train = source.position_part == PARTS.index("train")
        self.counts = {family: np.unique(keys[train], return_counts=True) for family, keys in self.by_family.items()}

    def count(self, family: Family, keys: Int[np.ndarray, " keys"]) -> Int[np.ndarray, " keys"]:
        known, counts = self.counts[family]
        return counts[np.searchsorted(known, keys)]

    def predict(self, rule: Rule, grid: Int[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
        """Return the expected activation at each position of a grid (0 for unknown keys and at -1)."""
        if len(rule.keys) == 0:
            return np.zeros(grid.shape)
        keys = self.by_family[rule.family][grid]
        index = np.searchsorted(rule.keys, keys).clip(max=len(rule.keys) - 1)
        return np.where((rule.keys[index] == keys) & (grid >= 0), rule.weights[index], 0.0)


def fit(source: ExampleSource, table: KeyTable, activity: Activity, family: Family) -> Rule:
    """Return the rule of one family whose firing matches the latent's best (F1 per token) in the training documents."""
    train = source.position_part[activity.position] == PARTS.index("train")
    keys, index = np.unique(table.by_family[family][activity.position[train]], return_inverse=True)
    active = np.bincount(index, minlength=len(keys))
    mass = np.bincount(index, weights=activity.value[train], minlength=len(keys))
    total = table.count(family, keys)
    order = np.lexsort((-active, -(active / total)))[:MAX_KEYS]
    true = np.cumsum(active[order])
    claimed = np.cumsum(total[order])
    f1 = 2 * true / (claimed + active.sum())
    n = int(np.argmax(f1)) + 1
    chosen = np.sort(order[:n])
    return Rule(
        family=family,
        keys=keys[chosen],
        weights=(mass / total)[chosen],
        mass=(mass / mass.sum())[chosen],
        threshold=0.0,
        precision=float(true[n - 1] / claimed[n - 1]),
        recall=float(true[n - 1] / active.sum()),
    )


def fires(rule: Rule, predicted: Float[np.ndarray, "n width"]) -> Bool[np.ndarray, "n width"]:
    return (predicted > 0) & (predicted >= rule.threshold)


# --- text ------------------------------------------------------------------------------------------------------------


def describe(rule: Rule, vocab: int, strings: list[str], language: Literal["it", "en"], shown: int = 6) -> str:
    """Return the rule in one sentence of Italian or English. `strings` are the tokens as text, by id."""
    order = np.argsort(-rule.mass, kind="stable")
    kept = [int(key) for key in rule.keys[order]]
    share = f"{100 * rule.mass.sum():.0f} %"
    if rule.family == "bigram":
        firsts, seconds = [strings[key // vocab] for key in kept], [strings[key % vocab] for key in kept]
        pairs = [f"«{first.strip()}{second}»" for first, second in zip(firsts, seconds, strict=True)]
        listed = _listed(list(dict.fromkeys(pairs)), shown, language)
        ending = _common_ending(seconds, rule.mass[order])
        text = {"it": f"nella sequenza {listed}", "en": f"in the sequence {listed}"}[language]
    else:
        words = [strings[key] for key in kept]
        listed = _listed(list(dict.fromkeys(f"«{word.strip() or word}»" for word in words)), shown, language)
        ending = _common_ending(words, rule.mass[order])
        before = rule.family == "previous"
        text = {
            "it": f"{'subito dopo' if before else 'su'} {listed}",
            "en": f"{'right after' if before else 'on'} {listed}",
        }[language]
    if ending:
        text += {"it": f", spesso in -{ending}", "en": f", often ending in -{ending}"}[language]
    tail = {
        "it": f" ({share} dell'attivazione, precisione {rule.precision:.2f})",
        "en": f" ({share} of the activation, precision {rule.precision:.2f})",
    }[language]
    return text + tail


def _listed(items: list[str], shown: int, language: Literal["it", "en"]) -> str:
    more = len(items) - shown
    text = ", ".join(items[:shown])
    if more > 0:
        text += {
            "it": f" e {'altri' if more > 1 else 'un altro'}{f' {more}' if more > 1 else ''}",
            "en": f" and {more} more",
        }[language]
    return text


def _common_ending(words: list[str], mass: Float[np.ndarray, " keys"], least: float = 0.8) -> str:
    """Return the longest ending of 2 to 5 letters that words with 80 % of the mass share; "" for fewer than 4 words."""
    cleaned = [word.strip().lower() for word in words]
    if len(set(cleaned)) < 4:
        return ""
    for length in (5, 4, 3, 2):
        endings: dict[str, float] = {}
        for word, share in zip(cleaned, mass, strict=True):
            if len(word) > length and word[-length:].isalpha():
                endings[word[-length:]] = endings.get(word[-length:], 0.0) + float(share)
        best = max(endings, key=lambda ending: endings[ending], default="")
        if best and endings[best] >= least * float(mass.sum()):
            prefix = os.path.commonprefix(cleaned)
            return "" if len(prefix) >= length else best
    return ""
