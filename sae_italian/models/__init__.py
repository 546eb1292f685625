"""Italian models: the catalogue, loading by backend, the table of hook names, the embedded mini model."""

from sae_italian.models.catalogue import ModelEntry, ResolvedModel, catalogue, resolve, resolved_here
from sae_italian.models.hooks import Hook, parse_hook_name
from sae_italian.models.loading import load_model, load_model_config, load_tokenizer

__all__ = [
    "Hook",
    "ModelEntry",
    "ResolvedModel",
    "catalogue",
    "load_model",
    "load_model_config",
    "load_tokenizer",
    "parse_hook_name",
    "resolve",
    "resolved_here",
]
