"""The three kinds of rule: a table of keys, a trie of contexts, a shallow tree; and the counts of keys that they are made of.

Each gives a rate to every token. A rule fires on a token whose rate, the share of such training tokens on which the latent
fires, reaches its threshold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_italian.autointerp.draws import Activity
from sae_italian.autointerp.places import Family, Places, Slot, View

Value = Literal["rate", "weight"]
Numbers = tuple[int, ...]


class LatentRule(ABC):
    """What every rule can say of itself and of tokens."""

    family: str
    threshold: float
    n_active: int  # training tokens on which the latent fires
    base: float  # share of all training tokens that is
    told: Numbers  # the keys that its text names, numbered over all tables, in the order of what each adds

    @property
    @abstractmethod
    def tables(self) -> tuple[KeyRule, ...]:
        """The tables of keys that the rule is made of."""

    def fired(self, name: str) -> float:
        """Return the sum over what fires of the training tokens on which the latent does too (`active`), of all training
        tokens there (`total`), or of the share of the latent's activation (`mass`)."""
        return sum(float(getattr(table, name)[self.firing(table)].sum()) for table in self.tables)

    @abstractmethod
    def take(self, told: Numbers) -> LatentRule:
        """Return the rule that knows these keys only, and names them all."""

    @abstractmethod
    def at(self, view: View, what: Value) -> Float[np.ndarray, "n width"]:
        """Return the rate, or the mean activation there (silent tokens included), at each token; 0 where nothing is known."""

    def figures(self) -> dict[str, float]:
        """Return how well the rule fits the training tokens, or in a tree's case the training examples.

        `precision` (share of the tokens on which the rule fires that the latent fires on too), `recall`, `lift` (how many
        times likelier the latent is to fire where the rule does than anywhere), `share` of the latent's activation.
        """
        active, total, mass = map(self.fired, ("active", "total", "mass"))
        precision = float(active / total) if total else 0.0
        # of a trie pairs and triples are counted on a sample, so the shares are rough
        recall = min(float(active / self.n_active), 1.0) if self.n_active else 0.0
        lift = precision / self.base if self.base else 0.0
        return {"precision": precision, "recall": recall, "lift": lift, "share": min(float(mass), 1.0)}

    def firing(self, table: KeyRule) -> Bool[np.ndarray, " k"]:
        """Return which keys of a table can make the rule fire."""
        return table.rates >= self.threshold

    def split(self, told: Numbers) -> tuple[Numbers, ...]:
        """Return the numbers of some keys by table, counted from each table's first."""
        first = np.cumsum([0, *(len(table.keys) for table in self.tables)]).tolist()
        return tuple(tuple(n - start for n in told if start <= n < stop) for start, stop in pairwise(first))

    def taken(self, told: Numbers) -> tuple[KeyRule, ...]:
        """Return each table with those of its keys that are among the numbered ones."""
        return tuple(table.take(own) for table, own in zip(self.tables, self.split(told), strict=True))


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyRule(LatentRule):
    """A token has the rate of its key: tokens, words, endings, shapes, or what stands beside."""

    keys: np.ndarray  # [k]
    rates: Float[np.ndarray, " k"]
    weights: Float[np.ndarray, " k"]
    mass: Float[np.ndarray, " k"]  # share of the latent's activation that lies on the key
    active: Float[np.ndarray, " k"]  # training occurrences of the key on which the latent fires
    total: np.ndarray  # [k] training occurrences of the key
    family: Family
    names: list[str]  # the keys as text
    n_active: int
    base: float
    threshold: float = 0.0
    told: Numbers = ()
    notes: dict[str, str] = field(default_factory=dict)  # contexts that are frequent, for the text only

    @property
    def tables(self) -> tuple[KeyRule, ...]:
        return (self,)

    def take(self, told: Numbers) -> KeyRule:
        arrays = {name: getattr(self, name)[np.array(told, dtype=np.int64)] for name in _ARRAYS}
        return replace(self, **arrays, names=[self.names[i] for i in told], told=tuple(range(len(told))))

    def at(self, view: View, what: Value) -> Float[np.ndarray, "n width"]:
        return view.look_up(self.family, self.keys, getattr(self, f"{what}s"))

    def holds(self, view: View) -> Bool[np.ndarray, "n width"]:
        """Return where the token's key is one of the rule's, whatever its rate."""
        return view.look_up(self.family, self.keys, np.ones(len(self.keys))) > 0


@dataclass(frozen=True, eq=False, kw_only=True)
class TrieRule(LatentRule):
    """Levels from one token to three, the last token first; the longest known context decides."""

    family: Literal["trie"] = "trie"
    levels: tuple[KeyRule, ...]
    threshold: float = 0.0
    told: Numbers = ()

    @property
    def tables(self) -> tuple[KeyRule, ...]:
        return self.levels

    def take(self, told: Numbers) -> TrieRule:
        return replace(self, levels=self.taken(told), told=tuple(range(len(told))))

    @property
    def n_active(self) -> int:
        return self.levels[0].n_active

    @property
    def base(self) -> float:
        return self.levels[0].base

    def at(self, view: View, what: Value) -> Float[np.ndarray, "n width"]:
        result = np.zeros(view.grid.shape)
        for level in self.levels:
            found = level.at(view, what)
            result = np.where(found > 0 if what == "rate" else level.holds(view), found, result)  # no rate is 0
        return result


