"""Sparse autoencoders on Italian language models, on top of SAELens and TransformerLens.

Importing this package registers the Italian models with TransformerLens, at once if it is already imported, else at
the moment it is; nothing heavy is loaded before then.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sae_italian import plugin

__version__ = "0.1.0"

_PUBLIC = {
    "load_model": "sae_italian.models",
    "load_tokenizer": "sae_italian.models",
    "load_corpus": "sae_italian.corpora",
    "load_config": "sae_italian.training",
    "train": "sae_italian.training",
    "evaluate": "sae_italian.evaluation",
    "load_sae": "sae_italian.saes",
    "build_cache": "sae_italian.cache",
    "FeatureCache": "sae_italian.cache",
    "run_autointerp": "sae_italian.autointerp",
    "explain_latent": "sae_italian.autointerp",
}
__all__ = [*_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from sae_italian.autointerp import explain_latent as explain_latent
    from sae_italian.autointerp import run_autointerp as run_autointerp
    from sae_italian.cache import FeatureCache as FeatureCache
    from sae_italian.cache import build_cache as build_cache
    from sae_italian.corpora import load_corpus as load_corpus
    from sae_italian.evaluation import evaluate as evaluate
    from sae_italian.models import load_model as load_model
    from sae_italian.models import load_tokenizer as load_tokenizer
    from sae_italian.saes import load_sae as load_sae
    from sae_italian.training import load_config as load_config
    from sae_italian.training import train as train


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sae_italian' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]


plugin.install()
