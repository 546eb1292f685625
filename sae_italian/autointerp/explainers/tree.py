"""A shallow decision tree over the other rules' conditions: what must hold, and what must not, in one place.

Each condition is "the family's key is one of these"; at most three of them, some negated, lead to a leaf. The tree is
scikit-learn's, fitted on the tokens of the training examples; what is kept is its paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sae_italian.autointerp.explainers.keys import KeyRule
from sae_italian.autointerp.places import View

DEPTH = 3
LEAST_LEAF = 5  # tokens
SHARE_SILENT = 8  # silent tokens per active one that the tree is fitted on, at most


@dataclass(frozen=True, eq=False)
class Path:
    """A leaf: the conditions that hold and those that do not, and what was seen there in the training examples."""

    holds: tuple[int, ...]
    fails: tuple[int, ...]
    rate: float
    weight: float
    active: float
    total: float
    mass: float


@dataclass(frozen=True, eq=False)
class TreeRule:
    """Paths that exclude one another; a token has the rate of the path it is on."""

    conditions: tuple[KeyRule, ...]
    paths: tuple[Path, ...]
    n_active: int
    base: float
    threshold: float = 0.0

    family = "tree"

    @property
    def firing(self) -> list[Path]:
        return [path for path in self.paths if path.rate > 0 and path.rate >= self.threshold]

    @property
    def n_conditions(self) -> int:
        used = {i for path in self.firing for i in path.holds + path.fails}
        return sum(len(self.conditions[i].keys) for i in used)

    @property
    def precision(self) -> float:
        """Share of the tokens on which the rule fires that the latent fires on too, in the training examples."""
        claimed = sum(path.total for path in self.firing)
        return sum(path.active for path in self.firing) / claimed if claimed else 0.0

    @property
    def recall(self) -> float:
        return sum(path.active for path in self.firing) / self.n_active if self.n_active else 0.0

    @property
    def lift(self) -> float:
        return self.precision / self.base if self.base else 0.0

    @property
    def mass(self) -> float:
        return sum(path.mass for path in self.firing)

    def predict(self, view: View) -> Float[np.ndarray, "n width"]:
        return self._on_paths(view, "rate")

    def expect(self, view: View) -> Float[np.ndarray, "n width"]:
        return self._on_paths(view, "weight")

    def _on_paths(self, view: View, what: str) -> Float[np.ndarray, "n width"]:
        met = [holds(condition, view) for condition in self.conditions]
        result = np.zeros(view.grid.shape)
        for path in self.paths:
            here = view.grid >= 0
            for i in path.holds:
                here = here & met[i]
            for i in path.fails:
                here = here & ~met[i]
            result[here] = getattr(path, what)
        return result

    def as_dict(self) -> dict[str, Any]:
        """Return the rule as plain JSON values."""
        return {
            "family": "tree",
            "conditions": [condition.as_dict() for condition in self.conditions],
            "paths": [{**vars(path), "holds": list(path.holds), "fails": list(path.fails)} for path in self.paths],
            "n_active": self.n_active,
            "base": self.base,
            "threshold": self.threshold,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TreeRule:
        paths = tuple(
            Path(**{**path, "holds": tuple(path["holds"]), "fails": tuple(path["fails"])}) for path in values["paths"]
        )
        conditions = tuple(KeyRule.from_dict(condition) for condition in values["conditions"])
        return cls(conditions, paths, values["n_active"], values["base"], values["threshold"])


def holds(condition: KeyRule, view: View) -> Bool[np.ndarray, "n width"]:
    """Return where the family's key is one of the condition's."""
    ones = np.ones(len(condition.keys))
    return view.places.look_up(condition.family, condition.keys, ones, view.keys(condition.family)) > 0


def fit_tree(
    rules: Sequence[KeyRule], view: View, values: Float[np.ndarray, "n width"], base: float, seed: int
) -> TreeRule | None:
    """Return the tree over the rules' key sets, fitted on a view of training examples; None where nothing splits them."""
    from sklearn.tree import DecisionTreeClassifier

    rules = [rule for rule in rules if len(rule.keys)]
    inside = view.grid >= 0
    truth, strength = values[inside] > 0, values[inside]
    if not rules or truth.all() or not truth.any():
        return None
    features = np.stack([holds(rule, view)[inside] for rule in rules], axis=1)
    rng = np.random.default_rng(seed)
    n_silent = SHARE_SILENT * int(truth.sum())
    kept = np.concatenate([np.flatnonzero(truth), rng.permutation(np.flatnonzero(~truth))[:n_silent]])
    tree = DecisionTreeClassifier(max_depth=DEPTH, min_samples_leaf=LEAST_LEAF, random_state=seed)
    n_active = int(truth.sum())
    weight = np.where(truth[kept], 1 / n_active, 1 / (len(kept) - n_active))  # both classes weigh the same
    numbers = features.astype(np.float32)
    tree.fit(numbers[kept], truth[kept], sample_weight=weight, check_input=False)
    leaf = tree.tree_.apply(numbers)
    paths = []
    for node, held, failed in _leaves(tree.tree_):
        here = leaf == node
        active, total, mass = int(truth[here].sum()), int(here.sum()), float(strength[here].sum())
        if active and held:  # what only fails conditions is no description
            paths.append(Path(held, failed, active / total, mass / total, active, total, mass / float(strength.sum())))
    if not paths:
        return None
    used = sorted({i for path in paths for i in path.holds + path.fails})
    at = {old: new for new, old in enumerate(used)}
    renumbered = tuple(
        Path(tuple(at[i] for i in p.holds), tuple(at[i] for i in p.fails), p.rate, p.weight, p.active, p.total, p.mass)
        for p in paths
    )
    return TreeRule(tuple(rules[i] for i in used), renumbered, int(truth.sum()), base)


def _leaves(tree: Any) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Return each leaf with the features that hold and that fail on the way to it."""
    found = []
    waiting: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = [(0, (), ())]
    while waiting:
        node, held, failed = waiting.pop()
        if tree.children_left[node] < 0:
            found.append((node, held, failed))
            continue
        feature = int(tree.feature[node])
        waiting.append((int(tree.children_left[node]), held, (*failed, feature)))
        waiting.append((int(tree.children_right[node]), (*held, feature), failed))
    return sorted(found)
