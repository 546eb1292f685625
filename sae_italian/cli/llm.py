"""The options of an LLM for commands that argparse still reads, as the settings of `autointerp.llm`."""

from __future__ import annotations

import argparse
from dataclasses import fields

from sae_italian.autointerp.llm.settings import LLMOptions, LLMSettings


def llm_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--explainer", choices=("rule", "llm"), default="rule", help="who explains (default: rule)")
    sub.add_argument("--judge", choices=("rule", "llm"), help="who judges (default: as --explainer)")
    sub.add_argument("--endpoint", help="an OpenAI-compatible server, such as http://localhost:8000/v1")
    sub.add_argument("--llm-model", help="the model's name there")
    sub.add_argument("--language", choices=("it", "en"), default="it", help="of prompts and explanations")
    sub.add_argument("--n-shown", type=int, default=20, help="examples of a latent that the model is shown (20)")
    sub.add_argument("--estimate", action="store_true", help="print calls, tokens and cost of the LLM; send nothing")
    sub.add_argument("--max-usd", type=float, help="stop before this run's calls can cost more")
    sub.add_argument("--llm", nargs="*", default=[], metavar="KEY=VALUE", help="rare settings of the language model")


def settings_of(options: argparse.Namespace) -> LLMSettings:
    """Return the checked settings. Raises: UsageError when what an LLM needs is missing."""
    given = {field.name: getattr(options, field.name) for field in fields(LLMOptions)}
    return LLMOptions(**given).with_words(options.llm)