class Path(NamedTuple):
    """A leaf: the conditions that hold and those that do not, by number, and what was seen there in the training examples."""

    holds: Numbers
    fails: Numbers
    rate: float
    weight: float
    active: float
    total: float
    mass: float


@dataclass(frozen=True, eq=False, kw_only=True)
class TreeRule(LatentRule):
    """Paths that exclude one another, over conditions "the key is one of these"; a token has the rate of its path."""

    PATHS: ClassVar[int] = 3  # that its text names
    family: Literal["tree"] = "tree"
    conditions: tuple[KeyRule, ...]
    paths: tuple[Path, ...]
    n_active: int
    base: float
    threshold: float = 0.0
    told: Numbers = ()

    @property
    def tables(self) -> tuple[KeyRule, ...]:
        return self.conditions

    def take(self, told: Numbers) -> TreeRule:
        """Return the rule of the heaviest paths whose conditions all have keys left."""
        conditions = self.taken(told)
        paths = [path for path in self.heaviest() if all(conditions[i].names for i in path.holds + path.fails)]
        return replace(self, conditions=conditions, paths=tuple(paths), told=tuple(range(len(told))))

    def heaviest(self) -> list[Path]:
        """Return the paths that a text names."""
        return sorted(self.firing_paths, key=lambda path: -path.mass)[: self.PATHS]

    def firing(self, table: KeyRule) -> Bool[np.ndarray, " k"]:
        return np.ones(len(table.keys), dtype=bool)  # whether a path fires is not decided by a key

    @property
    def firing_paths(self) -> list[Path]:
        return [path for path in self.paths if path.rate >= self.threshold]

    def fired(self, name: str) -> float:
        return sum(getattr(path, name) for path in self.firing_paths)

    def at(self, view: View, what: Value) -> Float[np.ndarray, "n width"]:
        met = [condition.holds(view) for condition in self.conditions]
        result = np.zeros(view.grid.shape)
        for path in self.paths:
            here = view.grid >= 0
            for i in path.holds:
                here = here & met[i]
            for i in path.fails:
                here = here & ~met[i]
            result[here] = getattr(path, what)
        return result


_ARRAYS = {"keys": np.int64, "total": np.int64} | dict.fromkeys(("rates", "weights", "mass", "active"), np.float64)
_KINDS: dict[str, type[LatentRule]] = {"trie": TrieRule, "tree": TreeRule}


def rule_of(stored: dict[str, Any]) -> LatentRule:
    """Return the rule that `base.report.plain` made JSON values of; it holds for the cache it was made from."""
    kind = _KINDS.get(stored["family"], KeyRule)
    values = {each.name: stored[each.name] for each in fields(kind)}  # pyright: ignore[reportArgumentType]
    for name, value in values.items():
        if name in ("levels", "conditions"):
            values[name] = tuple(rule_of(part) for part in value)
        elif name == "paths":
            values[name] = tuple(Path(tuple(p.pop("holds")), tuple(p.pop("fails")), **p) for p in map(dict, value))
        elif name == "told":
            values[name] = tuple(value)
        elif name in _ARRAYS:
            values[name] = np.array(value, dtype=_ARRAYS[name])
    return kind(**values)


# --- counts of one latent's activations in the training documents ----------------------------------------------------


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
        known, group = np.unique(key[keyed], return_inverse=True)
        active, mass = (np.bincount(group, weights=each[keyed], minlength=len(known)) for each in (active, mass))
        return Tally(known, active, mass, self.places.totals[family][known])

    def _on_forms(self, slot: Slot) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the forms at a slot of the activations, how many are on each, and the sum of these."""
        forms = self.places.forms(self.position, slot)
        inside = forms >= 0
        seen, group = np.unique(forms[inside], return_inverse=True)
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
        if tally.at is None:
            names = [self.places.name(family, key) for key in tally.keys.tolist()]
        else:
            windows = self.places.source.tokens[tally.at[:, None] + np.arange(-1 if family == "bigram" else -2, 1)]
            names = ["".join(self.places.strings[token] for token in window) for window in windows.tolist()]
        return tally.rule(family, names, self.n, self.base, self.mass)

    def frequent(self, family: Family) -> str:
        """Return the key of a family that much of the activation and a raised share of it lies on, or ""."""
        tally = self.keys(family)
        if len(tally.keys) == 0:
            return ""
        heaviest = int(np.argmax(tally.mass))
        share = tally.mass[heaviest] / self.mass
        lift = tally.active[heaviest] / tally.total[heaviest] / self.base
        name = self.places.name(family, int(tally.keys[heaviest])).strip()
        return name if share >= LEAST_MASS and lift >= LEAST_LIFT else ""
