"""Which k: the proxy by hand, the minimum with its interval, a planted dictionary, and the command from start to resume."""

import json
from types import SimpleNamespace

import torch

from sae_italian.benchmark.choose_k import SHARES, projections, recommend
from sae_italian.cli import main


def trial(k: int, seed: int, *values: float) -> dict:
    told = {"l0": k, "explained_variance": 0.5, "dead": 0.0, "auroc": {"sparse 1": 0.7, "sparse 20": 0.8}}
    return {"k": k, "seed": seed, **told, "projections": dict(zip(SHARES, values, strict=True))}


def test_the_projection_is_the_nth_largest_entry():
    sae = SimpleNamespace(W_dec=3 * torch.eye(16), b_dec=torch.ones(16))
    x = 1 + torch.arange(160.0).reshape(10, 16)  # projections 0 to 159, whatever the rows' length
    assert projections(sae, x) == {"d/8": 139.0, "d/4": 119.0, "d/2": 79.0}


def test_the_minimum_has_an_interval_and_an_end_has_none():
    curve = {4: 3.0, 8: 1.0, 16: 1.05, 32: 2.0, 64: 4.0}
    trials = [trial(k, seed, *(v + 0.1 * seed,) * 3) for k, v in curve.items() for seed in (0, 1)]
    found = recommend(trials, 1000)
    assert found.k is not None and 8 < found.k < 12 and found.lo < 8 and found.hi == 16, "16 is within one seed-sd"
    assert "Recommended" in found.table() and found.svg().startswith("<?xml")
    rising = [trial(k, 0, *(float(k),) * 3) for k in (8, 16, 32)]
    none = recommend(rising, 1000)
    assert none.k is None and "Not found, widen the grid" in none.why and "d/8: 8" in none.why
    apart = [trial(k, 0, abs(k - 8), abs(k - 32), abs(k - 32)) for k in (4, 8, 16, 32, 64)]
    assert recommend(apart, 1000).k is None and "do not agree" in recommend(apart, 1000).why


def test_the_command_trains_on_one_pass_resumes_and_refuses(tmp_path, capsys):
    words = ["sae.d_sae=64", "training_tokens=20_000", "seeds=2", "share=0.5", "card_tokens=2000"]
    run = ["choose-k", "mini/topk", *words, "--grid", "2,4,8", "--out", str(tmp_path / "k"), "--json"]
    assert main(run) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(t["k"], t["seed"]) for t in told["trials"]] == [(k, seed) for k in (2, 4, 8) for seed in (42, 43)]
    assert all(t["l0"] <= t["k"] and 0 < t["auroc"]["sparse 20"] <= 1 for t in told["trials"])
    assert told["trials"][-1]["explained_variance"] > told["trials"][0]["explained_variance"]
    assert told["n_tokens"] == 10_000 and (tmp_path / "k/choose-k.svg").is_file()
    assert main([*run, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"] == told["trials"]
    for bad, said in (
        (["--grid", "8,16"], "three or more"),
        (["--grid", "8,x,9"], "numbers"),
        (["share=2"], "share is 2"),
        (["seeds=0"], "seeds is 0"),
    ):
        assert main([*run[:2], *words, "--out", str(tmp_path / "new"), *bad]) == 2
        assert said in capsys.readouterr().err
