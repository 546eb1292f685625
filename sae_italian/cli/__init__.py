"""The command line: one table of commands (`commands.yaml`), each a function that is imported when it is called.

A command is a function of `sae_italian.cli.<group>`. Its parameters are its options: name, type, default and help are
read from the signature, from its docstring ("Args:"), and from those of the settings it takes; what means the same
everywhere is here.

Exit codes: 0 done, 2 the user can fix it (one line), 1 a defect of ours, 130 stopped.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import BoundArguments, signature
from io import TextIOWrapper
from itertools import groupby, zip_longest
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal, NamedTuple, get_args

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError, ValidationError
from cyclopts.validators import Number
from cyclopts.validators import Path as File

import sae_italian
from sae_italian.base import pace
from sae_italian.base.errors import SaeItalianError, UsageError, nearest
from sae_italian.base.labels import kinds_of, read_words
from sae_italian.base.storage import STOP_SIGNALS, claimed, on_signals, packaged_yaml

_TOLD = packaged_yaml(Path(__file__).with_name("commands.yaml").read_text("utf-8"))
COMMANDS: dict[str, dict[str, Any]] = _TOLD["commands"]
# What a command that is stopped leaves, by the first of these parameters that it has.
KEPT = {
    "folder": "what is finished is kept, --resume continues",
    "overwrite": "what is finished is kept, the same command continues",
    "llm": "paid answers are kept, the same command asks for the others",
}
OLD_COMMANDS: dict[str, str] = _TOLD["old_commands"]
_OLD_OPTIONS = _TOLD["old_options"] | {
    f"{command} --{word.partition('=')[0].replace('_', '-')}".removeprefix("every "): f"the word {word}"
    for command, words in _TOLD["words"].items()
    for word in words.split()
}
# What is said of an old spelling: of "baselines", "corpora -n", "--timeout".
RENAMED = {old: f"`{old}` is now `{now}`." for old, now in OLD_COMMANDS.items()}
RENAMED |= {old: f"{old.split()[-1]} is now {now}." for old, now in _OLD_OPTIONS.items()}


def build() -> App:
    """Return the application; no command is imported yet."""
    app = App(
        name="sae-italian",
        help_format="plaintext",  # Markdown would cost a third of the start
        help="Sparse autoencoders on Italian language models, one command each.",
        help_epilogue=_TOLD["epilogue"],
        version=sae_italian.__version__,
        suppress_keyboard_interrupt=False,  # `main` says what is kept
        default_parameter=Parameter(negative=""),
        config=_check_given,
    )
    groups = {name: app.command(App(name=name, help=text)) for name, text in _TOLD["groups"].items()}
    for name, told in COMMANDS.items():
        *group, verb = name.split()
        text, minutes = told["help"], told.get("minutes")
        if minutes is not None:
            text += f"\n\nminutes=N: end then, with what there is (default: {minutes}; inf: no bound)."
        (groups[group[0]] if group else app).command(f"sae_italian.{told['run']}", name=verb, help=text)
    return app


def _check_given(_app: App, _commands: tuple[str, ...], arguments: Sequence[Any]) -> None:
    """Raise UsageError for an empty text, which would mean the default, and for what cyclopts would round."""
    for argument in arguments:
        is_whole = int in (argument.hint, *get_args(argument.hint))
        given = [token.value for token in argument.tokens if not token.implicit_value]
        if odd := [value for value in given if not value or (is_whole and "." in value)]:
            what = "a whole number" if is_whole else "a name, a number or a text"
            raise UsageError(f"{argument.name} is {odd[0]!r}; {what} was expected.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    home, command, known = os.path.expanduser("~"), None, {}  # noqa: PTH111  # ~ where nobody has one
    # shells leave the ~ of `--out=~/x`
    words = [re.sub(r"(^|^[\w.-]+=)~(?=/|$)", lambda at: at[1] + home, word) for word in given if word != "--json"]
    try:
        _quiet_libraries()
        told = _entry(words)
        known |= {"minutes": float(told["minutes"])} if "minutes" in told else {}
        settings, words = own_words(words, known)
        command, bound, _ = build().parse_args(words, exit_on_error=False, print_error=False)
        with on_signals(signal.default_int_handler, STOP_SIGNALS[1:]):  # they stop a command as Ctrl-C does
            result = _done(command, bound, "own_folder" in told, settings.get("minutes", float("inf")))
        if result is not None:
            next_step = _next_step(told["next"], bound.arguments, result.value)
            _show(result, None if "--json" in given else next_step)
        return 0
    except SaeItalianError as error:
        return _fail(error, error.exit_code)
    except CycloptsError as error:
        said = str(error)
        if isinstance(error, UnusedCliTokensError):
            word, but = " ".join(error.unused_tokens or []), " but minutes=N" * bool(known)
            said = f"{word!r:.80} is too much; no further word is taken{but}. Quote a longer text."
        if isinstance(error, ValidationError) and error.argument:
            must = error.exception_message.lower().rpartition("must ")[2]
            said = f"{error.argument.name} is {error.argument.value}; it must {must}"
        return _fail(_renamed(words) or said, 2)
    except KeyboardInterrupt as stop:
        kept = str(stop) or next((KEPT[name] for name in signature(command or main).parameters if name in KEPT), "")
        return _fail(f"stopped{'; ' * bool(kept)}{kept}.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}; finished parts are kept.", 2)
    except (MemoryError, RuntimeError) as error:
        if not re.search("out of memory|allocate", str(error)):  # as NumPy, CUDA and PyTorch's CPU say it
            raise
        full = (
            f"the memory is full ({str(error).partition('. ')[0]:.200}); finished parts are kept. Ask for less at once"
        )
        return _fail(f"{full}, or stay on the processor: CUDA_VISIBLE_DEVICES= before the command.", 2)


def _done(command: Callable[..., Any], bound: BoundArguments, own_folder: bool, minutes: float) -> Result | None:
    """Return what a command gives, None for --help and --version; its paced loops end when the minutes are over.

    With `own_folder` the command's --out, where it is given, must be new, empty or an earlier result of the same command,
    which is written over file by file; its `run.json` says what was asked last.
    """
    out = bound.arguments.get("out") if own_folder else None
    spec = {"given": bound.args, "options": {**bound.kwargs, "out": None}}
    held = claimed(out, command.__name__, spec, resume=True, changeable=spec) if out else nullcontext()
    with pace.time_bound(minutes) as cut, held:
        found = command(*bound.args, **bound.kwargs)
    if found is None:
        return None
    value, text, failure = as_result(found)
    if cut:
        value, text = value | {"cut_short": cut}, "\n".join([str(text), *(f"Note: {what}." for what in cut)])
    return Result(value, text, failure)


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


def _next_step(steps: Sequence[str], arguments: dict[str, Any], value: Any) -> str:
    """Return what to do after a command: the first of its next steps whose fields its arguments and its result have."""
    known = arguments | (value if isinstance(value, dict) else {})
    fields = {key: quote(str(field)) for key, field in known.items() if field is not None}
    for step in steps:
        try:
            return step.format_map(known if step.startswith("in Python") else fields)
        except KeyError:
            continue
    return ""


def _fail(why: object, code: int) -> int:
    print(f"sae-italian: {' '.join(str(why).split())}", file=sys.stderr)
    return code


def _entry(words: list[str]) -> dict[str, Any]:
    """Return what the table says of a command, nothing of --help and of a group.

    Raises: UsageError for a name that is none, or none any more; cyclopts would import every command to say it.
    """
    n = 2 if words and words[0] in _TOLD["groups"] else 1
    name, last = " ".join(words[:n]), " ".join(words[n - 1 : n])
    # `autointerp export` is an old name, though its first word is a command still
    if " ".join(words[:2]) not in OLD_COMMANDS and (name in COMMANDS or last in ("", "--help", "-h", "--version")):
        return COMMANDS.get(name, {})
    known = [command.split()[n - 1] for command in COMMANDS if command.split()[: n - 1] == words[: n - 1]]
    raise UsageError(_renamed(words) or f"no command {name!r}. {nearest(last, known)}")


def _renamed(words: list[str]) -> str | None:
    """Return how a command or option that was renamed is spelled now, None where nothing was."""
    names = [word.partition("=")[0] for word in words]
    spelled = [" ".join(words[:2]), *names[:1], *(f"{names[0]} {name}" for name in names), *names]
    return next((RENAMED[old] for old in spelled if old in RENAMED), None)


def _quiet_libraries() -> None:
    """Keep other libraries' notices off a terminal that shows ours; what the environment asks for wins."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # of lost connections we tell ourselves
    if not sys.stderr.isatty():  # in a log file the bars of downloads and of loading are noise
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":  # the rest is "?"
        sys.stdout.reconfigure(errors="replace")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


