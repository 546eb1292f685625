"""The explainer without an LLM: fit every kind of rule, tune each on the validation examples, keep the best."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from sae_italian.autointerp.examples import Activity, Draw
from sae_italian.autointerp.explainers.counts import Counts
from sae_italian.autointerp.explainers.fit import FAMILIES, fit_keys, fit_tree, fit_trie
from sae_italian.autointerp.explainers.rules import KeyRule, LatentRule
from sae_italian.autointerp.explainers.text import explanation_of
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
        """Return the best rule and the token lookup as explanations."""
        best, lookup = self.rules(latent, activity)
        return [explanation_of(latent, EXPLAINER, best), explanation_of(latent, LOOKUP, lookup)]

    def rules(self, latent: int, activity: Activity) -> tuple[LatentRule, LatentRule]:
        """Return the best rule and the token lookup, each with the threshold that does best on the validation draw."""
        counts = Counts(self.places, activity)
        val = self.negatives.draw(latent, activity, "val", self.n_examples, CHOSEN_ON)
        view, n_positive = self._view(val), len(val.positive)

        def tuned(rule: LatentRule) -> tuple[float, LatentRule]:
            strength = rule.at(view, "rate").max(axis=1, initial=0.0)
            threshold, accuracy = best_threshold(strength[:n_positive], strength[n_positive:])
            return accuracy, replace(rule, threshold=threshold)  # pyright: ignore[reportArgumentType]

        fitted = {family: fit_keys(counts, family) for family in FAMILIES}
        candidates = [tuned(rule) for rule in fitted.values() if len(rule.keys)]
        lookup = tuned(fitted["token"])[1]
        if max((score for score, _ in candidates), default=0.0) < GOOD_ENOUGH:
            candidates.append(tuned(fit_trie(counts)))
            train = self._view(self.negatives.draw(latent, activity, "train", self.n_examples, CHOSEN_ON))
            values = self.source.values(activity, train.grid)
            tree = fit_tree(list(fitted.values()), train, values, counts.base, seed=self.source.seed)
            if tree is not None:
                candidates.append(tuned(tree))
        best = max(candidates, key=lambda scored: scored[0] - cost(scored[1]), default=(0.0, lookup))[1]
        if isinstance(best, KeyRule) and best.family in ("token", "word"):  # say what often stands beside these
            beside = {"after": counts.frequent("previous-word"), "before": counts.frequent("next")}
            best = replace(best, notes={where: name for where, name in beside.items() if name})
        return best, lookup

    def _view(self, draw: Draw) -> View:
        """Return the keys on a draw's positives, and then on its negatives of each source."""
        negatives = [draw.pairs(name)[1] for name in CHOSEN_ON if name in draw.negative]
        return View(self.places, self.source.grid(np.concatenate([draw.positive, *negatives])))


def cost(rule: LatentRule) -> float:
    """Return the balanced accuracy that a rule of this size and kind must bring before it is preferred."""
    context = WORTH_OF_CONTEXT if isinstance(rule, KeyRule) else 1.5 * WORTH_OF_CONTEXT
    return (0.0 if rule.family in SIMPLE else context) + WORTH * float(np.log2(1 + rule.n_conditions)) / 2


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
