"""One record of a latent, whatever the format: the facts by which `fields.yaml` fills its rows.

A passage is a stretch of one document as token strings that join to the true text, with an activation each. `anchor` is
the place of the token it was chosen for.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import fingerprint
from sae_italian.browser.exports.directions import DecoderSide, counted_tokens, histogram, rounded
from sae_italian.browser.exports.fields import tables
from sae_italian.cache import FeatureCache, LatentActivations, Manifest
from sae_italian.models import parse_hook_name
from sae_italian.models.catalogue import config_facts

Facts = dict[str, Any]

CREATOR = "clkht01d40000jv08hvalcvly"  # the bot, which every database of Neuronpedia's has
_SITES = {"R": "res", "A": "att", "M": "mlp", "TC": "transcoder", None: "pre"}
_NAMESPACE = uuid.UUID("5d0f6d0e-6a53-5c1b-9a1e-0b9f3f6f5a11")
BEFORE, AFTER = 31, 32  # tokens shown on either side of the strongest one
N_TOP, N_INTERVALS, N_PER_INTERVAL = 20, 5, 5  # as SAEDashboard draws for Neuronpedia
_UNSTORABLE = re.compile("[\ud800-\udfff]")


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
    names = {"model": model, "layer": hook.layer, "source_set": source_set, "suffix": suffix, "creator": creator}
    names |= {"creator_name": creator_name, "release": f"{model}-{source_set}"}
    return names | {"cache": fingerprint(manifest.identity())}


def facts_of(manifest: Manifest, names: Facts) -> Facts:
    """Return what the rows of an export say of its names, its SAE and its corpus."""
    suffix = f"__{names['suffix']}" if names["suffix"] else ""
    own = ("sae", "corpus", "hook_name", "n_windows", "context_size")
    return {
        **names,
        **{name: getattr(manifest, name) for name in own},
        "source": f"{names['layer']}-{names['source_set']}{suffix}",
        "layer_text": str(names["layer"]),
        "base_model": manifest.model,
        "what": f"SAE of {manifest.d_sae} latents at {manifest.hook_name} of {manifest.model}, on {manifest.corpus}",
    }


def model_facts(manifest: Manifest, names: Facts, config: Any, sae: Any) -> Facts:
    """Return what the bulk rows say of the model's configuration and of the SAE's, None without an SAE."""
    owner = manifest.model.split("/")[0] if manifest.model.count("/") == 1 else ""
    return {
        **config_facts(config),
        "owner": owner or names["creator_name"],
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


class Group(NamedTuple):
    """Passages whose anchor's activation lies in (lo, hi]; `share` is that of all tokens whose activation does.

    The strongest passages have no interval: there lo and share are -1, and hi is the latent's maximum.
    """

    lo: float
    hi: float
    share: float
    passages: list[Facts]


class Latents:
    """Reads one latent of a cache after the other; memory does not grow with their number. The same seed draws the same."""

    def __init__(self, cache: FeatureCache, strings: list[str], sae: Any = None, model: Any = None, *, seed: int = 0):
        self.cache, self.strings, self.stats, self.seed = cache, strings, cache.statistics, seed
        self.directions = DecoderSide(cache, sae, model)
        self.n_tokens = counted_tokens(cache)

    def record(self, latent: int) -> Facts:
        """Return names, tables, logits and histograms of a latent."""
        directions = self.directions
        found: Facts = {
            "latent": latent,
            "index": str(latent),
            "largest": rounded(self.stats["max"][latent]),
            "frac_nonzero": rounded(self.stats["density"][latent]),
            "topkCosSimIndices": self.stats["decoder_ids"][latent].tolist(),
            "topkCosSimValues": _short(self.stats["decoder_cosines"][latent]),
            **self.logits(latent),
        }
        for name, other, table in (
            ("neuron_alignment", "values", directions.alignment(latent)),
            ("correlated_neurons", "pearson", directions.correlated_neurons(latent)),
            ("correlated_features", "pearson", directions.correlated_latents(latent)),
        ):
            found[f"{name}_indices"] = table.indices
            found[f"{name}_l1"], found[f"{name}_{other}"] = _short(table.l1), _short(table.other)
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

    def groups(self, latent: int) -> Iterator[Group]:
        """Yield the strongest passages, then those of five equally wide intervals of (0, maximum], the strongest first.

        Zeros are in no interval, and no text is shown twice.
        """
        activations = self.cache.latent(latent)
        position, value = activations
        seen: set[str] = set()
        top = self._distinct(activations, activations.windows("top", N_TOP).anchor, N_TOP, seen)
        yield Group(-1.0, float(self.stats["max"][latent]), -1.0, top)
        rng = np.random.default_rng([self.seed, latent])
        edges = np.linspace(0.0, float(value.max(initial=0.0)), N_INTERVALS + 1)
        for lo, hi in zip(edges[-2::-1], edges[:0:-1], strict=True):
            inside = position[(value > lo) & (value <= hi)]
            drawn = rng.permutation(inside)[: 4 * N_PER_INTERVAL]
            passages = self._distinct(activations, drawn, N_PER_INTERVAL, seen)
            yield Group(float(lo), float(hi), len(inside) / self.n_tokens, passages)

    def passages(self, latent: int) -> Iterator[Facts]:
        """Yield the facts of every passage with the bounds and the share of its group."""
        for group in self.groups(latent):
            bounds = {name: rounded(getattr(group, name)) for name in ("lo", "hi", "share")}
            yield from (passage | bounds for passage in group.passages)

    def strongest(self, latent: int) -> str:
        """Return the text of the strongest passage; empty for a latent that never fired."""
        found = self.cache.latent(latent)
        passages = self._distinct(found, found.windows("top", 1).anchor, 1, set())
        return "".join(passages[0]["tokens"]) if passages else ""

    def _distinct(
        self, latent: LatentActivations, anchors: Int[np.ndarray, " m"], n: int, seen: set[str]
    ) -> list[Facts]:
        """Return the passages around the first n anchors whose text is new, and add these texts to `seen`."""
        kept: list[Facts] = []
        around = latent.around(anchors, BEFORE, AFTER)
        for index in range(len(anchors)):
            if len(kept) == n:
                break
            shown, first = around.show(index), int(around.start[index])
            tokens, strengths, owner = pieces(shown.text, shown.spans, shown.values)
            text = "".join(tokens)
            if tokens and text not in seen:
                seen.add(text)
                document, values = self.cache.document(shown.doc), _short(strengths)
                strongest = int(np.argmax(values))
                kept.append(
                    {"tokens": tokens, "values": values, "anchor": owner[int(anchors[index]) - first]}
                    | {"doc_id": storable(document.doc_id), "doc_source": storable(document.source)}
                    | {"maxValue": values[strongest], "maxValueTokenIndex": strongest, "minValue": min(values)}
                )
        return kept


def pieces(
    text: str, spans: Int[np.ndarray, "tokens 2"], values: Float[np.ndarray, " tokens"]
) -> tuple[list[str], list[float], list[int]]:
    """Return the text in pieces, their activations, and the piece of each token.

    The pieces joined are the text. Tokens that share a letter (one of several bytes) are one piece, with the largest of
    their activations; a gap between tokens belongs to the later one. No piece is empty.
    """
    ends: list[int] = []
    strengths: list[float] = []
    owner = []
    for (start, end), value in zip(spans.tolist(), values.tolist(), strict=True):
        if not ends or (0 < ends[-1] <= start and end > ends[-1]):
            ends.append(end)
            strengths.append(value)
        else:
            ends[-1], strengths[-1] = max(ends[-1], end), max(strengths[-1], value)
        owner.append(len(ends) - 1)
    if ends:
        ends[-1] = len(text)
    cut = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return [storable(piece) for piece in cut], strengths, owner


def storable(text: str) -> str:
    """Return a text that a database takes: a space for NUL (as Neuronpedia's importer), U+FFFD for half a surrogate."""
    return _UNSTORABLE.sub("\ufffd", text.replace("\x00", " "))


def _short(values: Any) -> list[float]:
    return [rounded(value) for value in values]
