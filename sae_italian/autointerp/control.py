"""The untrained control: the same explanations and scores for an SAE of random directions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_italian.autointerp.protocols import Explainer, Judge
from sae_italian.autointerp.run import AutointerpConfig, run_autointerp
from sae_italian.cache import FeatureCache, build_cache
from sae_italian.saes import random_twin

TWIN_FOLDER = "random-twin"


def random_sae_control(
    cache: FeatureCache,
    sae: Any,
    model: Any,
    config: AutointerpConfig,
    *,
    workers: int = 1,
    explainers: Sequence[Explainer] = (),
    judges: Sequence[Judge] = (),
) -> Path:
    """Build the cache of the random twin on the same text, inside the cache's folder, and score it; return its store.

    Explainers and judges that are handed in do for the twin what they did for the trained SAE.
    """
    manifest = cache.manifest
    twin = random_twin(sae, seed=config.seed)
    folder = build_cache(
        twin,
        model,
        manifest.corpus,
        cache.folder / TWIN_FOLDER,
        n_tokens=manifest.n_tokens_asked,
        split=manifest.split,  # pyright: ignore[reportArgumentType]
        context_size=manifest.context_size,
        windows_per_shard=manifest.windows_per_shard,
        text_column=manifest.text_column,
        sae_name=f"random twin of {manifest.sae}",
        resume=(cache.folder / TWIN_FOLDER).is_dir(),
    )
    return run_autointerp(
        FeatureCache.open(folder),
        model.tokenizer,
        config,
        sae=twin,
        explainers=explainers,
        judges=judges,
        workers=workers,
    )


def twin_cache(cache: FeatureCache, sae: Any, seed: int = 0) -> tuple[FeatureCache, Any] | None:
    """Return the random twin's cache and the twin, where an earlier run has finished it."""
    from sae_italian.base.errors import SaeItalianError

    try:
        return FeatureCache.open(cache.folder / TWIN_FOLDER), random_twin(sae, seed=seed)
    except SaeItalianError:
        return None
