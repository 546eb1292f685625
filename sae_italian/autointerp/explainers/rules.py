"""The three kinds of rule: a table of keys, a trie of contexts, a shallow tree. Each gives a rate to every token.

A rule fires on a token whose rate, the share of such training tokens on which the latent fires, reaches its threshold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from sae_italian.autointerp.places import Family, View

Value = Literal["rate", "weight"]
Numbers = tuple[int, ...]
PATHS = 3  # of a tree that its text names


class Figures(NamedTuple):
    """How well a rule fits the training tokens, or in a tree's case the training examples."""

    precision: float  # share of the tokens on which the rule fires that the latent fires on too
    recall: float
    lift: float  # how many times likelier the latent is to fire where the rule does than anywhere
    mass: float  # share of the latent's activation


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

    @property
    @abstractmethod
    def n_conditions(self) -> int:
        """How many keys a reader of the rule has to know."""

    @abstractmethod
    def fired(self, name: str) -> float:
        """Return the sum over what fires of the training tokens on which the latent does too (`active`), of all training
        tokens there (`total`), or of the share of the latent's activation (`mass`)."""

    @abstractmethod
    def take(self, told: Numbers) -> LatentRule:
        """Return the rule that knows these keys only, and names them all."""

    @abstractmethod
    def at(self, view: View, what: Value) -> Float[np.ndarray, "n width"]:
        """Return the rate, or the mean activation there (silent tokens included), at each token; 0 where nothing is known."""

    def figures(self) -> Figures:
        """Return how well the rule fits the training tokens."""
        active, total, mass = map(self.fired, ("active", "total", "mass"))
        precision = float(active / total) if total else 0.0
        # of a trie pairs and triples are counted on a sample, so the shares are rough
        recall = min(float(active / self.n_active), 1.0) if self.n_active else 0.0
        return Figures(precision, recall, precision / self.base if self.base else 0.0, min(float(mass), 1.0))

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


class TableRule(LatentRule):
    """A rule that fires where a key of its tables does."""

    @property
    def n_conditions(self) -> int:
        return sum(int(self.firing(table).sum()) for table in self.tables)

    def fired(self, name: str) -> float:
        return sum(float(getattr(table, name)[self.firing(table)].sum()) for table in self.tables)


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyRule(TableRule):
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
        there = np.array(told, dtype=np.int64)
        arrays = {name: getattr(self, name)[there] for name in _ARRAYS}
        return replace(self, **arrays, names=[self.names[i] for i in told], told=tuple(range(len(told))))

    def at(self, view: View, what: Value) -> Float[np.ndarray, "n width"]:
        return view.look_up(self.family, self.keys, getattr(self, f"{what}s"))

    def holds(self, view: View) -> Bool[np.ndarray, "n width"]:
        """Return where the token's key is one of the rule's, whatever its rate."""
        return view.look_up(self.family, self.keys, np.ones(len(self.keys))) > 0


@dataclass(frozen=True, eq=False, kw_only=True)
class TrieRule(TableRule):
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


@dataclass(frozen=True, eq=False)
class Path:
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
        return sorted(self.firing_paths, key=lambda path: -path.mass)[:PATHS]

    def firing(self, table: KeyRule) -> Bool[np.ndarray, " k"]:
        return np.ones(len(table.keys), dtype=bool)  # whether a path fires is not decided by a key

    @property
    def firing_paths(self) -> list[Path]:
        return [path for path in self.paths if path.rate > 0 and path.rate >= self.threshold]

    @property
    def n_conditions(self) -> int:
        used = {i for path in self.firing_paths for i in path.holds + path.fails}
        return sum(len(self.conditions[i].keys) for i in used)

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
