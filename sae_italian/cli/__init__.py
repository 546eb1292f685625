"""The command line: one thin command per verb. Exit codes: 0 done, 2 the user can fix it (one line), 1 a defect of ours."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import sae_italian
from sae_italian.base.errors import SaeItalianError
from sae_italian.cli import (
    autointerp,
    scores,
)
from sae_italian.cli.base import Commands, Parser

GROUPS = (
    autointerp,
    scores,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from sae_italian.cli import app

    given = list(sys.argv[1:] if arguments is None else arguments)
    if _is_new(given, app):  # commands move to cli/app.py one group at a time
        return app.main(given)
    parser = _parser()
    options = parser.parse_args(given)
    if not hasattr(options, "command"):
        parser.print_help()
        return 0
    try:
        _quiet_libraries()
        options.command(options)
    except SaeItalianError as error:
        print(f"sae-italian: {_one_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        print(f"sae-italian: stopped; {stop or 'finished parts are kept, --resume continues'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        print(f"sae-italian: {error.strerror or _one_line(error)}{place}; finished parts are kept.", file=sys.stderr)
        return 2
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _quiet_libraries() -> None:
    """Keep other libraries' notices off a terminal that shows ours; what the environment asks for wins."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="sae-italian", description="Sparse autoencoders on Italian language models, one command each.")
    parser.add_argument("--version", action="version", version=f"sae-italian {sae_italian.__version__}")
    root = Commands(parser)
    for group in GROUPS:
        group.add_commands(root)
    return parser


def _is_new(given: list[str], app: Any) -> bool:
    words = [word for word in given if not word.startswith("-")]
    names = (*app.COMMANDS, *app.OLD_COMMANDS)
    return words[:1] == ["models"] or any(" ".join(words[: len(name.split())]) == name for name in names)
