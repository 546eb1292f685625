"""The command line: one table of commands (`commands.yaml`), each a function that is imported when it is called.

Exit codes: 0 done, 2 the user can fix it (one line), 1 a defect of ours, 130 stopped.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from shlex import quote
from typing import Any

from cyclopts import App, CycloptsError, Parameter, ValidationError

import sae_italian
from sae_italian.base.errors import SaeItalianError
from sae_italian.base.storage import packaged_yaml
from sae_italian.cli.options import Result, as_result, facts, readable

_TOLD = packaged_yaml(Path(__file__).with_name("commands.yaml").read_text("utf-8"))
COMMANDS: dict[str, dict[str, Any]] = _TOLD["commands"]
# What a command that is stopped leaves, by the first of these parameters that it has.
KEPT = {
    "folder": "what is finished is kept, --resume continues",
    "overwrite": "what is finished is kept, the same command continues",
    "llm": "paid answers are kept, the same command asks for the others",
}
OLD_COMMANDS: dict[str, str] = _TOLD["old_commands"]
OLD_OPTIONS: dict[str, str] = _TOLD["old_options"] | {
    f"{command} --{word.partition('=')[0].replace('_', '-')}".removeprefix("every "): f"the word {word}"
    for command, words in _TOLD["words"].items()
    for word in words.split()
}


def build() -> App:
    """Return the application; no command is imported yet."""
    app = App(
        name="sae-italian",
        help="Sparse autoencoders on Italian language models, one command each.",
        help_epilogue="--json, after any command, prints its result as JSON.",
        version=sae_italian.__version__,
        suppress_keyboard_interrupt=False,  # `main` says what is kept
        default_parameter=Parameter(negative=""),
    )
    groups = {name: App(name=name, help=text) for name, text in _TOLD["groups"].items()}
    for group in groups.values():
        app.command(group)
    for name, told in COMMANDS.items():
        *group, verb = name.split()
        (groups[group[0]] if group else app).command(f"sae_italian.{told['run']}", name=verb, help=told["help"])
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != "--json"]
    command = None
    try:
        _quiet_libraries()
        if " ".join(words[:2]) in OLD_COMMANDS:  # `autointerp export`: its first word alone is a command still
            return _fail(_renamed(words), 2)
        command, bound, _ = build().parse_args(words, exit_on_error=False, print_error=False)
        found = command(*bound.args, **bound.kwargs)
        if found is not None:  # --help and --version give nothing
            result = as_result(found)
            _show(result, None if "--json" in given else _next_step(words, bound.arguments, result.value))
        return 0
    except SaeItalianError as error:
        return _fail(error, error.exit_code)
    except CycloptsError as error:
        said = _renamed(words) or str(error)
        if isinstance(error, ValidationError) and error.argument:
            said = f"{error.argument.name} is {error.argument.value}; it {error.exception_message.lower()}"
        return _fail(said, 2)
    except KeyboardInterrupt as stop:
        kept = str(stop) or next((KEPT[name] for name in signature(command or main).parameters if name in KEPT), "")
        return _fail(f"stopped{'; ' * bool(kept)}{kept}.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or error}{place}; finished parts are kept.", 2)


def _show(result: Result, next_step: str | None) -> None:
    """Print a result, as JSON where no next step is to be said. Raises: what the result is to fail with."""
    if next_step is None:
        print(json.dumps(result.value, ensure_ascii=False, indent=2, default=str))
    else:
        print(readable(facts(result.value) if result.text is None else result.text))
        if next_step and not result.failure:
            print(f"\nNext: {next_step}")
    if result.failure:
        raise result.failure


def _next_step(words: list[str], arguments: dict[str, Any], value: Any) -> str:
    """Return what to do after a command: the first of its next steps whose fields its arguments and its result have."""
    known = arguments | (value if isinstance(value, dict) else {})
    fields = {key: quote(str(field)) for key, field in known.items() if field is not None}
    command = next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None)
    for step in COMMANDS[command]["next"] if command else ():
        try:
            return step.format_map(fields)
        except KeyError:
            continue
    return ""


def _fail(why: object, code: int) -> int:
    print(f"sae-italian: {' '.join(str(why).split())}", file=sys.stderr)
    return code


def _renamed(words: list[str]) -> str | None:
    """Return how a command or option that was renamed is spelled now, None where nothing was."""
    for old in (" ".join(words[:2]), *words[:1]):
        if old in OLD_COMMANDS:
            return f"`{old}` is now `{OLD_COMMANDS[old]}`."
    for name in (word.split("=")[0] for word in words):
        for key in (f"{words[0]} {name}", name):
            if key in OLD_OPTIONS:
                return f"{name} is now {OLD_OPTIONS[key]}."
    return None


def _quiet_libraries() -> None:
    """Keep other libraries' notices off a terminal that shows ours; what the environment asks for wins."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # of lost connections we tell ourselves
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
