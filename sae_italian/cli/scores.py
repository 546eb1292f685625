"""The command `scores`: what an encoder and the subject model itself say of explanations that `autointerp` made."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.cli.base import Commands, Result, positive

CONTEXT = 1024  # of a model whose configuration names none


def add_commands(root: Commands) -> None:
    text = "embedding, surprisal and intervention scores of the explanations of a cache"
    sub = root.add("scores", _scores, text)
    sub.add_argument("cache", type=Path)
    sub.add_argument("--encoder", type=Path, help="folder of a multilingual sentence encoder: the embedding score")
    sub.add_argument("--subject", action="store_true", help="surprisal and intervention with the cache's own model")
    sub.add_argument("--latents", type=int, default=20, help="explained latents, drawn at random (default 20)")
    sub.add_argument("--explainer", default="rules", help="whose explanations (default: rules)")
    sub.add_argument("--language", choices=("it", "en"), default="it", help="of the explanations' text (default it)")
    sub.add_argument("--model", help="default: the model the cache was built with")


def _scores(options: argparse.Namespace) -> Result:
    from sae_italian.autointerp.model_scores import means, score_with_models, table_of
    from sae_italian.autointerp.run import STORE_FILE
    from sae_italian.autointerp.scorers import Encoder
    from sae_italian.cache import FeatureCache
    from sae_italian.models import load_model
    from sae_italian.saes import load_sae

    positive("--latents", options.latents)
    if options.encoder is None and not options.subject:
        raise UsageError("nothing to score with: give --encoder FOLDER, --subject, or both.")
    cache = FeatureCache.open(options.cache)
    store = cache.folder / STORE_FILE
    if not store.is_file():
        raise UsageError(f"{cache.folder} has no explanations yet; run `sae-italian autointerp {cache.folder}` first.")
    model = load_model(options.model or cache.manifest.model)
    score_with_models(
        cache,
        model.tokenizer,
        store,
        latents=options.latents,
        encode=None if options.encoder is None else Encoder(options.encoder),
        forward=partial(_logits, model, cache.manifest.hook_name) if options.subject else None,
        sae=load_sae(cache.manifest.sae) if options.subject else None,
        explainer=options.explainer,
        language=options.language,
        context=getattr(model.config, "max_position_embeddings", None) or CONTEXT,
    )
    rows = means(store, options.explainer)
    return rows, table_of(rows)


def _logits(model: Any, hook_name: str, tokens: Any, replace: Any = None) -> Any:
    """Return the model's logits, the activation that the SAE reads replaced where asked."""
    import torch

    from sae_italian.models.activations import logits_with_replacement

    if replace is not None:
        return logits_with_replacement(model, tokens.to(model.device), hook_name, replace)
    with torch.no_grad():
        return model(tokens.to(model.device), use_cache=False).logits
