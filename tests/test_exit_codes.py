"""How a command ends, each code shown by a command that ends so: `python -m tests.test_exit_codes > docs/exit-codes.md`."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from sae_italian.cli import main
from tests.autointerp.explainita.test_explainita import jsonl_of
from tests.autointerp.explainita.test_predict import marked_row
from tests.autointerp.llm.endpoint import FakeEndpoint, stand_in

PAGE = Path(__file__).parents[1] / "docs" / "exit-codes.md"
HEAD = """# Exit codes

Each command of the third column is run by tests/test_exit_codes.py, which prints this page.

| code | when | for example |
|---:|---|---|
"""


class Ending(NamedTuple):
    """`words` is what stands on the command's last line."""

    code: int
    when: str
    command: str
    words: str
    how: str = ""  # what happens meanwhile


ENDINGS = (
    Ending(
        0,
        "done; also when whoever reads the output through a pipe has read enough",
        "recipes",
        "mini/topk",
    ),
    Ending(
        1,
        "a fault of ours, with a traceback that a report should hold",
        "models list",
        "ZeroDivisionError",
        "with a fault planted in it",
    ),
    Ending(
        2,
        "something you can mend, said in one line: a name, a setting, a file, a folder, a full disk, a server that will not "
        "answer; a check of `saes doctor` that fails",
        "cache info nothing-here",
        "nothing-here",
    ),
    Ending(
        130,
        "stopped by Ctrl-C, TERM, HUP, USR1 or XCPU; what is finished is kept, and the line says how to go on",
        "explainita predict DATA.jsonl OUT.jsonl --task 1 --explainer llm --endpoint URL --llm-model NAME",
        "stopped; paid answers are kept, the same command asks for the others.",
        "Ctrl-C",
    ),
)
FAULTY = """import sys; import sae_italian.cli.catalogues as models; from sae_italian.cli import main
models.list_models = lambda: 1 / 0
sys.exit(main(sys.argv[1:]))"""


def printed() -> str:
    rows = (
        f"| {end.code} | {end.when} | `sae-italian {end.command}`{', ' * bool(end.how)}{end.how} |" for end in ENDINGS
    )
    return HEAD + "\n".join(rows) + "\n"


def test_the_page_says_what_the_table_holds():
    assert PAGE.read_text(encoding="utf-8") == printed()


@pytest.mark.parametrize("end", [end for end in ENDINGS if end.code != 1], ids=lambda end: str(end.code))
def test_a_command_ends_with(end, tmp_path, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup it is ignored

    def answer(body):
        os.kill(os.getpid(), signal.SIGINT)
        return stand_in(body)

    data = jsonl_of(tmp_path / "data.jsonl", [marked_row(1, ["il <<gatto>>"])])
    with FakeEndpoint(answer) as endpoint:
        known = {"DATA.jsonl": data, "OUT.jsonl": tmp_path / "out.jsonl", "URL": endpoint.url}
        try:
            assert main([str(known.get(word, word)) for word in end.command.split()]) == end.code
        finally:
            signal.signal(signal.SIGINT, before)
    told = capsys.readouterr()
    assert end.words in (told.err or told.out) and told.err.count("\n") == (end.code > 0)


def test_a_fault_of_ours_is_a_traceback_and_1():
    (end,) = (end for end in ENDINGS if end.code == 1)
    done = subprocess.run([sys.executable, "-c", FAULTY, *end.command.split()], capture_output=True, text=True)
    assert done.returncode == end.code and end.words in done.stderr.splitlines()[-1]


if __name__ == "__main__":
    sys.stdout.write(printed())
