"""What README.md and docs/ tell people to type is what the command line takes."""

import re
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from sae_italian.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[str]:
    """Return every `sae-italian ...` of a page, those in a sentence and those of a block of code."""
    text = text.replace("\\\n", " ")
    spans = [" ".join(span.split()) for span in re.findall(r"`(sae-italian\s[^`]+)`", text)]
    lines = [line.partition("  #")[0].strip() for line in re.findall(r"(?m)^\s*(sae-italian .*)$", text)]
    return [line for line in spans + lines if line.removeprefix("sae-italian ") not in app.COMMANDS]  # the name alone


def as_typed(command: str) -> list[list[str]]:
    """Return a command as one could type it: options in brackets are given, each of `a|b` once, N is a number."""
    text = re.sub(r"\s*\|\s*", "|", re.sub(r"\[|\]|\.\.\.", " ", command))
    choices = [word.replace("N", "3").split("|") if word == "N" else word.split("|") for word in shlex.split(text)[1:]]
    return [list(words) for words in product(*choices)]


WRITTEN = sorted({(page.name, command) for page in PAGES for command in commands(page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize(("page", "command"), WRITTEN)
def test_a_command_on_a_page_is_one_that_is_taken(page, command):
    for words in as_typed(command):
        app.build().parse_args(words, exit_on_error=False, print_error=False)


def test_no_snippet_of_python_uses_a_name_that_nothing_gives():
    code = "\n".join(re.findall(r"(?ms)^```python\n(.*?)^```", PAGES[0].read_text(encoding="utf-8")))
    checked = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
    done = subprocess.run(checked, input=code, capture_output=True, text=True, check=False)
    assert code and done.returncode == 0, done.stdout + done.stderr


def test_the_pages_are_read_as_they_are_written():
    assert len(WRITTEN) > 30
    assert commands("see `sae-italian browse\nCACHE`\n\n    sae-italian train X  # so\n") == [
        *("sae-italian browse CACHE", "sae-italian train X")
    ]
    assert as_typed("sae-italian a b | c [--n N] ...") == [["a", "b", "--n", "3"], ["a", "c", "--n", "3"]]
