"""Open what a page may ask for: a cache with its SAE and its model, and another SAE beside it.

Server and notebook answer alike, by name:

run                      the run, the live work there is, and the name of an SAE to compare with
rows                     the list of latents by column
card, wide               one latent; its passages, each as wide as its window
matches, other/...       every latent with the nearest one of the other SAE, and that one's own run, rows, cards
tokens, steer, ablate, explain      live work (live.py)
near                     latents that are about what a sentence says, where there is a sentence encoder
"""

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sae_italian.analysis.directions import ALIKE, nearest_directions
from sae_italian.autointerp.llm import LLMSettings
from sae_italian.base.errors import SaeItalianError, UsageError
from sae_italian.base.hub import explain
from sae_italian.base.storage import atomic_path
from sae_italian.browser.live import CALLS, Live, Refused, checked_text
from sae_italian.browser.source import LatentSource, short_name
from sae_italian.cache import FeatureCache
from sae_italian.models import load_tokenizer
from sae_italian.saes import check_fits, model_of

MEANING, N_NEAR = "meaning.npz", 20


class Other(NamedTuple):
    """An SAE to compare with: its name, its records, and the matches as `match_latents` returns them."""

    name: str
    source: LatentSource
    matches: dict[str, list[Any]]

    def facts(self) -> dict[str, float]:
        """Return the mean cosine of the matches, the share that is near and the share that is mutual."""
        latent, back, cosine = (np.array(self.matches[name]) for name in ("latent", "back", "cosine"))
        return {
            "mean_cosine": float(cosine.mean()),
            "share_near": float((cosine >= ALIKE).mean()),
            "share_mutual": float((back[latent] == np.arange(len(latent))).mean()),
        }


def encode(texts: Sequence[str], name: str) -> Float[np.ndarray, "texts d"]:
    """Return unit vectors of texts, by a sentence encoder of model2vec: a folder, or its name on the hub.

    An empty text is a zero. Raises: UsageError without the package or the encoder.
    """
    try:
        model2vec = import_module("model2vec")
    except ImportError:
        raise UsageError("search by meaning needs model2vec: pip install 'sae-italian[meaning]'.") from None
    try:
        vectors = model2vec.StaticModel.from_pretrained(name).encode(list(texts)).astype(np.float32)
    except Exception as error:  # of the hub, and of files that are no encoder
        raise explain(error, name) from error
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def nearest_in_meaning(source: LatentSource, encoder: str, sentence: str) -> list[dict[str, Any]]:
    """Return the N_NEAR latents nearest to a sentence, by explanation or passage, whichever is nearer: `cosine`."""
    cosines = (meaning_vectors(source, encoder) @ encode([sentence], encoder)[0]).max(axis=0)
    best = np.argsort(-cosines, kind="stable")[:N_NEAR]
    return [{"latent": i, "cosine": round(float(cosines[i]), 4)} for i in best.tolist()]


def meaning_vectors(source: LatentSource, encoder: str) -> Float[np.ndarray, "2 d_sae d"]:
    """Return the vectors of what a cache's latents are called, and of their strongest passages.

    They are kept in the cache's folder if it can be written; made again for other texts, another encoder.
    """
    rows, file = source.rows(), source.cache.folder / MEANING
    names = zip(*(rows[name] for name in ("title_it", "explanation_it", "llm_it")), strict=True)
    texts = [" ".join(filter(None, one)) for one in names]
    texts += [re.sub("[\x01\x02]", "", text) for text in rows["sample"]]
    made_of = hashlib.sha256("\0".join([encoder, *texts]).encode("utf-8", "replace")).hexdigest()
    if file.is_file():
        kept = np.load(file)
        if str(kept["made_of"]) == made_of:
            return kept["vectors"]
    vectors = encode(texts, encoder).reshape(2, source.d_sae, -1)
    with suppress(OSError), atomic_path(file) as temporary, temporary.open("wb") as handle:
        np.savez(handle, vectors=vectors, made_of=made_of)
    return vectors


class PageAnswers:
    """Call it with a name and an argument; the answer is plain JSON.

    Raises: Refused for what is not there, and as live work itself.
    """

    def __init__(
        self,
        source: LatentSource,
        live: Live | None = None,
        other: Other | None = None,
        encoder: str | None = None,
    ):
        self.source, self.live, self.other, self.encoder = source, live, other, encoder

    def __call__(self, name: Any, argument: Any = None) -> Any:
        name, source = str(name), self.source
        if name in CALLS:
            if self.live is None:
                raise Refused(
                    "No live work: this cache's SAE or its model is not on this machine.",
                    "Nessun lavoro dal vivo: la SAE o il modello di questa cache non sono su questa macchina.",
                    404,
                )
            return self.live.call(name, argument)
        source.refresh()
        if name == "near" and self.encoder is not None:
            sentence = checked_text("sentence", argument.get("sentence") if isinstance(argument, dict) else None)
            return {"near": nearest_in_meaning(source, self.encoder, sentence)}
        if name == "run":
            facts = {"llm": bool(self.live and self.live.llm), "near": self.encoder is not None}
            live = None if self.live is None else {"works": list(CALLS), **facts}
            return {"run": source.run(), "live": live, "compare": self.other.name if self.other else None}
        if self.other is not None and name.startswith("other/"):
            return PageAnswers(self.other.source)(name.removeprefix("other/"), argument)
        if self.other is not None and name == "matches":
            return self.other.matches
        if name == "rows":
            return source.rows()
        if name not in ("card", "wide"):
            raise Refused(f"There is no {name[:40]!r} here.", f"Qui non c'è {name[:40]!r}.", 404)
        if not isinstance(argument, int) or isinstance(argument, bool) or not 0 <= argument < source.d_sae:
            raise Refused(f"There is no latent {str(argument)[:40]}.", f"Non c'è il latente {str(argument)[:40]}.", 404)
        return source.card(argument) if name == "card" else source.wide(argument)


