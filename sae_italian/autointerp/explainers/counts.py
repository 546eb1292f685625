"""Counts of one latent's activations in the training documents, key by key, and which keys they single out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float, Int

from sae_italian.autointerp.draws import Activity
from sae_italian.autointerp.explainers.rules import KeyRule
from sae_italian.autointerp.places import Family, Places, Slot

PRIOR = 20.0  # occurrences that the prior is worth, shared out as the keys are in the training documents
LEAST_PRIOR = 0.5  # of a key (Haldane and Anscombe's correction)
LEAST_Z = 1.0  # of the log-odds
SMOOTHING = 1.0  # occurrences at the base rate that are added to each key's
CHAIN_SAMPLE = 20_000  # activations that pairs and triples of tokens are counted on
LEAST_MASS, LEAST_LIFT = 0.4, 3.0  # from which a key beside the token is worth telling


@dataclass
class Tally:
    """Keys with the latent's activations on them and their occurrences, in the training documents."""

    keys: Int[np.ndarray, " k"]
    active: Float[np.ndarray, " k"]  # occurrences on which the latent fires
    mass: Float[np.ndarray, " k"]  # sum of the latent's activations
    total: Int[np.ndarray, " k"]
    at: Int[np.ndarray, " k"] | None = None  # a position of each key, for pairs and triples of tokens

    def take(self, index: Int[np.ndarray, " n"]) -> Tally:
        """Return some of the keys."""
        at = None if self.at is None else self.at[index]
        return Tally(self.keys[index], self.active[index], self.mass[index], self.total[index], at)

    def rule(self, family: Family, names: list[str], n_active: int, base: float, mass: float) -> KeyRule:
        """Return the rule on these keys; `mass` is the sum of the activations that their shares are of."""
        return KeyRule(
            keys=self.keys,
            rates=self.rates(base),
            weights=self.mass / np.maximum(self.total, 1),
            mass=self.mass / mass,
            active=self.active,
            total=self.total.astype(np.int64),
            family=family,
            names=names,
            n_active=n_active,
            base=base,
        )

    def rates(self, base: float) -> Float[np.ndarray, " k"]:
        """Return the share of each key's occurrences on which the latent fires, smoothed towards the base rate."""
        return (self.active + SMOOTHING * base) / (self.total + SMOOTHING)


class Counts:
    """One latent's activations in the training documents, counted by family of keys; each family once."""

    def __init__(self, places: Places, activity: Activity):
        self.places = places
        train = places.source.position_part[activity.position] == 0
        self.position, self.value = activity.position[train], activity.value[train]
        self.n, self.n_tokens = len(self.position), max(len(places.train_positions), 1)
        self.base = self.n / self.n_tokens
        self.mass = max(float(self.value.sum()), 1e-30)
        self.keys, self._seen = cache(self._keys), cache(self._on_forms)

    def _keys(self, family: Family) -> Tally:
        """Return the family's keys that the latent fires on, with their counts."""
        if family in self.places.chains:
            return self._chain(family)
        slot, keys, _ = self.places.tables[family]
        forms, active, mass = self._seen(slot)
        key = keys[forms]
        keyed = key >= 0
        known, group = grouped(key[keyed], len(self.places.totals[family]))
        active, mass = (np.bincount(group, weights=each[keyed], minlength=len(known)) for each in (active, mass))
        return Tally(known, active, mass, self.places.totals[family][known])

    def _on_forms(self, slot: Slot) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the forms at a slot of the activations, how many are on each, and the sum of these."""
        forms = self.places.forms(self.position, slot)
        inside = forms >= 0
        seen, group = grouped(forms[inside], len(self.places.form_token))
        mass = np.bincount(group, weights=self.value[inside], minlength=len(seen))
        return seen, np.bincount(group, minlength=len(seen)), mass

    def _chain(self, family: Family) -> Tally:
        """Count from every n-th activation where there are very many."""
        step = -(-self.n // CHAIN_SAMPLE) if self.n else 1
        position, value = self.position[::step], self.value[::step]
        key = self.places.chains[family][position]
        position, value, key = position[key >= 0], value[key >= 0], key[key >= 0]
        known, first, index = np.unique(key, return_index=True, return_inverse=True)
        total = self.places.totals[family][known]
        active = np.minimum(np.bincount(index, minlength=len(known)) * step, total)
        mass = np.bincount(index, weights=value, minlength=len(known)) * step
        return Tally(known, active, mass, total, position[first])

    def telling(self, tally: Tally) -> Int[np.ndarray, " n"]:
        """Return the indices of the keys whose log-odds are LEAST_Z above 0; one that was seen once tells nothing."""
        return np.flatnonzero((self.log_odds(tally) >= LEAST_Z) & (tally.total > 1))

    def log_odds(self, tally: Tally) -> Float[np.ndarray, " k"]:
        """Return the z-value of each key's log-odds, the latent's activations against all other training tokens.

        With a Dirichlet prior in proportion to the keys' occurrences (Monroe et al. 2008, eq. 16 and 22), of LEAST_PRIOR at
        least: else a rare key that is never silent, the best there can be, has a variance without bounds and a z below 1.
        """
        silent, n_silent = tally.total - tally.active, len(self.places.train_positions) - self.n
        prior = np.maximum(PRIOR * tally.total / self.n_tokens, LEAST_PRIOR)
        with np.errstate(divide="ignore", invalid="ignore"):
            ours = np.log((tally.active + prior) / (self.n + PRIOR - tally.active - prior))
            theirs = np.log((silent + prior) / (n_silent + PRIOR - silent - prior))
            return (ours - theirs) / np.sqrt(1 / (tally.active + prior) + 1 / (silent + prior))

    def rule(self, family: Family, tally: Tally) -> KeyRule:
        """Return the rule on some keys of a family."""
        return tally.rule(family, self._names(family, tally), self.n, self.base, self.mass)

    def _names(self, family: Family, tally: Tally) -> list[str]:
        if tally.at is None:
            return [self.places.name(family, key) for key in tally.keys.tolist()]
        back = 1 if family == "bigram" else 2
        tokens, strings = self.places.source.tokens, self.places.strings
        return ["".join(strings[t] for t in tokens[p - back : p + 1].tolist()) for p in tally.at.tolist()]

    def frequent(self, family: Family) -> str:
        """Return the key of a family that much of the activation and a raised share of it lies on, or ""."""
        tally = self.keys(family)
        if len(tally.keys) == 0:
            return ""
        heaviest = int(np.argmax(tally.mass))
        share = tally.mass[heaviest] / self.value.sum()
        lift = tally.active[heaviest] / tally.total[heaviest] / max(self.base, 1e-12)
        name = self.places.name(family, int(tally.keys[heaviest])).strip()
        return name if share >= LEAST_MASS and lift >= LEAST_LIFT else ""


def grouped(number: Int[np.ndarray, " n"], size: int) -> tuple[Int[np.ndarray, " groups"], Int[np.ndarray, " n"]]:
    """Return the different numbers below `size`, ascending, and for each item which of them it is; nothing is sorted."""
    there = np.zeros(size, dtype=bool)
    there[number] = True
    known = np.flatnonzero(there)
    place = np.empty(size, dtype=np.int64)
    place[known] = np.arange(len(known))
    return known, place[number]
