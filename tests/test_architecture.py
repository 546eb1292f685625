"""The house rules that a program can hold: arrows between rooms go one way, files stay readable."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sae_italian"
# The rows of the house (DESIGN.md, "The rooms"), from the ground up: a room imports from the rows below its own.
ROWS = (
    {"base"},
    {"micro_italiano"},
    {"models", "corpora", "saes"},
    {"plugin"},
    {"evaluation", "cache"},
    {"training", "autointerp"},
    {"analysis", "circuits"},
    {"browser"},
    {"papers", "benchmark"},
    {"cli", "quickstart"},
)
BESIDE = {"saes": {"models"}, "models": {"plugin"}, "cli": {"quickstart"}}
BELOW = {room: set().union(*ROWS[:row]) | BESIDE.get(room, set()) for row, rooms in enumerate(ROWS) for room in rooms}
# A script of a room that needs more than the room itself may: it is run, never imported by the package.
SCRIPTS = {"micro_italiano/train_mini.py": {"corpora"}}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_rooms(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sae_italian":
            parts = node.module.split(".")[1:]
            rooms |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("sae_italian.")}
    return rooms


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_arrows_go_one_way(file):
    relative = file.relative_to(PACKAGE)
    room = relative.parts[0].removesuffix(".py")
    if room == "__init__":
        return  # the public names
    allowed = BELOW[room] | SCRIPTS.get(relative.as_posix(), set()) | {room, "__version__"}
    assert imported_rooms(file) <= allowed


def test_scripts_are_imported_by_nobody():
    for file in FILES:
        assert "train_mini" not in file.read_text(encoding="utf-8").split('"""', 2)[-1] or file.name in (
            "train_mini.py",
        ), file


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_stay_readable(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


def test_only_plugin_touches_other_libraries_tables():
    tables = ("OFFICIAL_MODEL_NAMES", "MODEL_ALIASES", "NAMED_PRETRAINED_SAE_LOADERS")
    for file in FILES:
        if file.name != "plugin.py":
            text = file.read_text(encoding="utf-8")
            assert not any(table in text for table in tables), file
