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
# A rule that lists hundreds of keys remembers, it does not explain; pairs are many and each says little.
MAX_KEYS: dict[Family, int] = {"token": 128, "previous": 64, "bigram": 32}


@dataclass(frozen=True)
class Rule:
    """Expected activation by key, keys sorted; a token fires when its key's weight is at least `threshold`."""

    family: Family
    keys: Int[np.ndarray, " keys"]
    weights: Float[np.ndarray, " keys"]  # mean activation on the key in the training documents, zeros included
    mass: Float[np.ndarray, " keys"]  # share of the latent's activation that lies on the key
    active: Int[np.ndarray, " keys"]  # occurrences of the key on which the latent fires, in the training documents
    total: Int[np.ndarray, " keys"]  # occurrences of the key there
    n_active: int  # all tokens on which the latent fires there
    threshold: float = 0.0

    @property
    def firing(self) -> Bool[np.ndarray, " keys"]:
        return (self.weights > 0) & (self.weights >= self.threshold)

    @property
    def precision(self) -> float:
        """Share of the tokens on which the rule fires that the latent fires on too, in the training documents."""
        claimed = int(self.total[self.firing].sum())
        return float(self.active[self.firing].sum() / claimed) if claimed else 0.0

    @property
    def recall(self) -> float:
        return float(self.active[self.firing].sum() / self.n_active) if self.n_active else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the rule as plain JSON values, with the precision and recall that follow from it."""
        fields = {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()
        }
        return {**fields, "precision": self.precision, "recall": self.recall}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Rule:
        kinds = {"keys": np.int64, "active": np.int64, "total": np.int64, "weights": np.float64, "mass": np.float64}
        arrays = {name: np.array(values[name], dtype=kind) for name, kind in kinds.items()}
        return cls(family=values["family"], n_active=values["n_active"], threshold=values["threshold"], **arrays)


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
    order = np.lexsort((-active, -(active / total)))[: MAX_KEYS[family]]
    f1 = 2 * np.cumsum(active[order]) / (np.cumsum(total[order]) + active.sum())
    chosen = np.sort(order[: int(np.argmax(f1)) + 1])
    return Rule(
        family=family,
        keys=keys[chosen],
        weights=(mass / total)[chosen],
        mass=(mass / mass.sum())[chosen],
        active=active[chosen],
        total=total[chosen],
        n_active=int(active.sum()),
    )


def fires(rule: Rule, predicted: Float[np.ndarray, "n width"]) -> Bool[np.ndarray, "n width"]:
    return (predicted > 0) & (predicted >= rule.threshold)


# --- text ------------------------------------------------------------------------------------------------------------


_WORDS = {
    "it": {
        "token": "su",
        "previous": "subito dopo",
        "bigram": "nella sequenza",
        "more": "e altri",
        "one more": "e un altro",
        "ending": "spesso in",
        "tail": "({mass} dell'attivazione, precisione {precision})",
    },
    "en": {
        "token": "on",
        "previous": "right after",
        "bigram": "in the sequence",
        "more": "and others:",
        "one more": "and one more",
        "ending": "often ending in",
        "tail": "({mass} of the activation, precision {precision})",
    },
}


def describe(rule: Rule, vocab: int, strings: list[str], language: Literal["it", "en"], shown: int = 6) -> str:
    """Return the rule in one sentence of Italian or English. `strings` are the tokens as text, by id."""
    say = _WORDS[language]
    keys, mass = rule.keys[rule.firing], rule.mass[rule.firing]
    order = np.argsort(-mass, kind="stable")
    heaviest = [int(key) for key in keys[order]]
    ends = [strings[key % vocab] for key in heaviest]
    if rule.family == "bigram":
        quoted = [f"«{strings[key // vocab].strip()}{end}»" for key, end in zip(heaviest, ends, strict=True)]
    else:
        quoted = [f"«{end.strip() or end}»" for end in ends]
    distinct = list(dict.fromkeys(quoted))
    text = f"{say[rule.family]} {', '.join(distinct[:shown])}"
    if len(distinct) > shown:
        rest = len(distinct) - shown
        text += f" {say['one more']}" if rest == 1 else f" {say['more']} {rest}"
    if ending := _common_ending(ends, mass[order]):
        text += f", {say['ending']} -{ending}"
    precision = f"{rule.precision:.2f}".replace(".", "," if language == "it" else ".")
    return f"{text} {say['tail'].format(mass=f'{100 * mass.sum():.0f} %', precision=precision)}"


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
