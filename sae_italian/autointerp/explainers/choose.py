"""The explainer without an LLM: fit every kind of rule, tune each on the validation examples, keep the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_italian.autointerp.examples import Activity, Draw
from sae_italian.autointerp.explainers.keys import FAMILIES, Counts, KeyRule, fit_keys, frequent_context
from sae_italian.autointerp.explainers.text import Rule, describe, shown_keys
from sae_italian.autointerp.explainers.tree import TreeRule, fit_tree
from sae_italian.autointerp.explainers.trie import TrieRule, fit_trie
from sae_italian.autointerp.negatives import NegativeSource
from sae_italian.autointerp.places import Places, View
from sae_italian.autointerp.protocols import LatentExamples, Negatives
from sae_italian.autointerp.store import Explanation

EXPLAINER, LOOKUP = "rules", "token-lookup"
CHOSEN_ON: tuple[Negatives, ...] = ("random", "same-token")
WORTH = 0.01  # balanced accuracy on the validation examples that each doubling of a rule's keys must bring
WORTH_OF_CONTEXT = 0.02  # ... and that a rule on more than the token itself must bring
SIMPLE = ("token", "word", "suffix2", "suffix3", "suffix4", "suffix5", "prefix3", "prefix4", "shape", "clitic")
GOOD_ENOUGH = 0.97  # validation score from which no trie or tree is tried


class RuleExplainer:
    """Explains latents of one cache with rules, and with the token lookup that every explanation is measured against."""

    name = EXPLAINER
    concurrency = 1

    def __init__(self, places: Places, negatives: NegativeSource, n_examples: int = 50):
        self.places, self.source, self.negatives = places, places.source, negatives
        self.n_examples = n_examples

    def explain(self, examples: LatentExamples) -> list[Explanation]:
        """Return the best rule and the token lookup for the latent of these examples, from the whole cache."""
        return self.explain_latent(examples.latent, self.source.activity(examples.latent))

    def explain_latent(self, latent: int, activity: Activity) -> list[Explanation]:
        best, lookup = self.rules(latent, activity)
        return [explanation(latent, EXPLAINER, best), explanation(latent, LOOKUP, lookup)]

    def rules(self, latent: int, activity: Activity) -> tuple[Rule, Rule]:
        """Return the best rule and the token lookup, each with the threshold that does best on the validation draw."""
        counts = Counts(self.places, activity)
        tuned = _Tuning(self.places, self.negatives.draw(latent, activity, "val", self.n_examples, CHOSEN_ON))
        fitted = {family: fit_keys(counts, family) for family in FAMILIES}
        candidates: list[tuple[float, Rule]] = [tuned(rule) for rule in fitted.values() if len(rule.keys)]
        lookup = tuned(fitted["token"])
        if max((score for score, _ in candidates), default=0.0) < GOOD_ENOUGH:
            candidates.append(tuned(fit_trie(counts)))
            train = self.negatives.draw(latent, activity, "train", self.n_examples, CHOSEN_ON)
            view = View(self.places, self.source.grid(all_segments(train, CHOSEN_ON)))
            values = self.source.values(activity, view.grid)
            tree = fit_tree(list(fitted.values()), view, values, counts.base, seed=self.source.seed)
            if tree is not None:
                candidates.append(tuned(tree))
        best = max(candidates, key=lambda scored: scored[0] - cost(scored[1]), default=lookup)[1]
        return self._with_context(best, counts), lookup[1]

    def _with_context(self, rule: Rule, counts: Counts) -> Rule:
        """Add to a rule on single tokens what often stands beside them."""
        if not isinstance(rule, KeyRule) or rule.family not in ("token", "word"):
            return rule
        found = {"after": frequent_context(counts, "previous-word"), "before": frequent_context(counts, "next")}
        return replace(rule, notes={where: name for where, name in found.items() if name})


class _Tuning:
    """Chooses a rule's threshold on one validation draw."""

    def __init__(self, places: Places, val: Draw):
        pairs = [val.pairs(name) for name in CHOSEN_ON if name in val.negative]
        self.view = View(places, places.source.grid(np.concatenate([val.positive, *(pair[1] for pair in pairs)])))
        self.n = len(val.positive)

    def __call__(self, rule: Rule) -> tuple[float, Rule]:
        """Return the balanced accuracy that the best threshold gives, and the rule with it."""
        strength = rule.predict(self.view).max(axis=1, initial=0.0)
        threshold, accuracy = best_threshold(strength[: self.n], strength[self.n :])
        return accuracy, replace(rule, threshold=threshold)


def cost(rule: Rule) -> float:
    """Return the balanced accuracy that a rule of this size and kind must bring before it is preferred."""
    context = (
        0.0 if rule.family in SIMPLE else WORTH_OF_CONTEXT if isinstance(rule, KeyRule) else 1.5 * WORTH_OF_CONTEXT
    )
    return context + WORTH * float(np.log2(1 + rule.n_conditions)) / 2


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
    lower = options[best - 1] if best else 0.0
    return float((options[best] + lower) / 2), float(accuracy[best])


def all_segments(draw: Draw, sources: Sequence[Negatives]) -> np.ndarray:
    """Return a draw's positives and its negatives of some sources, one after the other."""
    return np.concatenate([draw.positive, *(draw.pairs(name)[1] for name in sources if name in draw.negative)])


def explanation(latent: int, explainer: str, rule: Rule) -> Explanation:
    numbers = {name: float(getattr(rule, name)) for name in ("precision", "recall", "lift")}
    stored = {**rule.as_dict(), **numbers, "shown": shown_keys(rule)}
    return Explanation(latent, explainer, "ok", describe(rule, "it"), describe(rule, "en"), stored)


def rule_of(stored: dict[str, Any]) -> Rule:
    """Return the rule of a stored explanation; it holds for the cache it was made from."""
    kinds = {"trie": TrieRule, "tree": TreeRule}
    return kinds.get(stored["family"], KeyRule).from_dict(stored)
