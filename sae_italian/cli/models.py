"""The commands of the catalogue of models."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from sae_italian.base.errors import SaeItalianError, UsageError
from sae_italian.cli.base import Commands, Result


def add_commands(root: Commands) -> None:
    models = root.group("models", "the catalogue of Italian models")
    models.add("list", _models_list, "names, aliases, licence, gate")
    models.add("show", _models_show, "dimensions, licence, hooks of one model").add_argument("name")
    text = "compare the three backends on a prompt: logits, and every layer and site"
    sub = models.add("check", _models_check, text)
    sub.add_argument("name")
    sub.add_argument("--prompt", default="La città è più bella perché c'è il sole.")
    sub.add_argument("--italian", action="store_true", help="also: does it know agreement and the indirect object?")


def _models_list(options: argparse.Namespace) -> Result:
    from dataclasses import asdict

    from sae_italian.models.catalogue import catalogue

    entries = catalogue().values()
    lines = [f"{e.name:42} {', '.join(e.aliases):60} {e.licence:19} gated: {e.gated}" for e in entries]
    return [asdict(entry) for entry in entries], "\n".join(lines)


def _models_show(options: argparse.Namespace) -> Result:
    facts = model_facts(options.name)
    return facts, "\n".join(f"{key:14} {value}" for key, value in facts.items())


def _models_check(options: argparse.Namespace) -> Result:
    from sae_italian.models import load_model
    from sae_italian.models.loading import compare_backends

    result = compare_backends(options.name, options.prompt)
    text = check_text(result)
    if options.italian:
        from sae_italian.analysis import italian_skills

        skills = italian_skills(load_model(options.name))
        result["italian"] = skills
        text += "\n" + "\n".join(f"{name:38} {value:.3f}" for name, value in skills.items())
    differ = SaeItalianError("the backends differ by more than 1e-4; please report this model.")
    return result, text, None if result["ok"] else differ


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
