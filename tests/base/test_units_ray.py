"""Units of work on a real Ray cluster with two workers."""

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

from sae_italian.base import units
from sae_italian.base.errors import UsageError
from sae_italian.base.units import map_units
from tests.base import work
from tests.base.test_units import alive, start, wait_for


def test_results_come_in_order_from_two_workers_set_up_once(ray_cluster, tmp_path):
    arguments = {"engine": "ray", "folder": tmp_path}
    assert list(map_units(work.Writer(work.write_slowly, tmp_path), range(8), **arguments)) == [
        number**2 for number in range(8)
    ]
    setups = (tmp_path / "setups").read_text().split()
    assert len(setups) == len(set(setups)) == 2 and str(os.getpid()) not in setups
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_killed_worker_costs_its_own_units_only(ray_cluster, tmp_path):
    arguments = {"engine": "ray", "folder": tmp_path}
    assert list(map_units(work.Writer(work.die_once, tmp_path), range(8), **arguments)) == [
        number**2 for number in range(8)
    ]
    done = [number for number, _ in work.read_log(tmp_path)]
    assert (tmp_path / "died").exists()
    assert done.count(3) == 2 and sorted(set(done)) == list(range(8)) and len(done) <= 10
    assert all((tmp_path / f"{number}.txt").read_text() == str(number**2) for number in range(8))


def test_workers_that_keep_dying_are_given_up(ray_cluster):
    with pytest.raises(UsageError, match="died at or near unit 0"):
        list(map_units(work.die, range(1), engine="ray"))


def test_errors_arrive_as_they_were_raised(ray_cluster):
    with pytest.raises(UsageError, match="^unit 2: expected a corpus, found none. Give --corpus.$") as caught:
        list(map_units(work.fail, range(5), engine="ray"))
    assert caught.value.__cause__ is None
    with pytest.raises(IndexError) as defect:
        list(map_units(work.break_down, range(2), engine="ray"))
    assert "in break_down" in "".join(traceback.format_exception(defect.value))


def test_what_is_just_ending_is_left_to_end():
    """A cancelled task that ends in that moment makes Ray's driver abort (ray-project/ray #54798)."""
    told = []
    ray = SimpleNamespace(
        wait=lambda left, **how: (
            told.append(("wait", list(left))) or ([x for x in left if x < 3], [x for x in left if x > 2])
        ),
        cancel=lambda reference: told.append(("cancel", reference)),
    )
    units._cancel(ray, [1, 2, 3, 4])
    assert told == [("wait", [1, 2, 3, 4]), ("cancel", 3), ("cancel", 4), ("wait", [3, 4])]
    told.clear()
    units._cancel(ray, [])
    assert told == []


def test_a_folder_that_workers_do_not_see_is_refused(ray_cluster, tmp_path, monkeypatch):
    arguments = {"engine": "ray", "folder": tmp_path / "shared"}
    assert list(map_units(work.square, [3], **arguments)) == [9]
    monkeypatch.setattr(units, "_probe", lambda folder: tmp_path / "elsewhere" / ".probe.tmp")
    with pytest.raises(UsageError, match="elsewhere is not shared with .*Give a folder"):
        list(map_units(work.square, [3], **arguments))


def test_another_cluster_than_the_connected_one_is_refused(ray_cluster):
    with pytest.raises(UsageError, match="connected to the Ray cluster at .*, not 10.0.0.1:6379"):
        map_units(work.square, [1], engine="ray", address="10.0.0.1:6379")


def test_another_version_on_a_worker_is_refused():
    with pytest.raises(UsageError, match="this machine 0.0.1. Install the same version"):
        units._opened(b"", "0.0.1", None)


@pytest.mark.slow
def test_ctrl_c_stops_units_and_the_cluster_that_was_started(tmp_path):
    pytest.importorskip("ray", reason="needs Ray: pip install 'sae-italian[ray]'")
    process = start(tmp_path, 400, "ray")
    wait_for(lambda: len(work.read_log(tmp_path)) > 4, 180)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130 and "Traceback" not in errors
    workers = {pid for _, pid in work.read_log(tmp_path)}
    wait_for(lambda: not any(alive(pid) for pid in workers), 15)
    assert len(work.read_log(tmp_path)) < 60 and not list(tmp_path.glob(".*.tmp"))


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_cluster_by_its_address_and_no_cluster_there(tmp_path):
    pytest.importorskip("ray", reason="needs Ray: pip install 'sae-italian[ray]'")
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "start", "--head", "--port=6399", "--num-cpus=2", "--include-dashboard=false"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    opened = {**environment, "RAY_AUTH_MODE": "disabled"}
    cluster = subprocess.Popen(
        [*command, "--block"], env=opened, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    code = (
        "import sys; from sae_italian.base.units import map_units; from tests.base import work\n"
        "print(list(map_units(work.square, range(5), engine='ray', address=sys.argv[1])))"
    )

    def at(address: str) -> subprocess.CompletedProcess:
        arguments = [sys.executable, "-c", code, address]
        return subprocess.run(arguments, env=opened, capture_output=True, text=True, timeout=180)

    try:
        wait_for(lambda: answers(6399), 60)
        time.sleep(5)
        assert at("127.0.0.1:6399").stdout.strip() == "[0, 1, 4, 9, 16]"
        assert "UsageError: no Ray cluster answers at 127.0.0.1:6398" in at("127.0.0.1:6398").stderr
    finally:
        os.killpg(cluster.pid, signal.SIGTERM)
        wait_for(lambda: cluster.poll() is not None, 60)
