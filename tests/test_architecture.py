"""The house rules that a program can hold: how big it is, where its arrows point, how its options and names are spelled."""

import os
import re
import resource
import subprocess
import sys
from functools import cache

import pytest

from sae_italian import cli as command_line
from tests import house

# What "thin" means (DESIGN.md): these numbers fall, and rise only where an issue names its room's lines. Where the house
# is not yet as thin as DESIGN.md asks, the number is what stands here today and the comment is what it must come to.
AT_MOST = {
    "lines": 34_133,  # 21_500
    "statements": 21_997,  # 13_500
    "files": 146,  # 150
    "files under 60 lines": 15,
    "function median": 10,
    "function p90": 30,
    "longest function": 60,
    "95th percentile of line lengths": 108,
    "lines of JavaScript, CSS, HTML": 2_929,
    "commands": 40,  # DESIGN.md: 32 for what the first round had, 40 with the rooms of the later issues
    "options": 260,  # DESIGN.md: 200 and 260 likewise
}
LEAST_AIR = 0.26  # share of docstrings and blank lines
ROOM_LINES = {
    "base": 1_614,  # 650
    "micro_italiano": 1_109,  # 1_250
    "models": 1_166,  # 760, and issue 16's GGUF files
    "corpora": 1_666,  # 1_100
    "saes": 2_155,  # 1_300  # plugin with it; the formats and calibrated twins of issue 15 among it
    "training": 3_148,  # 1_500
    "evaluation": 1_153,
    "cache": 2_038,  # 1_650
    "autointerp": 6_057,  # 3_900
    "analysis": 3_256,  # 2_500
    "circuits": 1_552,
    "benchmark": 2_128,  # 1_200  # choosing k, seeds and absorption with it
    "papers": 1_366,  # 1_400
    "browser": 3_084,  # 2_650
    "cli": 2_585,  # 1_400  # quickstart with it
}
TOGETHER = {"plugin": "saes", "quickstart": "cli"}

# The rows of the house (DESIGN.md, "The rooms"), from the ground up: a room imports from the rows below its own.
ROWS = (
    {"base"},
    {"micro_italiano"},
    {"models", "corpora", "saes"},
    {"plugin"},
    {"evaluation", "cache"},
    {"training", "autointerp"},
    {"analysis"},
    {"circuits"},  # on the causal tools of analysis
    {"browser"},
    {"papers", "benchmark"},
    {"quickstart"},
    {"cli"},
)
BESIDE = {"saes": {"models"}}
BELOW = {room: set().union(*ROWS[:row]) | BESIDE.get(room, set()) for row, rooms in enumerate(ROWS) for room in rooms}
# Words that say what a number counts or is measured in.
UNITS = set(
    re.findall(
        r"\w+",
        """token tokens latent latents logits pair pairs seconds window windows documents processes cpus dollars characters
        sentences samples steps examples positions calls layer layers share probability draw draws port minutes branches
        thresholds bytes units prompts contexts names labels columns times activation strength similarity cosine ratio
        temperature""",
    )
)


@cache
def measured() -> dict[str, float]:
    lengths = house.function_lengths()
    _, widths = house.air_and_widths()
    web = [file for kind in ("js", "css", "html") for file in house.PACKAGE.rglob(f"*.{kind}") if file.stem != "graph"]
    small = [file for file in house.FILES if house.lines(file) < 60 and file.name != "__init__.py"]
    return {
        "lines": sum(map(house.lines, house.FILES)),
        "statements": house.statements(),
        "files": len(house.FILES),
        "files under 60 lines": len(small),
        "function median": house.percentile(lengths, 0.5),
        "function p90": house.percentile(lengths, 0.9),
        "longest function": lengths[-1],
        "95th percentile of line lengths": house.percentile(widths, 0.95),
        "lines of JavaScript, CSS, HTML": sum(map(house.lines, web)),
        "commands": len(command_line.COMMANDS),
        "options": sum(1 for _, option in options() if is_option(option)),
    }


@pytest.mark.parametrize("measure", AT_MOST)
def test_the_package_is_thin(measure):
    assert measured()[measure] <= AT_MOST[measure]


def test_the_code_keeps_its_air():
    assert house.air_and_widths()[0] >= LEAST_AIR


@pytest.mark.parametrize("room", ROOM_LINES)
def test_a_room_keeps_its_budget(room):
    its = [file for file in house.FILES if TOGETHER.get(house.room(file), house.room(file)) == room]
    assert sum(map(house.lines, its)) <= ROOM_LINES[room]


def test_every_file_is_in_a_room():
    assert {house.room(file) for file in house.FILES} - {"__init__"} <= BELOW.keys()


@pytest.mark.parametrize("file", house.FILES, ids=lambda file: str(file.relative_to(house.PACKAGE)))
def test_arrows_point_down(file):
    room = house.room(file)
    if room == "__init__":
        return  # the public names
    rooms = {(imported.split(".") + ["__init__"])[1] for imported in house.imports(file)}
    assert rooms <= BELOW[room] | {room, "__init__"}


