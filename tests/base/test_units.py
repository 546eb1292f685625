"""Units of work on this machine: results, errors, workers that die, Ctrl-C."""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch

from sae_italian.base.errors import UsageError
from sae_italian.base.units import map_units
from tests.base import work

MAIN = """import signal, sys
from pathlib import Path
from sae_italian.base.units import map_units
from tests.base import work
if __name__ == '__main__':
    folder = Path(sys.argv[1])
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    arguments = dict(engine=sys.argv[3], workers=2, folder=folder)
    try:
        for _ in map_units(work.Writer(work.write_slowly, folder), range(int(sys.argv[2])), **arguments):
            pass
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start(folder: Path, n_units: int, engine: str = "local") -> subprocess.Popen:
    script = folder / "main.py"
    script.write_text(MAIN)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(folder), str(n_units), engine]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_what_the_function_holds_is_opened_once_a_worker(tmp_path, workers):
    results = map_units(work.Writer(work.write, tmp_path), range(12), workers=workers)
    assert list(results) == [number**2 for number in range(12)]
    assert sorted(number for number, _ in work.read_log(tmp_path)) == list(range(12))
    if workers == 1:
        assert not (tmp_path / "setups").exists()  # it is open here
    else:
        setups = (tmp_path / "setups").read_text().split()
        assert len(setups) == len(set(setups)) <= workers and str(os.getpid()) not in setups


def test_units_are_read_as_they_are_needed():
    read = []
    results = map_units(work.square, (read.append(number) or number for number in range(100)))
    assert [next(results), next(results)] == [0, 1]
    assert read == [0, 1]
    assert list(map_units(work.square, [])) == []


def test_a_workers_death_ends_the_work_and_keeps_what_is_finished(tmp_path):
    with pytest.raises(UsageError, match="a worker died at or near unit [0-3] .*--resume"):
        list(map_units(work.Writer(work.die_once, tmp_path), range(8), workers=2))
    for file in tmp_path.glob("[0-9]*.txt"):
        assert int(file.read_text()) == int(file.stem) ** 2
    left = [number for number in range(8) if not (tmp_path / f"{number}.txt").exists()]
    assert 3 in left
    assert list(map_units(work.Writer(work.die_once, tmp_path), left, workers=2)) == [n**2 for n in left]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_user_can_fix_arrives_as_it_was_raised(workers):
    results = map_units(work.fail, range(5), workers=workers)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(UsageError) as caught:
        list(results)
    assert str(caught.value) == "unit 2: expected a corpus, found none. Give --corpus."
    assert caught.value.__cause__ is None


def test_a_defect_keeps_the_workers_traceback():
    with pytest.raises(IndexError, match="list index out of range") as caught:
        list(map_units(work.break_down, range(2), workers=2))
    assert "in break_down" in "".join(traceback.format_exception(caught.value))
    with pytest.raises(RuntimeError, match="Unpicklable: a reason"):
        list(map_units(work.raise_unpicklable, range(1), workers=2))


def test_a_worker_that_is_told_to_end_sends_first_what_it_has_done():
    """Ended while it sends, it would keep the lock of the results, and the run would wait for ever."""
    assert list(map_units(work.Sent, [7], workers=2)) == [7]


def test_what_cannot_be_asked_is_refused_before_any_work():
    with pytest.raises(UsageError, match="engine 'rai' is unknown. Did you mean 'ray'"):
        map_units(work.square, [1], engine="rai")  # pyright: ignore[reportArgumentType]


def test_a_forked_process_makes_torchs_pool_in_its_first_thread_before_any_unit(tmp_path, monkeypatch):
    """torch makes its pool of threads anew after a fork, and fails now and then where two threads ask for it at once."""

    def told(threads: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        (tmp_path / f"pool-{os.getpid()}").touch()

    monkeypatch.setattr(torch, "set_num_threads", told)
    assert list(map_units(work.seen_by, [tmp_path] * 4, workers=2, fork=True)) == [True] * 4


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'sae-italian\[ray\]'"):
        map_units(work.square, [1], engine="ray")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_stopping_leaves_whole_files_and_no_process(tmp_path, stop):
    process = start(tmp_path, 200)
    wait_for(lambda: len(work.read_log(tmp_path)) > 4)
    (os.kill if stop == signal.SIGKILL else os.killpg)(process.pid, stop)  # a terminal's reach the workers too
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (-signal.SIGKILL if stop == signal.SIGKILL else 130)
    workers = {pid for _, pid in work.read_log(tmp_path)}
    wait_for(lambda: not any(alive(pid) for pid in workers))
    assert len(work.read_log(tmp_path)) < 30
    if stop != signal.SIGKILL:  # Python's own helper of the processes ends by SIGHUP, and says so
        assert (errors == "" or stop == signal.SIGHUP) and not list(tmp_path.glob(".*.tmp"))
    for file in tmp_path.glob("[0-9]*.txt"):
        assert int(file.read_text()) == int(file.stem) ** 2


@pytest.mark.parametrize(("given", "threads"), [("", None), ("1,2", "1"), ("0", None), ("many", None)])
def test_a_number_of_threads_that_is_empty_or_a_list_ends_no_worker(monkeypatch, given, threads):
    """As `OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK` leaves it where Slurm was not told how many."""
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    own = str(max(1, (os.cpu_count() or 1) // 2))
    assert list(map_units(os.getenv, ["OMP_NUM_THREADS"] * 2, workers=2)) == [threads or own] * 2