# --- what several commands share --------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a command returns: a value for `--json`, the text for people, and what to fail with once it is printed.

    A text may hold Markdown tables (`readable` lines them up); without one the value's `facts` are printed.
    """

    value: Any
    text: str | None = None
    failure: SaeItalianError | None = None


def as_result(found: Any) -> Result:
    """Return what a command returned as a Result; a record of the rooms is told by its own words."""
    if isinstance(found, Result | dict | list):
        return found if isinstance(found, Result) else Result(found)
    from sae_italian.base.report import plain  # NumPy with it, which `--help` does not need

    return Result(plain(found), (found.text if hasattr(found, "text") else found.table)())


def facts(value: Any) -> str:
    """Return a record as lines of name and value, one of several numbers in one line; a list of records as a table."""
    if isinstance(value, list):
        heads = list(dict.fromkeys(key for record in value for key in record))
        return "\n".join(_lined_up([heads, *([_cell(record.get(key)) for key in heads] for record in value)]))
    width = max(map(len, value), default=0)
    return "\n".join(f"{key:{width}}  {_cell(field)}" for key, field in value.items())


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def readable(text: str) -> str:
    """Return Markdown for a terminal: tables lined up, pictures' links left out, headings without their signs."""
    lines: list[str] = []
    for is_table, group in groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        if is_table:
            rows = [[cell.strip(" `").replace("\\|", "|") for cell in row.rstrip()[1:-1].split(" |")] for row in group]
            lines += _lined_up([row for row in rows if set("".join(row)) - set("|-: ")])
        else:
            lines += [line.lstrip("# ") if line.startswith("#") else line for line in group]
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m)^!\[.*\]\(.*\)$\n?", "", "\n".join(lines))).rstrip()


