"""A trie of contexts in the manner of Neuron to Graph (Foote et al. 2023), from the cache alone.

The last token comes first, then the one before it, then the one before that. A longer context is a node of its own where
the latent fires on it significantly more often than on the shorter one; the shorter one then stands for the rest of its
occurrences. Where N2G asks the model which tokens of a context matter, this asks only how often the latent fires.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sae_italian.autointerp.explainers.keys import SMOOTHING, Counts, KeyRule, Tally, names_of
from sae_italian.autointerp.places import Family, View

MAX_NODES: dict[Family, int] = {"token": 64, "bigram": 96, "trigram": 48}
LEAST_GAIN = 2.0  # standard deviations by which a longer context must exceed the shorter one
LEAST_SEEN = 3  # training occurrences of a longer context


@dataclass(frozen=True, eq=False)
class TrieRule:
    """Levels from one token to three; the longest known context decides."""

    levels: tuple[KeyRule, ...]
    threshold: float = 0.0

    family = "trie"

    @property
    def n_conditions(self) -> int:
        return sum(int((level.rates >= self.threshold).sum()) for level in self.levels)

    @property
    def n_active(self) -> int:
        return self.levels[0].n_active

    @property
    def precision(self) -> float:
        firing = [
            (level.active[f].sum(), level.total[f].sum()) for level in self.levels if len(f := self._firing(level))
        ]
        claimed = sum(total for _, total in firing)
        return float(sum(active for active, _ in firing) / claimed) if claimed else 0.0

    @property
    def recall(self) -> float:
        active = sum(level.active[self._firing(level)].sum() for level in self.levels)
        return min(float(active / self.n_active), 1.0) if self.n_active else 0.0

    @property
    def lift(self) -> float:
        return self.precision / self.levels[0].base if self.levels[0].base else 0.0

    @property
    def mass(self) -> float:
        return min(float(sum(level.mass[self._firing(level)].sum() for level in self.levels)), 1.0)

    def _firing(self, level: KeyRule) -> Int[np.ndarray, " k"]:
        return np.flatnonzero(level.rates >= self.threshold)

    def predict(self, view: View) -> Float[np.ndarray, "n width"]:
        return self._deepest(view, "rates")

    def expect(self, view: View) -> Float[np.ndarray, "n width"]:
        return self._deepest(view, "weights")

    def _deepest(self, view: View, what: str) -> Float[np.ndarray, "n width"]:
        result = np.zeros(view.grid.shape)
        for level in self.levels:
            if len(level.keys):
                number = np.arange(1.0, len(level.keys) + 1)
                found = view.places.look_up(level.family, level.keys, number, view.keys(level.family)).astype(np.int64)
                result = np.where(found > 0, getattr(level, what)[found - 1], result)
        return result

    def as_dict(self) -> dict[str, Any]:
        return {"family": "trie", "levels": [level.as_dict() for level in self.levels], "threshold": self.threshold}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrieRule:
        return cls(tuple(KeyRule.from_dict(level) for level in values["levels"]), values["threshold"])


def fit_trie(counts: Counts) -> TrieRule:
    """Return the trie of one latent's training activations."""
    token = counts.keys("token")
    known = counts.telling(token)
    known = np.sort(known[np.argsort(-token.active[known], kind="stable")][: MAX_NODES["token"]])
    token = token.take(known)
    token.at = None
    tokens = counts.places.source.tokens
    pair = counts.keys("bigram")
    assert pair.at is not None
    pair, pair_parent = _significant(counts, pair, token, token.keys, tokens[pair.at], "bigram")
    triple = counts.keys("trigram")
    assert triple.at is not None and pair.at is not None
    triple, triple_parent = _significant(
        counts, triple, pair, pair.keys, counts.places.bigram[triple.at].astype(np.int64), "trigram"
    )
    _keep_the_rest(token, pair, pair_parent)
    _keep_the_rest(pair, triple, triple_parent)
    return TrieRule((_level(counts, "token", token), _level(counts, "bigram", pair), _level(counts, "trigram", triple)))


def _significant(
    counts: Counts,
    tally: Tally,
    parent: Tally,
    parent_keys: Int[np.ndarray, " p"],
    parent_of: Int[np.ndarray, " k"],
    family: Family,
) -> tuple[Tally, Int[np.ndarray, " m"]]:
    """Return the contexts on which the latent fires more often than on the shorter ones, and the index of each parent."""
    if len(parent_keys) == 0:
        return tally.take(np.empty(0, dtype=np.int64)), np.empty(0, dtype=np.int64)
    index = np.searchsorted(parent_keys, parent_of).clip(max=len(parent_keys) - 1)
    rate = (parent.active / parent.total)[index].clip(0, 1)
    expected = tally.total * rate
    gain = (tally.active - expected) / np.sqrt(expected * (1 - rate) + 0.25)
    keep = np.flatnonzero((parent_keys[index] == parent_of) & (tally.total >= LEAST_SEEN) & (gain >= LEAST_GAIN))
    best = keep[np.argsort(-(tally.active - expected)[keep], kind="stable")][: MAX_NODES[family]]
    best = np.sort(best)
    return tally.take(best), index[best]


def _keep_the_rest(parent: Tally, child: Tally, index: Int[np.ndarray, " m"]) -> None:
    """Leave to the parents the occurrences that no child has."""
    for name in ("active", "mass", "total"):
        values = getattr(parent, name).astype(np.float64)
        np.subtract.at(values, index, getattr(child, name))
        setattr(parent, name, values.clip(min=0))


def _level(counts: Counts, family: Family, tally: Tally) -> KeyRule:
    total = tally.total.astype(np.int64)
    return KeyRule(
        family=family,
        keys=tally.keys,
        names=names_of(counts.places, family, tally, np.arange(len(tally.keys))),
        rates=(tally.active + SMOOTHING * counts.base) / (total + SMOOTHING),
        weights=tally.mass / np.maximum(total, 1),
        mass=tally.mass / max(float(counts.value.sum()), 1e-30),
        active=tally.active,
        total=total,
        n_active=counts.n,
        base=counts.base,
    )
