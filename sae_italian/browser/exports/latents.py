"""One record of a latent, whatever the format: the facts by which `fields.yaml` fills its rows.

A passage is a stretch of one document as token strings that join to the true text, with an activation each. `anchor` is
the place of the token it was chosen for.
"""

import json
import re
import uuid
from collections.abc import Iterator
from functools import cache, cached_property
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from jaxtyping import Float, Int
from scipy.sparse import csc_matrix, csr_matrix

from sae_italian.autointerp.examples import RULE
from sae_italian.autointerp.scorers.binary import HEADLINE
from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import fingerprint
from sae_italian.browser.contexts import pieces, storable
from sae_italian.browser.directions import rounded
from sae_italian.browser.source import LatentSource, public_name
from sae_italian.cache import LatentActivations, Manifest
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.models import parse_hook_name
from sae_italian.models.activations import read_activations
from sae_italian.models.catalogue import config_facts

Facts = dict[str, Any]
Passages = Iterator[Facts]

CREATOR = "clkht01d40000jv08hvalcvly"  # the bot, which every database of Neuronpedia's has
_SITES = {"R": "res", "A": "att", "M": "mlp", "TC": "transcoder", None: "pre"}
_NAMESPACE = uuid.UUID("5d0f6d0e-6a53-5c1b-9a1e-0b9f3f6f5a11")
BEFORE, AFTER = 31, 32  # tokens shown on either side of the strongest one
N_TOP, N_INTERVALS, N_PER_INTERVAL = 20, 5, 5  # as SAEDashboard draws for Neuronpedia
N_BARS, N_TABLE = 50, 3  # of a histogram; of each kind of neighbours
SAMPLE_TOKENS = 32_768
SAMPLE_FLOATS = 2**26  # of the model's activations held in memory
FORWARD_WINDOWS = 16
Neighbours = tuple[Any, Any, Any]
"""Those of Neuronpedia: their ids, what it calls L1, and its second number; the nearest first."""
NONE: Neighbours = [], [], []


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


def facts_of(manifest: Manifest, names: Facts, config: Any = None, sae: Any = None) -> Facts:
    """Return what the rows of an export say of its names, its model with that one's configuration, its SAE, its corpus."""
    suffix, ending = (f"{sign}{names['suffix']}" if names["suffix"] else "" for sign in ("__", "_"))
    name, corpus, model = (public_name(name) for name in (manifest.sae, manifest.corpus, manifest.model))
    return {
        **names,
        **(config_facts(config) if config else {}),
        **{name: getattr(manifest, name) for name in ("hook_name", "n_windows", "context_size", "d_sae")},
        **{"sae": name, "corpus": corpus, "base_model": model, "ending": ending},
        "source": f"{names['layer']}-{names['source_set']}{suffix}",
        "layer_text": str(names["layer"]),
        "what": f"SAE of {manifest.d_sae} latents at {manifest.hook_name} of {model}, on {corpus}",
        "owner": manifest.model.split("/")[0] if manifest.model.count("/") == 1 else names["creator_name"],
        "display_name": manifest.model.rstrip("/").split("/")[-1],
        "tlens_id": None if Path(manifest.model).is_absolute() else manifest.model,
        "sae_config": None if sae is None else json.loads(json.dumps(sae.cfg.to_dict(), default=str)),
    }


def row_id(facts: Facts, *parts: object) -> str:
    """Return an id that is the same at every export of this cache and unlike any other's."""
    place = (facts["cache"], facts["model"], facts["source"], *parts)
    return str(uuid.uuid5(_NAMESPACE, "/".join(map(str, place))))