def _lined_up(rows: list[list[str]]) -> list[str]:
    """Return rows of cells as lines, the first one underlined."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    shown = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return [*shown[:1], "  ".join("-" * width for width in widths), *shown[1:]]


Count = Annotated[int, Parameter(validator=Number(gte=1))]
Sae = Annotated[str, Parameter(help="The SAE: a folder, or release:sae_id.")]
Model = Annotated[str | None, Parameter(help="Name, hub id or folder of the model; default: the SAE's own.")]
Language = Annotated[Literal["it", "en"], Parameter(help="Language of what is written: it or en.")]
Seed = Annotated[int, Parameter(help="Seed of every random draw.", validator=Number(gte=0, lt=2**63))]
Subject = Annotated[str, Parameter(help="Name, hub id or folder of the model.")]
Picture = Annotated[Path | None, Parameter(validator=File(ext="svg"))]  # the rest may be a corpus
Many = Annotated[list[str] | None, Parameter(consume_multiple=True)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Folder:
    """What to do with a folder that holds an earlier run.

    Args:
        resume: Finish the run that the folder holds.
        overwrite: Replace the run that the folder holds.
    """

    resume: bool = False
    overwrite: bool = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Source:
    """The text and the model a command works with; the SAE's metadata says what is not given.

    Args:
        model: Name, hub id or folder of the model; default: the SAE's own.
        corpus: Local file or folder, catalogue name, or micro-italiano; default: what the SAE was trained on.
        text_column: Column that holds the text.
        context_size: Tokens of a window; default: as the SAE was trained.
    """

    model: str | None = None
    corpus: str | None = None
    text_column: str = "text"
    context_size: Count | None = None

    @property
    def reading(self) -> dict[str, Any]:
        """How the text is read, as the rooms' functions take it."""
        return {"text_column": self.text_column, "context_size": self.context_size}

    def load(self, name: str) -> tuple[Any, Any, str]:
        """Return SAE, model and corpus. Raises: UsageError when neither the options nor the metadata say which."""
        return sae_italian.open_sae(name, self.model, self.corpus)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Workers:
    """Where independent units of work are done.

    Args:
        engine: Processes of this machine, or a Ray cluster.
        address: The Ray cluster's host:port; default: a new one on this machine.
        workers: Processes; with ray, CPUs of a new cluster. Default: 1.
    """

    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    workers: Count | None = None

    def map(self, folder: Path, *, gpus: float = 0) -> Callable[..., Any]:
        """Return `map_units` with these options; its units write into `folder`. Raises UsageError before any work."""
        from sae_italian.base.units import map_units

        if self.engine == "local" and self.address is not None:
            raise UsageError(f"--address {self.address} is that of a Ray cluster; add --engine ray, or leave it out.")
        where = {"engine": self.engine, "address": self.address, "workers": self.workers}
        return partial(map_units, **where, gpus=gpus, folder=folder)