def open_pages(
    folder: str | Path,
    *,
    sae_name: str | None = None,
    model_name: str | None = None,
    weights: dict[str, Any] | None = None,
    live: bool = False,
    llm: LLMSettings | None = None,
    compare: str | Path | None = None,
    other_sae: str | None = None,
    encoder: str | None = None,
) -> PageAnswers:
    """Return what the page of a cache is made from: its records, live work where SAE and model are at hand, another SAE.

    `weights` are `sae` and `model` where the caller holds them, or nothing where none are to be loaded; else they are
    loaded by these names or the cache's own. `compare` is the cache of another SAE, `other_sae` the name of that;
    `encoder` is that of `encode`, for a search by meaning.
    Raises: UsageError when there is no such cache or it is another SAE's, as `loaded`, and as `match_latents`.
    """
    cache = FeatureCache.open(folder, sae=(weights or {}).get("sae"))
    if weights is None:
        weights = loaded(cache, sae_name, model_name)
    sae, model = weights.get("sae"), weights.get("model")
    tokenizer = load_tokenizer(model_name or cache.manifest.model) if model is None else model.tokenizer
    source = LatentSource(cache, tokenizer, sae=sae, model=model)
    work = Live(cache, sae, model, llm) if live and sae is not None and model is not None else None
    if compare is None:
        return PageAnswers(source, work, encoder=encoder)
    second = FeatureCache.open(compare)
    same = second.manifest.model == cache.manifest.model
    tokenizer = tokenizer if same else load_tokenizer(second.manifest.model)
    other = LatentSource(second, tokenizer, sae=loaded_sae(second, other_sae), model=model if same else None)
    return PageAnswers(source, work, beside(source, other), encoder)


def loaded(cache: FeatureCache, name: str | None = None, model: str | None = None) -> dict[str, Any]:
    """Return the SAE and the model of a cache, where both are at hand and are the ones it was built with.

    An SAE that is named has to be at hand; `model` is another name of the cache's model, such as a folder it was moved
    to. Raises: UsageError when the SAE that is named is not the one the cache was built with.
    """
    if (sae := loaded_sae(cache, name)) is not None:
        with _unless_named(name):
            subject = model_of(sae, model or cache.manifest.model)
            check_fits(sae, subject)
            return {"sae": sae, "model": subject}
    return {}


def loaded_sae(cache: FeatureCache, name: str | None = None) -> Any:
    """Return the SAE of a cache, None where it is not at hand. One that is named has to be.

    Raises: UsageError when the SAE that is named is not the one the cache was built with.
    """
    with _unless_named(name):
        return cache.load_sae(name)


def _unless_named(name: str | None) -> suppress:
    """Go on where an SAE or its model is not at hand, unless somebody has named the SAE."""
    return suppress(*(() if name else (SaeItalianError, OSError)))


def beside(source: LatentSource, other: LatentSource) -> Other:
    """Return another SAE with its matches. Raises: UsageError as `match_latents`."""
    name = short_name(other.cache.manifest)
    if name == short_name(source.cache.manifest):
        name += f" ({other.cache.folder.resolve().parent.name}/{other.cache.folder.name})"
    return Other(name, other, match_latents(source, other))


def match_latents(source: LatentSource, other: LatentSource) -> dict[str, list[Any]]:
    """Return for each latent its best match in the other SAE and the cosine, and back, as columns.

    Keys: `latent` and `cosine` by latent of the first, `back` and `back_cosine` by latent of the second.
    Raises: UsageError when an SAE is not at hand, or the two do not write into the same space.
    """
    units = []
    for one in (source, other):
        if one.decoder is None:
            raise UsageError(
                f"the SAE of {one.cache.folder} ({one.cache.manifest.sae}) is not at hand; comparing needs both decoders."
            )
        units.append(one.decoder.units)
    if units[0].shape[1] != units[1].shape[1]:
        one, two = (each.shape[1] for each in units)
        raise UsageError(f"the SAEs write {one} and {two} numbers: only SAEs of one model can be compared.")
    found: dict[str, list[Any]] = {}
    for index, cosine, pair in (("latent", "cosine", units), ("back", "back_cosine", units[::-1])):
        nearest = nearest_directions(*pair)
        found |= {index: nearest.nearest.tolist(), cosine: nearest.cosine.astype(float).round(4).tolist()}
    return found