class Latents:
    """Reads one latent of a source after the other; memory does not grow with their number. `facts` hold for all."""

    def __init__(self, source: LatentSource, facts: Facts | None = None):
        self.source, self.cache, self.stats, self.facts = source, source.cache, source.stats, facts or {}

    @cached_property
    def n_tokens(self) -> int:
        """What densities are shares of: the tokens of documents, not the special ones."""
        count, density = self.stats["count"], self.stats["density"]
        most = int(np.argmax(count))
        return round(float(count[most]) / float(density[most])) if count[most] else self.cache.n_positions

    def record(self, latent: int) -> Facts:
        """Return names, tables, logits and histograms of a latent; what needs an SAE or a model is empty without them."""
        found: Facts = {
            **self.facts,
            "latent": latent,
            "index": str(latent),
            "largest": rounded(self.stats["max"][latent]),
            "frac_nonzero": rounded(self.stats["density"][latent]),
            "topkCosSimIndices": self.stats["decoder_ids"][latent].tolist(),
            "topkCosSimValues": rounded(self.stats["decoder_cosines"][latent]),
            **self.logits(latent),
        }
        for name, other, table in (
            ("neuron_alignment", "values", self._dimensions(latent)),
            ("correlated_neurons", "pearson", self._neurons(latent)),
            ("correlated_features", "pearson", self._latents(latent)),
        ):
            columns = f"{name}_indices", f"{name}_l1", f"{name}_{other}"
            found |= zip(columns, map(rounded, table), strict=True)
        logits = self.source.decoder.logits(latent).numpy() if self.source.decoder else np.empty(0)
        for name, values in (("freq", self.cache.latent(latent).value), ("logits", logits)):
            found[f"{name}_hist_data_bar_values"], found[f"{name}_hist_data_bar_heights"] = bars(values)
        return found

    def _dimensions(self, latent: int) -> Neighbours:
        """Return the dimensions with the largest decoder weights: the weight's share of the L1 norm, and the weight."""
        if self.source.decoder is None:
            return NONE
        direction = self.source.decoder.directions[latent]
        value, index = direction.topk(min(N_TABLE, len(direction)))
        return index.numpy(), (value / direction.abs().sum()).numpy(), value.numpy()

    def _latents(self, latent: int) -> Neighbours:
        """Return the latents that go with this one, with cosine and Pearson over the whole cache.

        Candidates are the latents that fire on most of the same tokens, of all latents: not those of one batch.
        """
        position, value = self.cache.latent(latent)
        others, products = self.stats["cofiring_ids"][latent], []
        for other in others.tolist():
            their_position, theirs = self.cache.latent(other)
            _, mine, same = np.intersect1d(position, their_position, assume_unique=True, return_indices=True)
            theirs = theirs.astype(np.float64)
            products.append((value[mine].astype(np.float64) @ theirs[same], theirs.sum(), theirs @ theirs))
        cross, sums, squares = np.array(products).reshape(-1, 3).T
        return _alike(value, cross, sums, squares, self.n_tokens, others)

    def _neurons(self, latent: int) -> Neighbours:
        """Return the dimensions of the model's activation that go with the latent, with cosine and Pearson.

        There are none without the model, nor for a latent that is silent on the sample.
        """
        if self.source.model is None:
            return NONE
        x, sums, squares, acts = self._sample
        column = acts[:, latent]
        if column.nnz == 0:
            return NONE
        cross = column.data.astype(np.float64) @ x[column.indices]
        return _alike(column.data, cross, sums, squares, len(x), np.arange(x.shape[1]))

    @cached_property
    def _sample(self) -> tuple[Float[np.ndarray, "n d_in"], np.ndarray, np.ndarray, csc_matrix]:
        """The model's activations on the cache's first windows, their sums and the cache's latents there."""
        manifest, model = self.cache.manifest, self.source.model
        most = min(SAMPLE_TOKENS, SAMPLE_FLOATS // manifest.d_in) // manifest.context_size
        n_windows = max(1, min(most, manifest.shards[0].n_windows))
        n = n_windows * manifest.context_size
        arrays, acts = self.cache.shard_tokens(0), self.cache.shard_acts(0)
        tokens = torch.from_numpy(arrays["tokens"][:n].astype(np.int64)).to(model.device).reshape(n_windows, -1)
        counted = arrays["doc"][:n] != NO_DOCUMENT
        parts = [read_activations(model, part, manifest.hook_name) for part in tokens.split(FORWARD_WINDOWS)]
        x = torch.cat(parts).flatten(0, 1).float().cpu().numpy()[counted]
        indptr = acts["indptr"][: n + 1].astype(np.int64)
        here = slice(0, int(indptr[-1]))
        values = acts["value"][here].astype(np.float32), acts["latent"][here].astype(np.int32), indptr
        latents = csr_matrix(values, shape=(n, manifest.d_sae))[counted].tocsc()
        return x, x.sum(axis=0, dtype=np.float64), np.einsum("ij,ij->j", x, x).astype(np.float64), latents

    @cached_property
    def detection(self) -> dict[str, dict[int, float]]:
        """The detection of every explainer's texts by latent, each by the judge that read them."""
        if (store := self.source.store()) is None:
            return {}
        test: dict[str, Any] = {"control": "", "scorer": "detection", "metric": "balanced_accuracy"}
        test["negatives"] = HEADLINE["detection"]
        judges = dict(reversed(store.judged()))  # of each explainer's the first
        return {n: store.values(explainer=n, judge=judges.get(n, RULE), **test) for n in store.explainers()}

    def logits(self, latent: int) -> Facts:
        """Return the promoted tokens, largest first, and the suppressed ones, lowest first."""
        found: Facts = {}
        for ours, theirs, sign in (("suppressed", "neg", 1), ("promoted", "pos", -1)):
            values = np.asarray(self.stats[f"{ours}_values"][latent], dtype=np.float64)
            order = np.argsort(sign * values, kind="stable")
            ids = np.asarray(self.stats[f"{ours}_ids"][latent])[order]
            found[f"{theirs}_str"] = [storable(self.source.strings[token]) for token in ids.tolist()]
            found[f"{theirs}_values"] = rounded(values[order])
        return found

    def passages(self, latent: int, digits: int = 6) -> Iterator[Facts]:
        """Yield the strongest passages, then those of five equally wide intervals of (0, maximum], the strongest first.

        `lo` and `hi` are the bounds of a passage's interval and `share` that of all tokens whose activation lies in it,
        to so many digits; the strongest have none: -1, the latent's maximum, and -1. Zeros are in no interval, no text
        is shown twice. Raises: DataError for an active latent in a cache without text.
        """
        activations = self.cache.latent(latent)
        position, value = activations
        seen: set[str] = set()
        bounds = {"lo": -1.0, "hi": rounded(self.stats["max"][latent], digits), "share": -1.0}
        for passage in self._new(activations, activations.windows("top", N_TOP).anchor, seen):
            yield passage | bounds
        if len(value) and not seen:
            raise DataError(f"latent {latent} is active but has no passage: {self.cache.folder} holds no text.")
        rng = np.random.default_rng([0, latent])
        edges = np.linspace(0.0, float(value.max(initial=0.0)), N_INTERVALS + 1)
        for lo, hi in zip(edges[-2::-1], edges[:0:-1], strict=True):
            inside = position[(value > lo) & (value <= hi)]
            drawn = rng.permutation(inside)[: 4 * N_PER_INTERVAL]
            share = rounded(len(inside) / self.n_tokens, digits)
            bounds = {"lo": rounded(lo, digits), "hi": rounded(hi, digits), "share": share}
            for passage in islice(self._new(activations, drawn, seen), N_PER_INTERVAL):
                yield passage | bounds

    def strongest(self, latent: int) -> str:
        """Return the text of the strongest passage; empty for a latent that never fired."""
        found = self.cache.latent(latent)
        passages = self._new(found, found.windows("top", 1).anchor, set())
        return "".join(token for passage in passages for token in passage["tokens"])

    def _new(self, latent: LatentActivations, anchors: Int[np.ndarray, " m"], seen: set[str]) -> Passages:
        """Yield the passages around the anchors whose text is new, and add these texts to `seen`."""
        around = latent.around(anchors, BEFORE, AFTER)
        for index in range(len(anchors)):
            shown, first = around.show(index), int(around.start[index])
            tokens, strengths, owner = pieces(shown.text, shown.spans, shown.values)
            text = "".join(tokens)
            if tokens and text not in seen:
                seen.add(text)
                document, values = self.cache.document(shown.doc), rounded(strengths)
                strongest = int(np.argmax(values))
                yield {
                    "tokens": tokens,
                    "values": values,
                    "anchor": owner[int(anchors[index]) - first],
                    "doc_id": storable(document.doc_id),
                    "doc_source": storable(document.source),
                    "maxValue": values[strongest],
                    "maxValueTokenIndex": strongest,
                    "minValue": min(values),
                }


def bars(values: np.ndarray) -> tuple[list[float], list[float]]:
    """Return centres and heights of 50 equal bars over the values' range; none when there are no values."""
    if len(values) == 0:
        return [], []
    heights, edges = np.histogram(values.astype(np.float64), bins=N_BARS)
    return rounded((edges[:-1] + edges[1:]) / 2), rounded(heights.astype(np.float64))


def _alike(
    value: np.ndarray, cross: np.ndarray, sums: np.ndarray, squares: np.ndarray, n: int, ids: np.ndarray
) -> Neighbours:
    """Return ids, cosines and Pearson correlations of what goes best with a latent of these activations over n tokens.

    Of each candidate are given the sum of its products with the latent, of its values and of their squares; where a
    correlation is not defined it is 0.
    """
    value = value.astype(np.float64)
    total, square = value.sum(), value @ value
    length, spread = square * squares, (square - total**2 / n) * (squares - sums**2 / n)
    cosine = cross / np.sqrt(np.where(length > 0, length, np.inf))
    pearson = (cross - total * sums / n) / np.sqrt(np.where(spread > 0, spread, np.inf))
    best = np.lexsort((ids, -pearson))[:N_TABLE]
    return ids[best], cosine[best], pearson[best]


# --- the table of fields ----------------------------------------------------------------------------------------------


class Field(NamedTuple):
    """One field of a table: its type, and the constant or the fact that fills it."""

    kind: str
    constant: Any
    fact: str | None


@cache
def tables() -> dict[str, dict[str, Any]]:
    """Return the table of fields, table by table."""
    text = resources.files("sae_italian.browser.exports").joinpath("fields.yaml").read_text(encoding="utf-8")
    found = yaml.safe_load(text)
    for table in found.values():
        table["fields"] = {name: _field(name, told) for name, told in table["fields"].items()}
    return found


def _field(name: str, told: str) -> Field:
    ((kind, sign, rest),) = re.findall(r"(\S+)(?: ([=$]) ?(.*))?", told)
    return Field(kind, yaml.safe_load(rest), None) if sign == "=" else Field(kind, None, rest or name)


def make_row(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a table, its fields in order, each filled from the facts or with its constant."""
    return {k: one.constant if one.fact is None else facts[one.fact] for k, one in tables()[name]["fields"].items()}