def numbers(option: str, given: str) -> list[int]:
    """Return whole numbers given with commas. Raises UsageError for anything else."""
    try:
        return [int(part) for part in given.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} is {given!r:.80}; numbers with commas were expected, e.g. 8,16,32.") from error


def key_values(words: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return settings given as `key=value` words over their defaults. Raises: UsageError as `read_words`."""
    return defaults | read_words(words, kinds_of(defaults))


def own_words(words: Sequence[str], defaults: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that stand among other words, as `key_values` reads them, and these others."""
    own = [word for word in words if "=" in word and word.partition("=")[0] in defaults]
    # without one pydantic is not imported: it is a third of a start
    return key_values(own, defaults) if own else {**defaults}, [word for word in words if word not in own]


def short_names(given: Sequence[str]) -> dict[str, str]:
    """Return each name by its last part where these differ; of X/seeds/seed-43 X-seed-43. Raises: UsageError for none, or twice."""
    if not given:
        raise UsageError("no SAE was given; give a folder, or release:sae_id.")
    if twice := next((name for name in given if list(given).count(name) > 1), None):
        raise UsageError(f"{twice} was given twice; give each SAE once.")
    names = [re.sub(r"/seeds/(?=seed-\d+/?$)", "-", name) for name in given]
    short = [Path(name).name for name in names]
    return dict(zip(short if len(set(short)) == len(short) else names, given, strict=True))


def named(what: str, pairs: Sequence[str] | None, least: int = 0) -> dict[str, str]:
    """Return name and value of each NAME=VALUE. Raises: UsageError for another form, a number, a name given twice, too few."""
    found: dict[str, str] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not (name and equals and value) or name in found:
            raise UsageError(f"{pair!r}: NAME=VALUE was expected, each name once.")
        if value.removeprefix("-").isdecimal():
            raise UsageError(f"{pair!r} is no text or model; settings are given before {what.partition(' NAME')[0]}.")
        found[name] = value
    if len(found) < least:
        raise UsageError(f"{what} is needed, {least} or more; {len(found)} given. For example it=testi en=texts.")
    return found
