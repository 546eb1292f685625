"""A cache built on a Ray cluster has the bytes of one built here, also when a worker is killed on the way."""

import hashlib
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

from sae_italian.base.storage import read_json
from sae_italian.base.units import map_units
from sae_italian.cache import FeatureCache, build_cache, build_caches
from sae_italian.cli import main
from sae_italian.saes import load_sae


def digests(folder: Path) -> dict[str, str]:
    files = [file for kind in ("tokens", "acts", "latents") for file in (folder / kind).iterdir()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class KillTheFirst:
    """A map of units that kills the worker of the first unit while it works, as `kill -9` of its process would."""

    def __init__(self, ray, folder: Path):
        self.ray, self.folder, self.killed = ray, folder, []

    def __call__(self, function, units):
        stop = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(stop,))
        watcher.start()
        try:
            yield from map_units(partial(_noted, self.folder, function), units, engine="ray", folder=self.folder)
        finally:
            stop.set()
            watcher.join()

    def _watch(self, stop: threading.Event) -> None:
        while not stop.is_set() and not self.killed:
            for file in self.folder.glob("working-*"):
                pid = int(file.name.split("-")[1])
                os.kill(pid, signal.SIGKILL)
                self.killed.append(pid)
                return
            time.sleep(0.01)


def _noted(folder: Path, function, unit):
    """Do a unit; the first process of all says so, and gives the test the time to kill it half way."""
    first = not (folder / "first").exists()
    (folder / "first").touch()
    if first:
        (folder / f"working-{os.getpid()}").touch()
        time.sleep(0.5)
    with (folder / "units").open("a") as log:
        log.write(f"{function.func.__name__} {unit}\n")
    return function(unit)


def test_ray_writes_the_bytes_of_the_local_engine_and_a_killed_worker_costs_its_shard_only(
    ray_cluster, mini, trained_sae, topk_sae, small_cache, tmp_path
):
    notes, outs = tmp_path / "notes", [tmp_path / "first", tmp_path / "second"]
    notes.mkdir()
    options = {"n_tokens": 40_000, "windows_per_shard": 100, "context_size": 128}
    run_units = KillTheFirst(ray_cluster, notes)
    build_caches([load_sae(trained_sae), topk_sae], mini, "micro-italiano", outs, run_units=run_units, **options)
    assert len(run_units.killed) == 1
    here = build_cache(topk_sae, mini, "micro-italiano", tmp_path / "here", **options)
    assert digests(outs[0]) == digests(small_cache)
    assert digests(outs[1]) == digests(here)
    FeatureCache.open(outs[0], check=True)
    assert not list(tmp_path.rglob("*.tmp"))
    done = (notes / "units").read_text().splitlines()
    n_shards = len(read_json(outs[0] / "manifest.json")["shards"])
    shards = [line for line in done if line.startswith("encode_shard")]
    assert len(set(shards)) == n_shards and len(shards) <= n_shards + 1


def test_an_address_without_the_engine_is_refused(trained_sae, tmp_path, capsys):
    command = ["cache", "build", str(trained_sae), "--out", str(tmp_path / "x"), "--address", "head:6379"]
    assert main(command) == 2
    assert "--address head:6379 is that of a Ray cluster; add --engine ray" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
