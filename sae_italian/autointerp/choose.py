"""The explainer without an LLM: fit every kind of rule, tune each on the validation examples, keep the best.

Keys: those on which the latent fires more often than elsewhere, in order of the share of their occurrences on which it
fires, as long as F1 over the training tokens grows.
Trie: contexts in the manner of Neuron to Graph (Foote et al. 2023), from the cache alone. The last token comes first,
then the one before it, then the one before that. A longer context is a node of its own where the latent fires on it
significantly more often than on the shorter one; the shorter one then stands for the rest of its occurrences. Where N2G
asks the model which tokens of a context matter, this asks only how often the latent fires.
Tree: scikit-learn's, over the key rules' conditions; what is kept is its paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_italian.autointerp.draws import Activity, Draw, Negatives
from sae_italian.autointerp.places import Family, Places, View
from sae_italian.autointerp.rules import Counts, KeyRule, LatentRule, Path, Tally, TreeRule, TrieRule
from sae_italian.autointerp.store import Explanation
from sae_italian.autointerp.wording import MOST_LETTERS, displayed, explanation_of, fits, room_for, title_of

EXPLAINER, LOOKUP = "rules", "token-lookup"
CHOSEN_ON: tuple[Negatives, ...] = ("random", "same-token")
WORTH = 0.01  # balanced accuracy on the validation examples that each doubling of a rule's keys must bring
WORTH_OF_CONTEXT = 0.02  # ... and that a rule on more than the token itself must bring
SIMPLE = ("token", "word", "suffix2", "suffix3", "suffix4", "suffix5", "prefix3", "prefix4", "shape", "clitic")
WORTH_OF_MASS = 2.0  # balanced accuracy that all of a latent's activation is worth when keys are ordered
MOST_TOLD = 12  # keys of a rule that its text names, if there is room
GOOD_ENOUGH = 0.97  # validation score from which no trie or tree is tried

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


class RuleExplainer:
    """Explains latents of one cache with rules, and with the token lookup that every explanation is measured against."""

    def __init__(self, places: Places, n_examples: int = 50):
        self.places, self.source, self.n_examples = places, places.source, n_examples

    def explain(self, activity: Activity) -> list[Explanation]:
        """Return the best rule and the token lookup as explanations."""
        best, lookup, counts, val = self.rules(activity)
        found = explanation_of(activity.latent, EXPLAINER, best, title=title_of(counts, val, best))
        return [found, explanation_of(activity.latent, LOOKUP, lookup)]

    def rules(self, activity: Activity) -> tuple[LatentRule, LatentRule, Counts, Validation]:
        """Return the best rule and the token lookup, and what they were fitted to and chosen by.

        Each has the threshold, and tells the keys, that do best on the validation examples.
        """
        drawn, counts = self.source.draw(activity, "val", self.n_examples, CHOSEN_ON), Counts(self.places, activity)
        val = Validation(self.places, self._grid(drawn), len(drawn.positive))
        fitted = {family: fit_keys(counts, family) for family in FAMILIES}
        lookup = val.told(val.with_threshold(fitted["token"]).rule)
        found = [lookup] * bool(lookup.rule.told)
        others = [val.with_threshold(rule) for name, rule in fitted.items() if name != "token" and len(rule.keys)]
        for whole in sorted(others, key=lambda each: -each.reach):
            # whatever keys it tells, it finds no more positives than as a whole
            if whole.reach >= GOOD_ENOUGH or whole.reach - cost(whole.rule, 1) >= _most(found).worth:
                found.append(val.told(whole.rule))
        if max((each.accuracy for each in found), default=0.0) < GOOD_ENOUGH:
            found.append(val.told(val.with_threshold(fit_trie(counts)).rule))
            train = self._grid(self.source.draw(activity, "train", self.n_examples, CHOSEN_ON))
            values, inside = self.source.values(activity, train), train >= 0
            view = View(self.places, train[inside])
            tree = fit_tree(list(fitted.values()), view, values[inside], counts.base, seed=self.source.seed)
            if tree is not None and (whole := val.with_threshold(tree)).worth > _most(found).worth:
                found += val.told_of_tree(whole.rule)
        best = _most(found or [lookup]).rule
        if isinstance(best, KeyRule) and best.family in ("token", "word"):  # say what is often beside them
            beside = {"after": counts.frequent("previous-word"), "before": counts.frequent("next")}
            best = replace(best, notes={where: name for where, name in beside.items() if name})
        return best, lookup.rule, counts, val

    def _grid(self, draw: Draw) -> Int[np.ndarray, "n width"]:
        """Return the positions of a draw's positives, and then of its negatives of each source."""
        return self.source.grid(np.concatenate([draw.positive, *(draw.pairs(name)[1] for name in CHOSEN_ON)]))


