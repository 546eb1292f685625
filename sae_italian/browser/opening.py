"""Open a cache with its SAE and its model, and another SAE beside it: every latent with the nearest one of the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_italian.autointerp.llm.settings import LLMSettings
from sae_italian.base.errors import SaeItalianError, UsageError
from sae_italian.browser.answers import PageAnswers
from sae_italian.browser.live import Live
from sae_italian.browser.source import LatentSource
from sae_italian.cache import FeatureCache
from sae_italian.models import load_model, load_tokenizer
from sae_italian.saes import load_sae

NEAR = 0.7  # cosine from which two latents count as the same direction


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
            "share_near": float((cosine >= NEAR).mean()),
            "share_mutual": float((back[latent] == np.arange(len(latent))).mean()),
        }


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
) -> PageAnswers:
    """Return what the page of a cache is made from: its records, live work where SAE and model are at hand, another SAE.

    `weights` are `sae` and `model` where the caller holds them, or nothing where none are to be loaded; else they are
    loaded by these names or the cache's own. `compare` is the cache of another SAE, `other_sae` the name of that.
    Raises: UsageError when there is no such cache, as `loaded`, and as `match_latents`.
    """
    cache = FeatureCache.open(folder)
    if weights is None:
        weights = loaded(cache, sae_name, model_name)
    sae, model = weights.get("sae"), weights.get("model")
    tokenizer = load_tokenizer(model_name or cache.manifest.model) if model is None else model.tokenizer
    source = LatentSource(cache, tokenizer, sae=sae, model=model)
    work = Live(cache, sae, model, llm) if live and sae is not None and model is not None else None
    if compare is None:
        return PageAnswers(source, work)
    second = FeatureCache.open(compare)
    same = second.manifest.model == cache.manifest.model
    tokenizer = tokenizer if same else load_tokenizer(second.manifest.model)
    other = LatentSource(second, tokenizer, sae=loaded_sae(second, other_sae), model=model if same else None)
    return PageAnswers(source, work, beside(source, other))


def loaded(cache: FeatureCache, name: str | None = None, model: str | None = None) -> dict[str, Any]:
    """Return the SAE and the model of a cache, where both are at hand and are the ones it was built with.

    An SAE that is named has to be at hand; `model` is another name of the cache's model, such as a folder it was moved
    to. Raises: UsageError when the SAE that is named is not the one the cache was built with.
    """
    sae = loaded_sae(cache, name)
    try:
        return {} if sae is None else {"sae": sae, "model": load_model(model or cache.manifest.model)}
    except (SaeItalianError, OSError):
        if name is not None:
            raise
        return {}


def loaded_sae(cache: FeatureCache, name: str | None = None) -> Any:
    """Return the SAE of a cache, None where it is not at hand. One that is named has to be.

    A cache that was moved together with its SAE (as a quickstart's folder is) still finds it: in `sae/` beside it.
    Raises: UsageError when the SAE that is named is not the one the cache was built with.
    """
    if name is not None:
        sae = load_sae(name)
        FeatureCache.open(cache.folder, sae=sae)
        return sae
    for place in (cache.manifest.sae, str(cache.folder.resolve().parent / "sae")):
        try:
            return loaded_sae(cache, place)
        except (SaeItalianError, OSError):
            continue
    return None


def beside(source: LatentSource, other: LatentSource) -> Other:
    """Return another SAE with its matches. Raises: UsageError as `match_latents`."""
    name = other.run()["sae"]
    if name == source.run()["sae"]:
        name += f" ({other.cache.folder.resolve().parent.name}/{other.cache.folder.name})"
    return Other(name, other, match_latents(source, other))


def match_latents(source: LatentSource, other: LatentSource) -> dict[str, list[Any]]:
    """Return for each latent its best match in the other SAE and the cosine, and back, as columns.

    Keys: `latent` and `cosine` by latent of the first, `back` and `back_cosine` by latent of the second.
    Raises: UsageError when an SAE is not at hand, or the two do not write into the same space.
    """
    decoders = []
    for one in (source, other):
        if one.decoder is None:
            raise UsageError(
                f"the SAE of {one.cache.folder} ({one.cache.manifest.sae}) is not at hand; comparing needs both decoders."
            )
        decoders.append(one.decoder)
    found: dict[str, list[Any]] = {}
    for names, (mine, theirs) in ((("latent", "cosine"), decoders), (("back", "back_cosine"), decoders[::-1])):
        index, cosine = mine.matches(theirs)
        found |= {names[0]: index.tolist(), names[1]: np.round(cosine.astype(float), 4).tolist()}
    return found