@pytest.mark.parametrize("file", house.FILES, ids=lambda file: str(file.relative_to(house.PACKAGE)))
def test_files_stay_readable(file):
    assert house.lines(file) <= 400


def test_no_import_goes_round_in_a_circle():
    assert not house.circles()


def test_a_class_name_means_one_thing():
    assert not house.classes_named_twice()


def test_no_name_is_for_tests_alone():
    assert not house.unused_names()


def test_other_libraries_tables_are_touched_in_one_place():
    tables = ("OFFICIAL_MODEL_NAMES", "MODEL_ALIASES", "NAMED_PRETRAINED_SAE_LOADERS")
    touching = {file.name for file in house.FILES if any(table in house.text(file) for table in tables)}
    assert touching == {"plugin.py"}


# --- the command line -------------------------------------------------------------------------------------------------


@cache
def options() -> list:
    """Return (command, argument) for every argument of every command."""
    app, found = command_line.build(), []
    for command in command_line.COMMANDS:
        _, apps, _ = app.parse_commands(command.split())
        its = apps[-1].assemble_argument_collection(default_parameter=app.default_parameter, parse_docstring=True)
        found += [(command, option) for option in its if option.name != "*"]
    return found


def is_option(argument) -> bool:
    return argument.name.startswith("-")


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_every_option_says_what_it_is(command):
    for its, option in options():
        if its != command:
            continue
        said = (option.parameter.help or "").strip()
        assert said, f"{command} {option.name} has no help"
        if not is_option(option):
            continue
        words = set(re.findall(r"\w+", said.lower()))
        if option.field_info.default is None:  # that it is not given means something; other defaults --help prints
            assert words & {"default", "without", "unless", "only"}, (option.name, said)
        if re.search(r"\b(int|float)\b", str(option.hint)):
            assert words & (UNITS | {"seed"}), (option.name, said)


def test_one_name_for_one_thing():
    names = {option.name for _, option in options() if is_option(option)}
    assert not names & {"--lang", "--n", "-n", "--dataset", "--count", "--layer-range", "--folder", "--output"}


def test_old_spellings_name_commands_that_exist(capsys):
    for old, new in command_line.OLD_COMMANDS.items():
        assert command_line.main(old.split()) == 2
        told = capsys.readouterr().err
        assert new in told and told.count("\n") == 1
        assert any(new.startswith(command) for command in command_line.COMMANDS), new


def test_every_bar_is_one_that_a_log_file_can_be_read_with():
    """A bar of `tqdm`'s own says nothing at all where its output is piped; base/pace's says a line now and then."""
    assert [file.name for file in house.FILES if "tqdm(" in house.text(file)] == ["pace.py"]


# --- starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [None, ["--help"], ["trian"], ["cache", "biuld"]])
def test_starting_takes_less_than_half_a_second(words):
    code = "import sae_italian" if words is None else f"import sae_italian.cli as c; c.main({words})"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def seconds() -> float:
        """Processor time: starting waits for nothing, and the clock on the wall also counts what else the machine does."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert any(seconds() < 0.5 for _ in range(20))  # some machines are slow by spells


def test_help_needs_neither_torch_nor_pydantic():
    """It is a third of the half second."""
    code = "import sys, sae_italian.cli as c; c.main(['--help']); sys.exit(str({'torch', 'pydantic'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == "set()"


def test_what_make_starts_writes_bytecode():
    """Containers often forbid it; every process then compiles every import anew, and SAELens' takes three times as long."""
    asked = ["make", "--silent", "--eval=asked: ; @echo [$$PYTHONDONTWRITEBYTECODE]", "asked"]
    told = subprocess.run(
        asked,
        cwd=house.PACKAGE.parent,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert "[]" in told.stdout.splitlines(), told.stderr


@pytest.mark.parametrize("gets_through", [True, False])
def test_an_install_asks_uv_and_falls_back_on_pip(gets_through, tmp_path):
    """A `python -m venv` that makes programs which only say how they were called; no index is asked."""
    for name, status in {"python": 0, "pip": 1, "uv": 0 if gets_through else 2, "sae-italian": 0}.items():
        program = tmp_path / "made" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "{name} $UV_DEFAULT_INDEX $*" >>{tmp_path}/called\nexit {status}\n')
        program.chmod(0o755)
    venv, python = tmp_path / "venv", tmp_path / "python3"
    python.write_text(f'#!/bin/sh\n[ "$2" != venv ] || {{ mkdir {venv}; cp -r {tmp_path}/made {venv}/bin; }}\n')
    python.chmod(0o755)
    make = ["make", f"VENV={venv}", f"PYTHON={python}", f"{venv}/.ready"]
    environment = os.environ | {"PIP_INDEX_URL": "https://mirror/simple"}
    done = subprocess.run(make, cwd=house.PACKAGE.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    called = [line for line in (tmp_path / "called").read_text().splitlines() if "--editable" in line]
    assert [line.split()[0] for line in called] == (["uv"] if gets_through else ["uv", "python"])
    assert called[0].startswith("uv https://mirror/simple pip install")
    assert all("constraints.txt" in line for line in called)
