"""Rules that are a table from one kind of key to what is expected there: tokens, words, endings, shapes, contexts.

Keys are those on which the latent fires more often than elsewhere (log-odds with a Dirichlet prior, Monroe et al. 2008),
added in order of the share of their occurrences on which it fires as long as F1 on the training documents grows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_italian.autointerp.examples import Activity
from sae_italian.autointerp.places import Family, Places, Slot, View

# A rule that lists hundreds of keys remembers, it does not explain; the fewer the wider each is.
MAX_KEYS: dict[Family, int] = {
    "token": 128,
    "word": 128,
    "suffix2": 8,
    "suffix3": 12,
    "suffix4": 12,
    "suffix5": 12,
    "prefix3": 8,
    "prefix4": 8,
    "shape": 3,
    "clitic": 8,
    "previous": 64,
    "previous-word": 64,
    "next": 64,
    "bigram": 32,
}
FAMILIES: tuple[Family, ...] = tuple(MAX_KEYS)
PRIOR = 20.0  # occurrences that the prior is worth, shared out as the keys are in the training documents
LEAST_Z = 1.0  # of the log-odds
SMOOTHING = 1.0  # occurrences at the base rate that are added to each key's
CHAIN_SAMPLE = 20_000  # activations that pairs and triples of tokens are counted on


class Counts:
    """One latent's activations in the training documents, counted by form and slot."""

    def __init__(self, places: Places, activity: Activity):
        self.places = places
        train = places.source.position_part[activity.position] == 0
        self.position, self.value = activity.position[train], activity.value[train]
        self.n = len(self.position)
        self.base = self.n / max(len(places.train_positions), 1)
        self._forms: dict[Slot, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._tallies: dict[Family, Tally] = {}

    def forms(self, slot: Slot) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
        """Return the forms seen at a slot of the activations, how often, and with how much activation in all."""
        if slot not in self._forms:
            forms = self.places.forms(self.position, slot)
            inside = forms >= 0
            seen, group = _grouped(forms[inside], len(self.places.form_token))
            n = len(seen)
            mass = np.bincount(group, weights=self.value[inside], minlength=n)
            self._forms[slot] = seen, np.bincount(group, minlength=n), mass
        return self._forms[slot]

    def keys(self, family: Family) -> Tally:
        """Return the family's keys that the latent fires on, with their counts."""
        if family not in self._tallies:
            self._tallies[family] = self._chain(family) if family in ("bigram", "trigram") else self._single(family)
        return self._tallies[family]

    def _single(self, family: Family) -> Tally:
        table = self.places.tables[family]
        forms, active, mass = self.forms(table.slot)
        key = table.keys[forms]
        keyed = key >= 0
        known, group = _grouped(key[keyed], len(self.places.totals[family]))
        n = len(known)
        return Tally(
            known,
            np.bincount(group, weights=active[keyed], minlength=n),
            np.bincount(group, weights=mass[keyed], minlength=n),
            self.places.totals[family][known],
        )

    def _chain(self, family: Family) -> Tally:
        """As `keys`, from every n-th activation where there are very many; `at` is a position of each key."""
        step = -(-self.n // CHAIN_SAMPLE) if self.n else 1
        position, value = self.position[::step], self.value[::step]
        key = self.places.chain(family)[position]
        position, value, key = position[key >= 0], value[key >= 0], key[key >= 0]
        known, first, index = np.unique(key, return_index=True, return_inverse=True)
        total = self.places.totals[family][known]
        active = np.minimum(np.bincount(index, minlength=len(known)) * step, total)
        mass = np.bincount(index, weights=value, minlength=len(known)) * step
        return Tally(known, active, mass, total, position[first])

    def telling(self, tally: Tally) -> Int[np.ndarray, " n"]:
        """Return the indices of the keys whose log-odds are LEAST_Z above 0; only those above the base rate can be."""
        above = np.flatnonzero(tally.active > self.base * tally.total)
        return above[self.log_odds(tally.take(above)) >= LEAST_Z]

    def log_odds(self, tally: Tally) -> Float[np.ndarray, " k"]:
        """Return the z-value of each key's log-odds, the latent's activations against all other training tokens."""
        silent, n_silent = tally.total - tally.active, len(self.places.train_positions) - self.n
        prior = PRIOR * tally.total / max(len(self.places.train_positions), 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ours = np.log((tally.active + prior) / (self.n + PRIOR - tally.active - prior))
            theirs = np.log((silent + prior) / (n_silent + PRIOR - silent - prior))
            z = (ours - theirs) / np.sqrt(1 / (tally.active + prior) + 1 / (silent + prior))
        return np.nan_to_num(z, nan=0.0, posinf=100.0)


def _grouped(number: Int[np.ndarray, " n"], size: int) -> tuple[Int[np.ndarray, " groups"], Int[np.ndarray, " n"]]:
    """Return the different numbers below `size`, ascending, and for each item which of them it is; nothing is sorted."""
    there = np.zeros(size, dtype=bool)
    there[number] = True
    known = np.flatnonzero(there)
    place = np.empty(size, dtype=np.int64)
    place[known] = np.arange(len(known))
    return known, place[number]


@dataclass
class Tally:
    """Keys with the latent's activations on them and their occurrences, in the training documents."""

    keys: Int[np.ndarray, " k"]
    active: Float[np.ndarray, " k"]
    mass: Float[np.ndarray, " k"]
    total: Int[np.ndarray, " k"]
    at: Int[np.ndarray, " k"] | None = None

    def take(self, index: Int[np.ndarray, " n"]) -> Tally:
        """Return some of the keys."""
        at = None if self.at is None else self.at[index]
        return Tally(self.keys[index], self.active[index], self.mass[index], self.total[index], at)

    def rates(self, base: float) -> Float[np.ndarray, " k"]:
        return (self.active + SMOOTHING * base) / (self.total + SMOOTHING)


@dataclass(frozen=True, eq=False)
class KeyRule:
    """A token fires when its key's rate is at least `threshold`; keys are sorted."""

    family: Family
    keys: Int[np.ndarray, " k"]
    names: list[str]  # the keys as text
    rates: Float[np.ndarray, " k"]  # share of the key's training occurrences on which the latent fires
    weights: Float[np.ndarray, " k"]  # mean activation there, zeros included
    mass: Float[np.ndarray, " k"]  # share of the latent's activation that lies on the key
    active: Float[np.ndarray, " k"]  # training occurrences of the key on which the latent fires
    total: Int[np.ndarray, " k"]  # training occurrences of the key
    n_active: int  # all training tokens on which the latent fires
    base: float  # share of all training tokens that is
    threshold: float = 0.0
    notes: dict[str, str] = field(default_factory=dict)  # contexts that are frequent, for the text only

    @property
    def firing(self) -> Bool[np.ndarray, " k"]:
        return self.rates >= self.threshold

    @property
    def n_conditions(self) -> int:
        return int(self.firing.sum())

    @property
    def precision(self) -> float:
        """Share of the training tokens on which the rule fires that the latent fires on too."""
        claimed = float(self.total[self.firing].sum())
        return float(self.active[self.firing].sum()) / claimed if claimed else 0.0

    @property
    def recall(self) -> float:
        return float(self.active[self.firing].sum() / self.n_active) if self.n_active else 0.0

    @property
    def lift(self) -> float:
        """How many times likelier the latent is to fire where the rule does than anywhere."""
        return self.precision / self.base if self.base else 0.0

    def predict(self, view: View) -> Float[np.ndarray, "n width"]:
        """Return the rate at each position of the view, 0 at unknown keys."""
        return self._at(view, self.rates)

    def expect(self, view: View) -> Float[np.ndarray, "n width"]:
        """Return the expected activation at each position of the view."""
        return self._at(view, self.weights)

    def _at(self, view: View, values: Float[np.ndarray, " k"]) -> Float[np.ndarray, "n width"]:
        if len(self.keys) == 0:
            return np.zeros(view.grid.shape)
        return view.places.look_up(self.family, self.keys, values, view.keys(self.family))

    def as_dict(self) -> dict[str, Any]:
        """Return the rule as plain JSON values."""
        arrays = ("keys", "rates", "weights", "mass", "active", "total")
        return {name: getattr(self, name).tolist() for name in arrays} | {
            "family": self.family,
            "names": self.names,
            "n_active": self.n_active,
            "base": self.base,
            "threshold": self.threshold,
            "notes": self.notes,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> KeyRule:
        kinds = {"keys": np.int64, "total": np.int64}
        arrays = {
            name: np.array(values[name], dtype=kinds.get(name, np.float64))
            for name in ("keys", "rates", "weights", "mass", "active", "total")
        }
        others = ("family", "names", "n_active", "base", "threshold", "notes")
        return cls(**arrays, **{name: values[name] for name in others})


def fit_keys(counts: Counts, family: Family) -> KeyRule:
    """Return the rule of one family whose firing matches the latent's best (F1 per token) in the training documents."""
    tally = counts.keys(family)
    rates = tally.rates(counts.base)
    telling = counts.telling(tally)
    order = telling[np.lexsort((-tally.active[telling], -rates[telling]))][: MAX_KEYS[family]]
    f1 = 2 * np.cumsum(tally.active[order]) / (np.cumsum(tally.total[order]) + counts.n)
    chosen = np.sort(order[: int(np.argmax(f1)) + 1]) if len(order) else order
    return KeyRule(
        family=family,
        keys=tally.keys[chosen],
        names=names_of(counts.places, family, tally, chosen),
        rates=rates[chosen],
        weights=(tally.mass / tally.total)[chosen],
        mass=(tally.mass / max(float(counts.value.sum()), 1e-30))[chosen],
        active=tally.active[chosen],
        total=tally.total[chosen],
        n_active=counts.n,
        base=counts.base,
    )


def names_of(places: Places, family: Family, tally: Tally, chosen: Int[np.ndarray, " n"]) -> list[str]:
    """Return the text of some of a tally's keys."""
    if tally.at is None:
        return [places.name(family, key) for key in tally.keys[chosen].tolist()]
    back = 1 if family == "bigram" else 2
    tokens, strings = places.source.tokens, places.strings
    return ["".join(strings[t] for t in tokens[p - back : p + 1].tolist()).strip() for p in tally.at[chosen].tolist()]


def frequent_context(counts: Counts, slot_family: Family, least_mass: float = 0.4, least_lift: float = 3.0) -> str:
    """Return the key of a context family that much of the activation and a raised share of it lies on, or ""."""
    tally = counts.keys(slot_family)
    if len(tally.keys) == 0:
        return ""
    heaviest = int(np.argmax(tally.mass))
    share = tally.mass[heaviest] / counts.value.sum()
    lift = tally.active[heaviest] / tally.total[heaviest] / max(counts.base, 1e-12)
    name = counts.places.name(slot_family, int(tally.keys[heaviest])).strip()
    return name if share >= least_mass and lift >= least_lift else ""
