"""The fields that Neuronpedia's two formats share, latent by latent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from sae_italian.browser.exports.directions import Directions, histogram
from sae_italian.browser.exports.passages import Interval, Passage, PassageDrawer, rounded, storable
from sae_italian.cache import FeatureCache


class Latents:
    """Reads one latent of a cache after the other; memory does not grow with their number."""

    def __init__(self, cache: FeatureCache, strings: list[str], sae: Any = None, model: Any = None, *, seed: int = 0):
        self.cache, self.strings, self.stats = cache, strings, cache.statistics
        self.passages = PassageDrawer(cache, seed=seed)
        self.directions = Directions(cache, sae, model)

    def numbers(self, latent: int) -> dict[str, Any]:
        """Return tables, logits and histograms under the names that both formats use."""
        alignment = self.directions.alignment(latent)
        neurons, latents = self.directions.correlated_neurons(latent), self.directions.correlated_latents(latent)
        active = histogram(self.cache.latent(latent).value)
        logits = self.directions.logits(latent)
        return {
            "neuron_alignment_indices": alignment.indices,
            "neuron_alignment_values": _short(alignment.first),
            "neuron_alignment_l1": _short(alignment.second),
            "correlated_neurons_indices": neurons.indices,
            "correlated_neurons_l1": _short(neurons.first),
            "correlated_neurons_pearson": _short(neurons.second),
            "correlated_features_indices": latents.indices,
            "correlated_features_l1": _short(latents.first),
            "correlated_features_pearson": _short(latents.second),
            **self.logits(latent),
            "frac_nonzero": rounded(self.stats["density"][latent]),
            "freq_hist_data_bar_values": _short(active.centres),
            "freq_hist_data_bar_heights": _short(active.heights),
            "logits_hist_data_bar_heights": _short(logits.heights),
            "logits_hist_data_bar_values": _short(logits.centres),
            "decoder_weights_dist": [],
            "vector": [],
        }

    def logits(self, latent: int) -> dict[str, Any]:
        """Return the promoted tokens, largest first, and the suppressed ones, lowest first."""
        found: dict[str, Any] = {}
        for ours, theirs, sign in (("suppressed", "neg", 1), ("promoted", "pos", -1)):
            values = np.asarray(self.stats[f"{ours}_values"][latent], dtype=np.float64)
            ids = np.asarray(self.stats[f"{ours}_ids"][latent])
            order = np.argsort(sign * values, kind="stable")
            found[f"{theirs}_str"] = [storable(self.strings[token]) for token in ids[order].tolist()]
            found[f"{theirs}_values"] = _short(values[order])
        return found

    def groups(self, latent: int) -> Iterator[tuple[Interval | None, Passage]]:
        """Yield the strongest passages (no interval), then those of each interval."""
        top = self.passages.top(latent)
        yield from ((None, passage) for passage in top)
        for interval in self.passages.intervals(latent, {passage.text for passage in top}):
            yield from ((interval, passage) for passage in interval.passages)


def _short(values: Any) -> list[float]:
    return [rounded(value) for value in values]
