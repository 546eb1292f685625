"""The tables of `make bench TABLE=training` on a shape so small that only their form can be checked."""

import json
import re

import pytest

from tests.bench import training
from tests.bench.__main__ import main
from tests.bench.training import BARE, OURS, SAELENS, Shape


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(training, "SHAPES", {"cpu": [Shape(8, 64, 2, 16)], "cuda": []})


def test_step_and_trainer_tables(capsys):
    assert main(["training", "--tables", "step,trainer", "--repeats", "2", "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    (step,), (trainer,) = tables["step"], tables["trainer"]
    assert set(step["seconds"]) == {SAELENS, OURS, BARE} and len(trainer["seconds"]) == 3
    for row in (step, trainer):
        assert row["ratio"][OURS] == {"median": 1.0, "min": 1.0, "max": 1.0}
        assert all(spread["min"] <= spread["median"] <= spread["max"] for spread in row["seconds"].values())


@pytest.mark.slow
def test_memory_table(capsys):
    assert main(["training", "--tables", "memory"]) == 0
    assert "peak memory: d_in 8, d_sae 64, k 2, batch 16, float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tables", "stepp"], "'stepp' is unknown. .*step"),
        (["--device", "tpu"], "--device is 'tpu'; it must be one of cpu, cuda"),
        (["--d-sae", "5"], "--d-sae is 5; on cpu the shapes have 64"),
        (["--repeats", "0"], "--repeats is 0"),
    ],
)
def test_wrong_options(options, message, capsys):
    assert main(["training", *options]) == 2
    assert re.search(message, capsys.readouterr().err)
