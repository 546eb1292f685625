"""One record of a latent, whatever the format: the facts by which `fields.yaml` fills its rows."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import fingerprint
from sae_italian.browser.exports.directions import Directions, histogram
from sae_italian.browser.exports.fields import tables
from sae_italian.browser.exports.passages import Interval, Passage, PassageDrawer, rounded, storable
from sae_italian.cache import FeatureCache, Manifest
from sae_italian.models import parse_hook_name
from sae_italian.models.catalogue import config_facts

Facts = dict[str, Any]

CREATOR = "clkht01d40000jv08hvalcvly"  # the bot, which every database of Neuronpedia's has
_SITES = {"R": "res", "A": "att", "M": "mlp", "TC": "transcoder", None: "pre"}
_NAMESPACE = uuid.UUID("5d0f6d0e-6a53-5c1b-9a1e-0b9f3f6f5a11")


# --- names and facts of a whole export -------------------------------------------------------------------------------


def names_of(
    manifest: Manifest,
    *,
    model: str | None = None,
    source_set: str | None = None,
    suffix: str | None = None,
    creator: str = CREATOR,
    creator_name: str = "sae_italian",
) -> Facts:
    """Return what model and SAE are called on Neuronpedia, made from the cache's names where they are not given.

    `suffix` tells apart the SAEs of one layer in one set. Raises: UsageError for a name that Neuronpedia refuses.
    """
    hook = parse_hook_name(manifest.hook_name)
    slug = re.sub("[^a-z0-9.]+", "-", manifest.model.rstrip("/").split("/")[-1].lower()).strip("-.")
    model = model or slug[:32].rstrip("-.")
    source_set = source_set or f"{_SITES[hook.site]}-it-{manifest.d_sae}"
    for option, name, pattern in (
        ("model_id", model, tables()["model"]["pattern"]["id"]),
        ("set", source_set, tables()["sourceset"]["pattern"]["name"]),
        ("suffix", suffix or "-", "[a-z0-9.-]+"),
    ):
        if not re.fullmatch(pattern, name):
            raise UsageError(f"{option}= is {name!r}, which Neuronpedia refuses; it has to match {pattern}.")
    return {
        "model": model,
        "layer": hook.layer,
        "source_set": source_set,
        "suffix": suffix,
        "creator": creator,
        "creator_name": creator_name,
        "release": f"{model}-{source_set}",
        "cache": fingerprint(manifest.identity()),
    }


def facts_of(manifest: Manifest, names: Facts) -> Facts:
    """Return what the rows of an export say of its names, its SAE and its corpus."""
    suffix = f"__{names['suffix']}" if names["suffix"] else ""
    return {
        **names,
        "source": f"{names['layer']}-{names['source_set']}{suffix}",
        "layer_text": str(names["layer"]),
        "base_model": manifest.model,
        "sae": manifest.sae,
        "corpus": manifest.corpus,
        "hook_name": manifest.hook_name,
        "n_windows": manifest.n_windows,
        "context_size": manifest.context_size,
        "what": f"SAE of {manifest.d_sae} latents at {manifest.hook_name} of {manifest.model}, on {manifest.corpus}",
    }


def model_facts(manifest: Manifest, names: Facts, config: Any, sae: Any) -> Facts:
    """Return what the bulk rows say of the model's configuration and of the SAE's, None without an SAE."""
    owner, slash, _ = manifest.model.partition("/")
    one_slash = slash and manifest.model.count("/") == 1
    return {
        **config_facts(config),
        "owner": owner if one_slash else names["creator_name"],
        "display_name": manifest.model.rstrip("/").split("/")[-1],
        "tlens_id": None if Path(manifest.model).is_absolute() else manifest.model,
        "sae_config": None if sae is None else json.loads(json.dumps(sae.cfg.to_dict(), default=str)),
    }


def row_id(facts: Facts, *parts: object) -> str:
    """Return an id that is the same at every export of this cache and unlike any other's."""
    place = (facts["cache"], facts["model"], facts["source"], *parts)
    return str(uuid.uuid5(_NAMESPACE, "/".join(map(str, place))))


