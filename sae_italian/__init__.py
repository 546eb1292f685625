"""Sparse autoencoders on Italian language models, on top of SAELens and TransformerLens.

Importing this package registers the Italian models with TransformerLens, at once if it is already imported, else at
the moment it is; nothing heavy is loaded before then.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sae_italian import plugin

__version__ = "0.1.0"

_ROOMS = {
    "models": "load_model load_tokenizer",
    "corpora": "load_corpus",
    "training": "load_config load_spec train train_suite",
    "evaluation": "evaluate",
    "saes": "load_sae open_sae",
    "cache": "FeatureCache build_cache build_caches",
    "autointerp": "explain_latent run_autointerp",
}
_PUBLIC = {name: f"sae_italian.{room}" for room, names in _ROOMS.items() for name in names.split()}
__all__ = [*_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from sae_italian.autointerp import explain_latent as explain_latent
    from sae_italian.autointerp import run_autointerp as run_autointerp
    from sae_italian.cache import FeatureCache as FeatureCache
    from sae_italian.cache import build_cache as build_cache
    from sae_italian.cache import build_caches as build_caches
    from sae_italian.corpora import load_corpus as load_corpus
    from sae_italian.evaluation import evaluate as evaluate
    from sae_italian.models import load_model as load_model
    from sae_italian.models import load_tokenizer as load_tokenizer
    from sae_italian.saes import load_sae as load_sae
    from sae_italian.saes import open_sae as open_sae
    from sae_italian.training import load_config as load_config
    from sae_italian.training import load_spec as load_spec
    from sae_italian.training import train as train
    from sae_italian.training import train_suite as train_suite


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sae_italian' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]


plugin.install()
