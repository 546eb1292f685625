"""The commands of published and local SAEs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sae_italian.base.errors import DataError, UsageError
from sae_italian.cli.base import Commands, Result


def add_commands(root: Commands) -> None:
    saes = root.group("saes", "published and local SAEs")
    text = "does an SAE fit its model? scale, layer, BOS, tokenizer, L0, explained variance, loss; names what is wrong"
    sub = saes.add("doctor", _saes_doctor, text)
    sub.add_argument("sae", help="an SAE's folder (SAELens, sparsify or Llama Scope format), or release:sae_id")
    sub.add_argument("--model", help="default: the model in the SAE's metadata")
    sub.add_argument("--corpus", help="default: the corpus the SAE was trained on, if it is here, else micro-italiano")
    sub.add_argument("--text-column", default="text")
    sub.add_argument("--context-size", type=int, help="default: the context the SAE was trained with")
    sub.add_argument("--tokens", type=int, default=8192, help="size of the sample")
    text = "upload an SAE with its evaluation card, curves and model card to the Hugging Face hub"
    sub = saes.add("publish", _saes_publish, text)
    sub.add_argument("sae", type=Path, help="a training's folder with a card (`sae-italian evaluate SAE` makes it)")
    sub.add_argument("repository", help="owner/name; made if it is not there")
    sub.add_argument("--id", help="folder in the repository (default: the SAE's folder name)")
    sub.add_argument("--licence", help="of the weights, in the hub's word, e.g. apache-2.0 (default: the model's)")
    sub.add_argument("--private", action="store_true", help="make a new repository private")
    sub.add_argument("--dry-run", action="store_true", help="show files and sizes, send nothing")


def _saes_publish(options: argparse.Namespace) -> Result:
    from sae_italian.training.publish import publish

    upload = publish(
        options.sae,
        options.repository,
        sae_id=options.id,
        licence=options.licence,
        private=options.private,
        dry_run=options.dry_run,
    )
    return upload.as_dict(), upload.text()


def _saes_doctor(options: argparse.Namespace) -> Result:
    from sae_italian.evaluation.doctor import examine, unreadable
    from sae_italian.models import load_model
    from sae_italian.saes import load_sae

    if options.tokens < 256:
        raise UsageError(f"--tokens is {options.tokens}; the doctor needs 256 or more.")
    try:
        sae = load_sae(options.sae)
    except DataError as error:
        report = unreadable(options.sae, error)
    else:
        name = options.model or sae.cfg.metadata.model_name
        if not name:
            raise UsageError("the SAE's metadata does not name its model; give --model.")
        report = examine(
            sae,
            load_model(name),
            options.corpus or _corpus_of(sae, options.text_column),
            n_tokens=options.tokens,
            context_size=options.context_size,
            text_column=options.text_column,
            name=options.sae,
        )
    failed = [check.name for check in report.checks if check.status == "fail"]
    failure = UsageError(f"{len(failed)} of {len(report.checks)} checks failed: {', '.join(failed)}.")
    return report.as_dict(), report.text(), failure if failed else None


def _corpus_of(sae: Any, text_column: str) -> str:
    """Return the SAE's own corpus where it can be read here, else MicroItaliano, and say so."""
    from sae_italian.corpora.documents import MICRO_ITALIANO, check_corpus

    named = sae.cfg.metadata.dataset_path
    if named:
        try:
            check_corpus(str(named), text_column=text_column)
            return str(named)
        except UsageError:
            if Path(str(named)).exists():
                raise
            sys.stderr.write(f"{named} is not here; the sample is {MICRO_ITALIANO}. Give --corpus for another.\n")
    return MICRO_ITALIANO
