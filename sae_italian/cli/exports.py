"""The command `export`: latents for Neuronpedia, circuit-tracer and W&B, and an SAE's model card."""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_italian.base.errors import UsageError
from sae_italian.cli.base import Commands, Result, folder_options, latent_range

FORMATS = ("neuronpedia", "neuronpedia-bulk", "circuit-tracer", "wandb", "model-card")


def add_commands(root: Commands) -> None:
    text = "write a cache's latents for Neuronpedia, circuit-tracer or W&B, or an SAE's model card; checked before done"
    sub = root.add("export", _export, text)
    sub.add_argument(
        "cache", type=Path, help="a cache; for model-card a trained SAE's folder, or a cache whose SAE is here"
    )
    sub.add_argument("--to", required=True, choices=FORMATS)
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--latents", metavar="A-B", help="only latents A to B, inclusive")
    sub.add_argument("--model", help="default: the model the cache was built with")
    sub.add_argument("--sae", help="an SAE's folder or release:sae_id (default: the one the cache was built with)")
    sub.add_argument("--model-id", help="Neuronpedia's name of the model (default: made from the model's)")
    sub.add_argument("--set", help="Neuronpedia's name of the source set, e.g. res-it-16k")
    sub.add_argument("--suffix", help="tells apart the SAEs of one layer in a set")
    sub.add_argument("--creator", help="Neuronpedia's user id (default: its bot's, which every database has)")
    sub.add_argument("--creator-name", help="shown with release and source set")
    sub.add_argument("--project", default="sae-italian", help="wandb: the project")
    sub.add_argument("--online", action="store_true", help="wandb: send it now (default: offline, `wandb sync` sends)")
    sub.add_argument("--repository", default="owner/name", help="model-card: where the SAE will be published")
    folder_options(sub)


def _export(options: argparse.Namespace) -> Result:
    from sae_italian.browser.exports import export
    from sae_italian.browser.report import loaded
    from sae_italian.cache import FeatureCache
    from sae_italian.models import load_tokenizer

    if options.to == "model-card":
        return _model_card(options)
    latents = latent_range(options.latents)
    cache = FeatureCache.open(options.cache)
    name = options.model or cache.manifest.model
    weights = {} if options.to == "circuit-tracer" else loaded(cache, options.sae, options.model)
    given = {
        "model": options.model_id,
        "source_set": options.set,
        "suffix": options.suffix,
        "creator": options.creator,
        "creator_name": options.creator_name,
    }
    done = export(
        cache,
        load_tokenizer(name),
        options.out,
        options.to,
        **weights,
        latents=latents,
        names={key: value for key, value in given.items() if value},
        project=options.project,
        online=options.online,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    return done.as_dict(), done.text()


def _model_card(options: argparse.Namespace) -> Result:
    """Write the README.md that `saes publish` would, and the evaluation card's files beside it."""
    from sae_italian.base.storage import write_text
    from sae_italian.cache import Manifest
    from sae_italian.evaluation.card import read_card
    from sae_italian.training.model_card import model_card

    folder = options.cache
    if (folder / "manifest.json").is_file():
        folder = Path(options.sae or Manifest.load(folder).sae)
    if not (folder / "cfg.json").is_file():
        raise UsageError(f"{folder} is no trained SAE (no cfg.json); give the folder of one, or --sae.")
    card = read_card(folder)
    if card is None:
        raise UsageError(f"{folder} has no evaluation card. Make it: sae-italian evaluate {folder}")
    file = options.out / "README.md"
    if file.exists() and not options.overwrite:
        raise UsageError(f"{file} exists. Add --overwrite to replace it, or give another folder.")
    write_text(file, model_card(folder, card, options.repository, folder.resolve().name))
    card.save(options.out)
    return {"card": str(file)}, f"model card: {file}"
