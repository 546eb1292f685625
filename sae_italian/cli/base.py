"""What every command's file shares: a tree of commands, printing, and the options that several commands have.

A command is a function from its options to what it prints, as a value for `--json` and as text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_italian.base.errors import SaeItalianError, UsageError, nearest

Result = tuple[Any, str] | tuple[Any, str, SaeItalianError | None]  # the last: what to fail with once it is printed
Command = Callable[[argparse.Namespace], Result]


class Parser(argparse.ArgumentParser):
    """argparse, with the nearest command named and one line instead of the usage."""

    def error(self, message: str) -> Any:
        if "invalid choice: " in message:
            wrong = message.split("invalid choice: ")[1].split("'")[1]
            actions = self._subparsers._group_actions if self._subparsers else []
            choices = [str(choice) for action in actions for choice in getattr(action, "choices", None) or ()]
            if " " not in self.prog:
                from sae_italian.cli.app import COMMANDS

                choices += [name.split()[0] for name in COMMANDS]
            message = f"unknown command {wrong!r}. {nearest(wrong, choices)}"
        self.exit(2, f"{self.prog}: {message}\n")


class Commands:
    """The commands of one parser: `add` one, or a `group` of them."""

    def __init__(self, parser: argparse.ArgumentParser):
        self._subparsers = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
        self._groups: dict[str, Commands] = {}

    def add(self, name: str, function: Command, text: str) -> argparse.ArgumentParser:
        """Add a command and return its parser, to give it options."""
        sub = self._subparsers.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.set_defaults(command=lambda options: _show(options, function(options)))
        return sub

    def group(self, name: str, text: str = "") -> Commands:
        """Return the group of that name, made with `text` at the first call."""
        if name not in self._groups:
            sub = self._subparsers.add_parser(name, help=text, description=text)
            sub.set_defaults(command=lambda _: sub.print_help())
            self._groups[name] = Commands(sub)
        return self._groups[name]


def _show(options: argparse.Namespace, result: Result) -> None:
    """Print a result, as JSON when asked, else as text; then raise what it failed with, if anything."""
    value, text, failure = result if len(result) == 3 else (*result, None)
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str) if options.json else text)
    if failure:
        raise failure


def positive(name: str, value: int | None) -> None:
    """Raise UsageError, naming the option, for a number below 1."""
    if value is not None and value < 1:
        raise UsageError(f"{name} is {value}; it must be 1 or more.")


def latent_range(given: str | None) -> tuple[int, int] | None:
    """Return the bounds of `A-B` or of one latent. Raises UsageError for anything else."""
    if given is None:
        return None
    first, dash, last = given.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
        raise UsageError(f"--latents is {given!r}; two numbers were expected, as in --latents 0-99.")
    return int(first), int(last if dash else first)


def folder_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--resume", action="store_true", help="finish the run that the folder holds")
    sub.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")


def source_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", help="default: the model in the SAE's metadata")
    sub.add_argument("--corpus", help="default: the corpus the SAE was trained on")
    sub.add_argument("--text-column", default="text")
    sub.add_argument("--context-size", type=int, help="default: the context the SAE was trained with")


def engine_options(sub: argparse.ArgumentParser, workers: str = "processes; with ray, CPUs of a new cluster") -> None:
    sub.add_argument("--engine", default="local", choices=("local", "ray"), help="where units of work are done")
    sub.add_argument("--address", help="the Ray cluster's host:port; default: start one on this machine")
    sub.add_argument("--workers", type=int, help=workers)


def unit_map(options: argparse.Namespace, folder: Path, *, gpus: float = 0) -> Callable[..., Any]:
    """Return `map_units` with the engine of a command's options; its units write into `folder`."""
    from functools import partial

    from sae_italian.base.units import map_units

    if options.address and options.engine != "ray":
        raise UsageError(f"--address {options.address} is that of a Ray cluster; add --engine ray, or leave it out.")
    engine, address = options.engine, options.address
    return partial(map_units, engine=engine, address=address, workers=options.workers, gpus=gpus, folder=folder)


def load_sources(options: argparse.Namespace) -> tuple[Any, Any, str]:
    """Return SAE, model and corpus of a command's options, the SAE's own metadata being the default."""
    from sae_italian.models import load_model
    from sae_italian.saes import load_sae

    positive("--tokens", options.tokens)
    sae = load_sae(options.sae)
    name = options.model or sae.cfg.metadata.model_name
    corpus = options.corpus or sae.cfg.metadata.dataset_path
    for value, flag in ((name, "--model"), (corpus, "--corpus")):
        if not value:
            raise UsageError(f"the SAE's metadata does not say; give {flag}.")
    return sae, load_model(name), corpus


def sae_name(given: str) -> str:
    """Return the name under which an SAE is remembered: a folder's whole path, or release:sae_id as given."""
    return str(Path(given).resolve()) if Path(given).is_dir() else given
