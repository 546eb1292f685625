"""Two SAEs side by side: every latent with the one whose decoder direction is nearest, in one browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_italian.base.errors import UsageError
from sae_italian.browser.source import LatentSource, loaded_sae, open_source
from sae_italian.cache import FeatureCache
from sae_italian.models import load_tokenizer

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


def beside(source: LatentSource, other: LatentSource) -> Other:
    """Return another SAE with its matches. Raises: UsageError as `match_latents`."""
    matches = match_latents(source, other)
    name = other.run()["sae"]
    if name == source.run()["sae"]:
        name += f" ({other.cache.folder.resolve().parent.name}/{other.cache.folder.name})"
    return Other(name, other, matches)


def open_other(source: LatentSource, folder: Path, *, sae_name: str | None = None, model: Any = None) -> Other:
    """Return the SAE of another cache beside one that is open already; `model` is that one's, where it is loaded.

    Raises: UsageError when there is no such cache, its SAE is not at hand, or as `match_latents`.
    """
    cache = FeatureCache.open(folder)
    same = cache.manifest.model == source.cache.manifest.model
    tokenizer = source.tokenizer if same else load_tokenizer(cache.manifest.model)
    weights = {"sae": loaded_sae(cache, sae_name), "model": model if same else None}
    return beside(source, open_source(cache, tokenizer, **weights))


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
    latent, cosine = decoders[0].matches(decoders[1])
    back, back_cosine = decoders[1].matches(decoders[0])
    return {
        "latent": latent.tolist(),
        "cosine": np.round(cosine.astype(float), 4).tolist(),
        "back": back.tolist(),
        "back_cosine": np.round(back_cosine.astype(float), 4).tolist(),
    }
