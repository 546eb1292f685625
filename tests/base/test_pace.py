"""How long an analysis takes: foreseen, shown in a pipe, ended by the time bound with what there is."""

import json

import pytest

from sae_italian.base import pace
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import Pace, one_of, paced, time_bound
from sae_italian.base.report import save_result


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [0.0]
    monkeypatch.setattr(pace, "monotonic", lambda: now[0])
    return now


def worked(clock, n, seconds, what="loop"):
    """Return how many of n steps are done, each of so many seconds."""
    done = 0
    for _ in paced(range(n), what, n, "pair"):
        clock[0] += seconds
        done += 1
    return done


def test_without_a_bound_all_is_done_and_a_short_loop_says_nothing(clock, capsys):
    assert worked(clock, 10, 1.0) == 10
    assert "to go" not in capsys.readouterr().err


def test_after_the_first_steps_the_rest_is_foreseen(clock, capsys):
    worked(clock, 1000, 1.0)
    assert "loop: 3 of 1,000 pairs done, about 17 min to go\n" in capsys.readouterr().err
    with one_of(3):
        worked(clock, 50, 1.0)
    assert "about 47 s to go, then as much for each of 2 more\n" in capsys.readouterr().err
    worked(clock, 5, 40.0)  # slow steps: after the first
    assert "loop: 1 of 5 pairs done, about 3 min to go\n" in capsys.readouterr().err


def test_a_pipe_gets_whole_lines_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(pace, "PIPED_SECONDS", 0)
    assert list(paced([2, 3], "loop", 5, "pair", size=lambda item: item)) == [2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("loop:") for line in lines) and "100%" in lines[-1]


def test_the_bound_ends_the_loops_with_what_there_is_and_results_say_so(clock, tmp_path):
    with time_bound(1) as cut:
        with one_of(2):
            assert worked(clock, 100, 10.0, "first") == 3  # half of the minute
        assert worked(clock, 100, 10.0, "second") == 3
        assert worked(clock, 100, 10.0, "third") == 1  # each loop does its first step
        assert worked(clock, 1, 10.0, "whole") == 1
        save_result(tmp_path, "shift", {"numbers": 1}, ["text"])
    assert cut == [f"{name}: stopped by the time bound at {n} of 100 pairs"
                   for name, n in (("first", 3), ("second", 3), ("third", 1))]  # fmt: skip
    assert json.loads((tmp_path / "shift.json").read_text())["cut_short"] == cut
    assert f"Note: {cut[0]}." in (tmp_path / "shift.md").read_text()
    save_result(tmp_path, "shift", {"numbers": 1})
    assert "cut_short" not in json.loads((tmp_path / "shift.json").read_text())


def test_what_need_not_be_done_counts_as_done(clock):
    with time_bound(1) as cut:
        own = Pace("loop", 10)
        clock[0] += 30
        assert not own.step(2)
        own.skip(9)
        clock[0] += 40
        assert not own.step()
    assert own.done == 10 and not cut


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_a_bound_is_above_zero(minutes):
    with pytest.raises(UsageError, match="a number above 0"), time_bound(minutes):
        pass
