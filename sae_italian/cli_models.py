"""What the commands `models` and `saes` print; the command line itself is in cli.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sae_italian.errors import DataError, UsageError


def model_facts(name: str) -> dict[str, Any]:
    """Return what catalogue and, where they can be had, config and tokenizer say of a model; the config wins."""
    from sae_italian.models import load_model_config, load_tokenizer, resolve
    from sae_italian.models.catalogue import config_differences, config_facts
    from sae_italian.models.hooks import SITES
    from sae_italian.models.loading import bos_count

    resolved = resolve(name)
    facts: dict[str, Any] = asdict(resolved.entry) if resolved.entry else {"name": resolved.saved_name}
    try:
        config = load_model_config(name)
        facts |= config_facts(config)
        facts["differences"] = config_differences(resolved.entry, config)
        layers = f"blocks.0 to blocks.{config.num_hidden_layers - 1}"
        facts["hook_names"] = f"{layers}: {', '.join(f'{hook} ({site})' for site, hook in SITES.items())}"
        facts["bos"] = f"the tokenizer adds {bos_count(load_tokenizer(name))}"
    except UsageError as error:
        facts["weights"] = str(error)
    return facts


def check_text(result: dict[str, Any]) -> str:
    """Return the table of `models check`."""
    lines = [f"{key:38} {value:.2e}" for key, value in result["differences"].items()]
    lines += [f"catalogue: {difference}" for difference in result["catalogue_differences"]]
    lines.append("ok" if result["ok"] else "the backends differ by more than 1e-4")
    return "\n".join(lines)


def add_saes(saes: Any, add: Callable[..., argparse.ArgumentParser], show: Callable[..., None]) -> None:
    """Add `saes list` and `saes doctor` to the group of commands `saes`."""
    sub = add(saes, "list", lambda options: _saes_list(options, show), "published SAEs: width, k, site, licence")
    sub.add_argument("--ids", action="store_true", help="name every SAE, not only the releases")
    text = "does an SAE fit its model? scale, layer, BOS, tokenizer, L0, explained variance, loss; names what is wrong"
    sub = add(saes, "doctor", lambda options: _saes_doctor(options, show), text)
    sub.add_argument("sae", help="an SAE's folder (SAELens, sparsify or Llama Scope format), or release:sae_id")
    sub.add_argument("--model", help="default: the model in the SAE's metadata")
    sub.add_argument("--corpus", help="default: the corpus the SAE was trained on, if it is here, else micro-italiano")
    sub.add_argument("--text-column", default="text")
    sub.add_argument("--context-size", type=int, help="default: the context the SAE was trained with")
    sub.add_argument("--tokens", type=int, default=8192, help="size of the sample")


def _saes_list(options: argparse.Namespace, show: Callable[..., None]) -> None:
    import sae_lens  # noqa: F401  # our releases are registered when it is imported

    from sae_italian.saes.releases import known_releases

    rows = known_releases()
    head = f"{'release':42} {'SAEs':>4} {'site':4} {'width':>7} {'k':>3} {'licence':12} model"
    lines = [head]
    for row in rows:
        shown = {key: "?" if row[key] is None else row[key] for key in ("d_sae", "k", "site", "licence")}
        lines.append(
            f"{row['release']:42} {row['saes']:>4} {shown['site']:4} {shown['d_sae']:>7} {shown['k']:>3} "
            f"{shown['licence']:12} {row['model']}  ({row['note']})"
        )
        if options.ids:
            lines.append("    " + ", ".join(row["ids"]))
    show(options, rows, "\n".join(lines))


def _saes_doctor(options: argparse.Namespace, show: Callable[..., None]) -> None:
    from sae_italian.models import load_model
    from sae_italian.saes import load_sae
    from sae_italian.training.doctor import examine, unreadable

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
    show(options, report.as_dict(), report.text())
    failed = [check.name for check in report.checks if check.status == "fail"]
    if failed:
        raise UsageError(f"{len(failed)} of {len(report.checks)} checks failed: {', '.join(failed)}.")


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
