"""`make bench TABLE=gpu` goes its whole way on the CPU, so that the first run on a GPU does not fail on a slip."""

import json
import signal
import time

import pytest
import torch

from tests.bench import gpu
from tests.bench.__main__ import main
from tests.bench.gpu import FusedEncoder
from tests.bench.training import BARE, OURS, SAELENS


def test_the_whole_table_with_small_sizes(tmp_path, capsys):
    out = tmp_path / "found.json"
    assert main(["gpu", "device=cpu", "small=true", f"out={out}"]) == 0
    told, found = capsys.readouterr().out, json.loads(out.read_text())
    assert not found["failed"], found["failed"]
    steps = [row for row in found["rows"] if "ms" in row]
    assert [row["way"] for row in steps[:4]] == [OURS, SAELENS, gpu.SPARSIFY, BARE] and len(steps) == 8
    assert all(row["ms"] > 0 for row in steps) and f"| 4 | {OURS} |" in told and "| 1.00 |" in told
    assert {row["way"] for row in found["rows"][8:]} == {"train", "cache build"} and "tokens/s" in told


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu"]) == 2 and "no GPU is here" in capsys.readouterr().err
    assert main(["gpu", "device=tpu"]) == 2 and "must be cuda or cpu" in capsys.readouterr().err


def test_a_part_that_fails_leaves_the_others(monkeypatch, tmp_path):
    measured = gpu.measure_way

    def broken(name, *rest):
        if name == SAELENS:
            raise RuntimeError("out of memory")
        return measured(name, *rest)

    monkeypatch.setattr(gpu, "measure_way", broken)
    monkeypatch.setattr(gpu, "measure_run", lambda *_: [{"way": "train", "tokens_per_second": 1.0}])
    found, text = gpu.bench_gpu(["device=cpu", "small=true", f"out={tmp_path / 'o.json'}"])
    assert list(found["failed"]) == [f"k 4: {SAELENS}", f"k 8: {SAELENS}"] and len(found["rows"]) == 7
    assert f"NOT measured: k 4: {SAELENS}: RuntimeError: out of memory" in text
    late, _ = gpu.bench_gpu(["device=cpu", "small=true", "minutes=0", f"out={tmp_path / 'o.json'}"])
    assert all("minutes were over" in why for why in late["failed"].values()) and len(late["failed"]) == 9


def test_a_part_without_end_is_stopped_and_the_command_ends(monkeypatch, tmp_path):
    def endless(*_):
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # what a training does on its way: it must not swallow the alarm
                continue

    monkeypatch.setattr(gpu, "measure_run", endless)
    monkeypatch.setattr(gpu, "measure_way", lambda name, *_: [{"way": name, "k": 4, "ms": 1.0, "peak_gb": None}])
    monkeypatch.setattr(gpu.gc, "collect", lambda: 0)  # takes as long as the minutes of this test
    before, started = signal.getsignal(signal.SIGALRM), time.monotonic()
    found, text = gpu.bench_gpu(["device=cpu", "small=true", "minutes=0.02", f"out={tmp_path / 'o.json'}"])
    assert time.monotonic() - started < 30 and len(found["rows"]) == 8
    assert found["failed"] == {"whole run": "0.02 minutes were over"} and "NOT measured: whole run" in text
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_sparsifys_way_has_the_gradients_of_the_plain_one():
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((20, 6), (40, 6), (40,))
    )
    (FusedEncoder.apply(x, weight, bias, 5)[0] ** 2).sum().backward()
    ours = [tensor.grad.clone() for tensor in (x, weight, bias)]  # pyright: ignore[reportOptionalMemberAccess]
    for tensor in (x, weight, bias):
        tensor.grad = None
    (torch.relu(x @ weight.T + bias).topk(5).values ** 2).sum().backward()
    for mine, tensor in zip(ours, (x, weight, bias), strict=True):
        assert tensor.grad is not None and torch.allclose(mine, tensor.grad)


@pytest.mark.parametrize("name", ["FULL", "SMALL"])
def test_sizes_belong_together(name):
    sizes = getattr(gpu, name)
    assert all(shape.d_sae > shape.k for shape in sizes.steps) and sizes.buffer >= sizes.batch
    assert sizes.layer < sizes.model["num_hidden_layers"] and sizes.context <= 4096
