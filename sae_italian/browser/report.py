"""The report of a cache: everything that lies beside it, as one folder that opens from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_italian.base.errors import SaeItalianError
from sae_italian.browser.schema import CardRecord, RowRecord
from sae_italian.browser.source import RESULTS, LatentSource
from sae_italian.browser.write import write_browser
from sae_italian.cache import FeatureCache

__all__ = ["RESULTS", "latent_card", "loaded", "loaded_sae", "model_note", "open_source", "write_report"]


def open_source(
    cache: FeatureCache, tokenizer: Any, *, decoder: bool = False, sae_name: str | None = None, **options: Any
) -> LatentSource:
    """Return the source of a cache's pages, with the catalogue's note on its model.

    With `decoder`, the SAE and the model that the cache names are loaded too, for the map and the logits; where they
    are not at hand the source goes without, unless the SAE is named here. `options` are those of `LatentSource`.

    Raises: UsageError when the SAE that is named is not the one the cache was built with.
    """
    options.setdefault("model_note", model_note(cache.manifest.model))
    if decoder and options.get("sae") is None:
        options |= loaded(cache, sae_name)
    return LatentSource(cache, tokenizer, **options)


def write_report(cache: FeatureCache, tokenizer: Any, out: Path, **options: Any) -> Path:
    """Write the browser of a cache into `out` and return the path of its index.html. Options: those of `open_source`.

    Raises: UsageError if `out` holds anything that is not ours.
    """
    return write_browser(out, open_source(cache, tokenizer, **options))


def latent_card(cache: FeatureCache, tokenizer: Any, latent: int) -> tuple[RowRecord, CardRecord]:
    """Return the records of one latent. Raises: UsageError when there is no such latent."""
    cache.range_of(latent)
    source = open_source(cache, tokenizer)
    return source.row(latent), source.card(latent)


def model_note(model: str) -> str:
    """Return what the catalogue says of a model; empty for one that it does not have."""
    from sae_italian.models import resolve

    entry = resolve(model).entry
    return f"{entry.note} {entry.licence}." if entry else ""


def loaded(cache: FeatureCache, name: str | None = None, model: str | None = None) -> dict[str, Any]:
    """Return the SAE and the model of a cache, where both are at hand and are the ones it was built with.

    An SAE that is named has to be at hand; `model` is another name of the cache's model, such as a folder it was moved
    to. Raises: UsageError when the SAE that is named is not the one the cache was built with.
    """
    from sae_italian.models import load_model

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
    from sae_italian.saes import load_sae

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
