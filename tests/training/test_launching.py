"""The commands that start several processes: `--processes N`, torchrun, Ray Train."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_italian.cli import main

SETTINGS = [
    *("training_tokens=40960", "sae.d_sae=256", "train_batch_size_tokens=512", "buffer_tokens=4096"),
    *("store_batch_size_prompts=8", "lr_warm_up_steps=5", "lr_decay_steps=10", "checkpoint_every_tokens=5120"),
    *("dead_feature_window=10", "process_timeout_seconds=30"),
]
TRAIN = ["train", "mini/topk", *SETTINGS]
COMMAND = [sys.executable, "-m", "sae_italian.cli", *TRAIN]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sae_italian.cli", *TRAIN]


def start(command: list[str], out: Path, *more: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen([*command, "--out", str(out), *more], env=env, **pipes)


def running(out: Path) -> dict[int, int]:
    """Return the number of each process that trains into a folder, by rank."""
    found = {}
    for each in Path("/proc").iterdir():
        try:
            if each.name.isdigit() and str(out).encode() in (each / "cmdline").read_bytes():
                words = (each / "environ").read_bytes()
                if rank := re.search(rb"\0RANK=(\d+)", words):
                    found[int(rank[1])] = int(each.name)
        except OSError:
            continue
    return found


def until_saved(process: subprocess.Popen, out: Path) -> None:
    began = time.monotonic()
    while not list(out.glob("checkpoints/[0-9]*")):
        assert process.poll() is None and time.monotonic() - began < 300, process.communicate()
        time.sleep(0.02)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae_weights.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """What `train --processes 2` gives when nothing happens; the command prints one result."""
    out = tmp_path_factory.mktemp("whole") / "sae"
    process = start(COMMAND, out, "--processes", "2", "--json")
    told, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert told.split() == ["{", '"sae":', f'"{out}"', "}"] and "Traceback" not in errors
    return out


def test_processes_are_refused_where_they_cannot_be(tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "sae")]
    assert main([*TRAIN, *out, "--processes", "600"]) == 2
    assert "600 processes share a batch of 512 tokens" in capsys.readouterr().err
    assert main([*TRAIN, *out, "--engine", "ray"]) == 2 and "takes --processes" in capsys.readouterr().err
    assert main(["train", "mini/suite", *out, "--processes", "2"]) == 2 and "--workers" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*TRAIN, *out, "--processes", "2"]) == 2 and "Leave --processes out" in capsys.readouterr().err
    assert not (tmp_path / "sae").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_named_by_the_command_and_resume_loses_nothing(whole, tmp_path, rank):
    out = tmp_path / "sae"
    process = start(COMMAND, out, "--processes", "2")
    until_saved(process, out)
    os.kill(running(out)[rank], signal.SIGKILL)
    killed = time.monotonic()
    errors = process.communicate(timeout=60)[1]
    assert time.monotonic() - killed < 30 and process.returncode == 2
    assert f"rank {rank} of 2 was ended by SIGKILL" in errors and "Traceback" not in errors and not running(out)
    process = start(COMMAND, out, "--processes", "2", "--resume")
    assert process.communicate(timeout=400) and process.returncode == 0
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(whole).items())


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["command", "rank 1"])
def test_a_signal_saves_and_stops_all_with_one_line(whole, tmp_path, whom):
    out = tmp_path / "sae"
    process = start(COMMAND, out, "--processes", "2")
    until_saved(process, out)
    os.kill(process.pid if whom == "command" else running(out)[1], signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and not running(out)
    assert re.search(r"stopped; saved at [\d,]+ tokens; --resume continues", errors) and "Traceback" not in errors
    process = start(COMMAND, out, "--resume")  # by one process
    assert process.communicate(timeout=400) and process.returncode == 0
    assert max(float((weights(out)[name] - w).abs().max()) for name, w in weights(whole).items()) < 1e-3


@pytest.mark.slow
def test_the_same_command_under_torchrun_gives_the_same_bits(whole, tmp_path):
    process = start(TORCHRUN, tmp_path / "sae")
    told = process.communicate(timeout=400)
    assert process.returncode == 0, told
    assert told[0].count("SAE: ") == 1
    assert all(torch.equal(tensor, weights(tmp_path / "sae")[name]) for name, tensor in weights(whole).items())


@pytest.mark.slow
def test_ray_train_gives_the_same_bits(whole, tmp_path):
    process = start(COMMAND, tmp_path / "sae", "--processes", "2", "--engine", "ray")
    told = process.communicate(timeout=500)
    assert process.returncode == 0, told
    assert all(torch.equal(tensor, weights(tmp_path / "sae")[name]) for name, tensor in weights(whole).items())
    process = start(COMMAND, tmp_path / "sae", "--processes", "2", "--engine", "ray")
    errors = process.communicate(timeout=500)[1]
    assert process.returncode == 2 and "already holds a train run" in errors, errors