def cantor(layer: int, latent: int) -> int:
    """Return the Cantor pair of two numbers, by which circuit-tracer names a latent."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


# --- the facts of a latent and of its passages -----------------------------------------------------------------------


class Latents:
    """Reads one latent of a cache after the other; memory does not grow with their number."""

    def __init__(self, cache: FeatureCache, strings: list[str], sae: Any = None, model: Any = None, *, seed: int = 0):
        self.cache, self.strings, self.stats = cache, strings, cache.statistics
        self.drawer = PassageDrawer(cache, seed=seed)
        self.directions = Directions(cache, sae, model)

    def record(self, latent: int) -> Facts:
        """Return names, tables, logits and histograms of a latent."""
        found: Facts = {
            "latent": latent,
            "index": str(latent),
            "largest": rounded(self.stats["max"][latent]),
            "frac_nonzero": rounded(self.stats["density"][latent]),
            "topkCosSimIndices": self.stats["decoder_ids"][latent].tolist(),
            "topkCosSimValues": _short(self.stats["decoder_cosines"][latent]),
            **self.logits(latent),
        }
        directions = self.directions
        for name, second, table in (
            ("neuron_alignment", "values", directions.alignment(latent)),
            ("correlated_neurons", "pearson", directions.correlated_neurons(latent)),
            ("correlated_features", "pearson", directions.correlated_latents(latent)),
        ):
            found[f"{name}_indices"] = table.indices
            found[f"{name}_l1"], found[f"{name}_{second}"] = _short(table.l1), _short(table.other)
        bars = {"freq": histogram(self.cache.latent(latent).value), "logits": directions.logits(latent)}
        for name, (centres, heights) in bars.items():
            found[f"{name}_hist_data_bar_values"], found[f"{name}_hist_data_bar_heights"] = centres, heights
        return found

    def logits(self, latent: int) -> Facts:
        """Return the promoted tokens, largest first, and the suppressed ones, lowest first."""
        found: Facts = {}
        for ours, theirs, sign in (("suppressed", "neg", 1), ("promoted", "pos", -1)):
            values = np.asarray(self.stats[f"{ours}_values"][latent], dtype=np.float64)
            order = np.argsort(sign * values, kind="stable")
            ids = np.asarray(self.stats[f"{ours}_ids"][latent])[order]
            found[f"{theirs}_str"] = [storable(self.strings[token]) for token in ids.tolist()]
            found[f"{theirs}_values"] = _short(values[order])
        return found

    def groups(self, latent: int) -> Iterator[tuple[Interval | None, list[Passage]]]:
        """Yield the strongest passages (no interval), then those of each interval."""
        top = self.drawer.top(latent)
        yield None, top
        for interval in self.drawer.intervals(latent, {passage.text for passage in top}):
            yield interval, interval.passages

    def passages(self, latent: int) -> Iterator[Facts]:
        """Yield the facts of every passage; the strongest have -1 where an interval has its bounds and share."""
        for interval, passages in self.groups(latent):
            lo, share, hi = -1.0, -1.0, rounded(self.stats["max"][latent])
            if interval is not None:
                lo, hi, share = rounded(interval.lo), rounded(interval.hi), rounded(interval.share)
            for passage in passages:
                yield {**passage_facts(passage), "lo": lo, "hi": hi, "share": share}


def passage_facts(passage: Passage) -> Facts:
    """Return what rows say of a passage, its bounds apart."""
    values = passage.values
    return {
        "tokens": passage.tokens,
        "values": values,
        "anchor": passage.anchor,
        "doc_id": passage.doc_id,
        "doc_source": passage.source,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
    }


def _short(values: Any) -> list[float]:
    return [rounded(value) for value in values]
