"""Fitting the rules of one latent to its activations in the training documents.

Keys: those on which the latent fires more often than elsewhere, in order of the share of their occurrences on which it
fires, as long as F1 over the training tokens grows.
Trie: contexts in the manner of Neuron to Graph (Foote et al. 2023), from the cache alone. The last token comes first,
then the one before it, then the one before that. A longer context is a node of its own where the latent fires on it
significantly more often than on the shorter one; the shorter one then stands for the rest of its occurrences. Where N2G
asks the model which tokens of a context matter, this asks only how often the latent fires.
Tree: scikit-learn's, over the key rules' conditions; what is kept is its paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sae_italian.autointerp.explainers.counts import Counts, Tally
from sae_italian.autointerp.explainers.rules import KeyRule, Path, TreeRule, TrieRule
from sae_italian.autointerp.places import Family, View

# A rule that lists hundreds of keys remembers, it does not explain; the fewer the wider each is.
MAX_KEYS: dict[Family, int] = {
    **dict.fromkeys(("token", "word"), 128),
    **{"suffix2": 8, "suffix3": 12, "suffix4": 12, "suffix5": 12, "prefix3": 8, "prefix4": 8, "shape": 3, "clitic": 8},
    **dict.fromkeys(("previous", "previous-word", "next"), 64),
    "bigram": 32,
}
FAMILIES: tuple[Family, ...] = tuple(MAX_KEYS)
MAX_NODES: dict[Family, int] = {"token": 64, "bigram": 96, "trigram": 48}  # of a trie
LEAST_GAIN = 2.0  # standard deviations by which a longer context must exceed the shorter one
LEAST_SEEN = 3  # training occurrences of a longer context
DEPTH, LEAST_LEAF = 3, 5  # of a tree: conditions on a path, tokens of a leaf
SHARE_SILENT = 8  # silent tokens per active one that a tree is fitted on, at most


def fit_keys(counts: Counts, family: Family) -> KeyRule:
    """Return the rule of one family whose firing matches the latent's best (F1 per token) in the training documents."""
    tally = counts.keys(family)
    telling = counts.telling(tally)
    rates = tally.rates(counts.base)[telling]
    order = telling[np.lexsort((-tally.active[telling], -rates))][: MAX_KEYS[family]]
    f1 = 2 * np.cumsum(tally.active[order]) / (np.cumsum(tally.total[order]) + counts.n)
    return _rule(counts, family, tally.take(np.sort(order[: int(np.argmax(f1)) + 1]) if len(order) else order))


def _rule(counts: Counts, family: Family, tally: Tally) -> KeyRule:
    return rule_on(tally, family, counts.names(family, tally), counts.n, counts.base, counts.mass)


def rule_on(tally: Tally, family: Family, names: list[str], n_active: int, base: float, mass: float) -> KeyRule:
    """Return the rule on counted keys; `mass` is the sum of the activations that their shares are of."""
    return KeyRule(
        keys=tally.keys,
        rates=tally.rates(base),
        weights=tally.mass / np.maximum(tally.total, 1),
        mass=tally.mass / mass,
        active=tally.active,
        total=tally.total.astype(np.int64),
        family=family,
        names=names,
        n_active=n_active,
        base=base,
    )


def fit_trie(counts: Counts) -> TrieRule:
    """Return the trie of one latent's training activations."""
    token, pair, triple = (counts.keys(family) for family in MAX_NODES)
    known = counts.telling(token)
    token = token.take(np.sort(known[np.argsort(-token.active[known], kind="stable")][: MAX_NODES["token"]]))
    assert pair.at is not None and triple.at is not None
    pair, pair_parent = _significant(pair, token, counts.places.source.tokens[pair.at], MAX_NODES["bigram"])
    shorter = counts.places.chains["bigram"][triple.at].astype(np.int64)
    triple, triple_parent = _significant(triple, pair, shorter, MAX_NODES["trigram"])
    _keep_the_rest(token, pair, pair_parent)
    _keep_the_rest(pair, triple, triple_parent)
    levels = zip(MAX_NODES, (token, pair, triple), strict=True)
    return TrieRule(levels=tuple(_rule(counts, family, tally) for family, tally in levels))


def _significant(
    tally: Tally, parent: Tally, parent_of: Int[np.ndarray, " k"], most: int
) -> tuple[Tally, Int[np.ndarray, " m"]]:
    """Return the contexts on which the latent fires more often than on the shorter ones, and the index of each parent."""
    if len(parent.keys) == 0:
        return tally.take(np.empty(0, dtype=np.int64)), np.empty(0, dtype=np.int64)
    index = np.searchsorted(parent.keys, parent_of).clip(max=len(parent.keys) - 1)
    rate = (parent.active / parent.total)[index].clip(0, 1)
    expected = tally.total * rate
    gain = (tally.active - expected) / np.sqrt(expected * (1 - rate) + 0.25)
    keep = np.flatnonzero((parent.keys[index] == parent_of) & (tally.total >= LEAST_SEEN) & (gain >= LEAST_GAIN))
    best = np.sort(keep[np.argsort(-(tally.active - expected)[keep], kind="stable")][:most])
    return tally.take(best), index[best]


def _keep_the_rest(parent: Tally, child: Tally, index: Int[np.ndarray, " m"]) -> None:
    """Leave to the parents the occurrences that no child has."""
    for name in ("active", "mass", "total"):
        values = getattr(parent, name).astype(np.float64)
        np.subtract.at(values, index, getattr(child, name))
        setattr(parent, name, values.clip(min=0))


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
    features = np.stack([rule.holds(view)[inside] for rule in rules], axis=1).astype(np.float32)
    n_active = int(truth.sum())
    silent = np.random.default_rng(seed).permutation(np.flatnonzero(~truth))[: SHARE_SILENT * n_active]
    kept = np.concatenate([np.flatnonzero(truth), silent])
    weight = np.where(truth[kept], 1 / n_active, 1 / len(silent))  # both classes weigh the same
    tree = DecisionTreeClassifier(max_depth=DEPTH, min_samples_leaf=LEAST_LEAF, random_state=seed)
    tree.fit(features[kept], truth[kept], sample_weight=weight, check_input=False)
    leaf = tree.tree_.apply(features)
    paths = []
    for node, held, failed in _leaves(tree.tree_):
        here = leaf == node
        active, total, mass = int(truth[here].sum()), int(here.sum()), float(strength[here].sum())
        if active and held:  # what only fails conditions is no description
            paths.append((held, failed, active / total, mass / total, active, total, mass / float(strength.sum())))
    if not paths:
        return None
    used = sorted({i for held, failed, *_ in paths for i in held + failed})
    new = {old: number for number, old in enumerate(used)}
    return TreeRule(
        conditions=tuple(rules[i] for i in used),
        paths=tuple(Path(tuple(new[i] for i in h), tuple(new[i] for i in f), *rest) for h, f, *rest in paths),
        n_active=n_active,
        base=base,
    )


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