class Tuned(NamedTuple):
    """A rule with its threshold and the keys that it tells, and how good it is on the validation examples."""

    rule: Any
    accuracy: float
    worth: float  # the accuracy less what the keys cost a reader; of a whole rule the least they can cost
    reach: float = 1.0  # the accuracy that it would have if it never said yes wrongly


def _most(found: Sequence[Tuned]) -> Tuned:
    return max(found, key=lambda each: each.worth, default=Tuned(None, 0.0, 0.0))


class Validation:
    """One latent's validation examples, positives first: which threshold, and which keys of a rule, do best on them.

    Keys are told in the order of what each adds to those before it: balanced accuracy here, and its share of the training
    documents' activation, as fifty examples alone know little. What adds nothing is not told, nor what has no room.
    """

    def __init__(self, places: Places, grid: Int[np.ndarray, "n width"], n_positive: int):
        inside = grid >= 0
        self.view, self.n_positive = View(places, grid[inside]), n_positive
        self.row, length = np.nonzero(inside)[0], inside.sum(axis=1)
        self.first = np.cumsum(length) - length
        self.n_negative = len(grid) - n_positive
        # what an example that is said yes to adds to the balanced accuracy, in whole numbers of 1 / scale: ties are ties
        self.scale = 2 * n_positive * self.n_negative
        self.gain = np.repeat([float(self.n_negative), -float(n_positive)], [n_positive, self.n_negative])

    def with_threshold(self, rule: LatentRule) -> Tuned:
        """Return a whole rule with its best threshold."""
        strength = np.maximum.reduceat(rule.at(self.view, "rate"), self.first)
        positive, negative = strength[: self.n_positive], strength[self.n_positive :]
        threshold, accuracy = best_threshold(positive, negative)
        reach = (1 + float(((positive > 0) & (positive >= threshold)).sum()) / max(self.n_positive, 1)) / 2
        rule = replace(rule, threshold=threshold)  # pyright: ignore[reportArgumentType]
        return Tuned(rule, accuracy, accuracy - cost(rule, 1), reach)

    def _tuned(self, rule: LatentRule, n_keys: int, said: Any) -> Tuned:
        """Return a rule that says yes to these examples and costs a reader so many keys."""
        accuracy = 0.5 + float(self.gain @ said) / max(self.scale, 1)
        return Tuned(rule, accuracy, accuracy - cost(rule, n_keys))

    def judged(self, rule: LatentRule, n_keys: int) -> Tuned:
        """Return a rule as it is, which costs a reader so many keys."""
        return self._tuned(rule, n_keys, np.maximum.reduceat(rule.at(self.view, "rate"), self.first) > 0)

    def told(self, rule: KeyRule | TrieRule) -> Tuned:
        """Return a rule with the keys that it tells."""
        names = [name for table in rule.tables for name in table.names]
        mass = np.concatenate([table.mass for table in rule.tables])
        there = np.flatnonzero(np.concatenate([rule.firing(table) for table in rule.tables]))
        there = np.array([i for i in there.tolist() if len(names[i]) <= MOST_LETTERS // 2], dtype=np.int64)
        there = there[np.argsort(-mass[there], kind="stable")]
        hits = np.concatenate([self.hits(table) for table in rule.tables], axis=1)[:, there]
        order = in_order_of_gain(hits, self.gain, WORTH_OF_MASS * self.scale * mass[there])
        told = there[order].tolist()
        told = told[: room_for(rule, told)]
        return self._tuned(replace(rule, told=tuple(told)), len(told), hits[:, order[: len(told)]].any(axis=1))

    def hits(self, table: KeyRule) -> Bool[np.ndarray, "n k"]:
        """Return which keys of a table stand anywhere in each example."""
        found = np.zeros((len(self.first), len(table.keys) + 1), dtype=bool)
        number = self.view.look_up(table.family, table.keys, np.arange(1.0, len(table.keys) + 1))
        found[self.row, number.astype(np.int64)] = True
        return found[:, 1:]

    def told_of_tree(self, rule: TreeRule) -> list[Tuned]:
        """Return a tree with its heaviest paths and the heaviest keys of their conditions, as many of each as do best."""
        ranked, n = [], 0
        for condition in rule.conditions:
            ranked.append((n + np.argsort(-condition.mass, kind="stable")).tolist())
            n += len(condition.keys)
        found: dict[tuple[int, ...], Tuned] = {}
        for n_paths, n_keys in product(range(1, TreeRule.PATHS + 1), repeat=2):
            used = sorted({i for path in rule.heaviest()[:n_paths] for i in path.holds + path.fails})
            told = tuple(key for i in used for key in ranked[i][:n_keys])
            if told and told not in found and fits(text := replace(rule, told=told)):
                found[told] = self.judged(displayed(text), len(told))._replace(rule=text)
        return [_most(list(found.values()))] if found else []


def in_order_of_gain(
    hits: Bool[np.ndarray, "n k"], gain: Float[np.ndarray, " n"], own: Float[np.ndarray, " k"]
) -> list[int]:
    """Return up to MOST_TOLD columns, each with the largest own worth and gain over the rows that none before it hits."""
    left, found, columns, worth = gain.copy(), [], hits.astype(np.float64), own.copy()
    while len(found) < min(MOST_TOLD, hits.shape[1]):
        adds = left @ columns + worth
        best = int(adds.argmax())
        if adds[best] < 0 and found:
            break
        found.append(best)
        left[hits[:, best]], worth[best] = 0.0, -np.inf
    return found


def cost(rule: LatentRule, n_keys: int) -> float:
    """Return the balanced accuracy that a rule of this kind with so many keys must bring before it is preferred."""
    context = WORTH_OF_CONTEXT if isinstance(rule, KeyRule) else 1.5 * WORTH_OF_CONTEXT
    return (0.0 if rule.family in SIMPLE else context) + WORTH * float(np.log2(1 + n_keys)) / 2


def best_threshold(
    strength_positive: Float[np.ndarray, " n"], strength_negative: Float[np.ndarray, " m"]
) -> tuple[float, float]:
    """Return the threshold of the strengths with the best balanced accuracy, and that accuracy (validation only)."""
    options = np.unique(np.concatenate([strength_positive, strength_negative]))
    options = options[options > 0]
    if len(options) == 0 or len(strength_negative) == 0:
        return 0.0, 0.5
    tpr = 1 - np.searchsorted(np.sort(strength_positive), options, side="left") / len(strength_positive)
    fpr = 1 - np.searchsorted(np.sort(strength_negative), options, side="left") / len(strength_negative)
    accuracy = (tpr + 1 - fpr) / 2
    best = int(np.argmax(accuracy))
    # halfway down to the next lower strength, so that unseen segments near the edge are not lost
    return float((options[best] + (options[best - 1] if best else 0.0)) / 2), float(accuracy[best])


# --- fitting to the training documents ---------------------------------------------------------------------------------


def fit_keys(counts: Counts, family: Family) -> KeyRule:
    """Return the rule of one family whose firing matches the latent's best (F1 per token) in the training documents."""
    tally = counts.keys(family)
    telling = counts.telling(tally)
    rates = tally.rates(counts.base)[telling]
    order = telling[np.lexsort((-tally.active[telling], -rates))][: MAX_KEYS[family]]
    f1 = 2 * np.cumsum(tally.active[order]) / (np.cumsum(tally.total[order]) + counts.n)
    return counts.rule(family, tally.take(np.sort(order[: int(np.argmax(f1)) + 1]) if len(order) else order))


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
    return TrieRule(levels=tuple(counts.rule(family, tally) for family, tally in levels))


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
    parent.active = np.minimum(parent.active, parent.total)  # what a sample says of the children may be too little


def fit_tree(
    rules: Sequence[KeyRule], view: View, values: Float[np.ndarray, " tokens"], base: float, seed: int
) -> TreeRule | None:
    """Return the tree over the rules' key sets, fitted on training tokens; None where nothing splits them."""
    from sklearn import config_context
    from sklearn.tree import DecisionTreeRegressor

    rules, truth = [rule for rule in rules if len(rule.keys)], values > 0
    if not rules or truth.all() or not truth.any():
        return None
    features = np.stack([rule.holds(view) for rule in rules], axis=1).astype(np.float32)
    n_active = int(truth.sum())
    silent = np.random.default_rng(seed).permutation(np.flatnonzero(~truth))[: SHARE_SILENT * n_active]
    kept = np.concatenate([np.flatnonzero(truth), silent])
    weight = np.where(truth[kept], 1 / n_active, 1 / len(silent))  # both classes weigh the same
    # of yes and no the variance is half of Gini's impurity: the same tree, without the classifier's checks of its classes
    tree = DecisionTreeRegressor(max_depth=DEPTH, min_samples_leaf=LEAST_LEAF, random_state=seed % 2**32)
    wanted = truth[kept, None].astype(np.float64)
    with config_context(skip_parameter_validation=True):
        tree.fit(features[kept], wanted, sample_weight=weight, check_input=False)
    leaf, paths = tree.tree_.apply(features), []
    for node, held, failed in sorted(_leaves(tree.tree_)):
        here = leaf == node
        active, total, mass = int(truth[here].sum()), int(here.sum()), float(values[here].sum())
        if active and held:  # what only fails conditions is no description
            paths.append((held, failed, active / total, mass / total, active, total, mass / float(values.sum())))
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


def _leaves(
    tree: Any, node: int = 0, held: tuple[int, ...] = (), failed: tuple[int, ...] = ()
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Yield each leaf with the features that hold and that fail on the way to it."""
    left, right, feature = (int(each[node]) for each in (tree.children_left, tree.children_right, tree.feature))
    if left < 0:
        yield node, held, failed
        return
    yield from _leaves(tree, left, held, (*failed, feature))
    yield from _leaves(tree, right, (*held, feature), failed)
