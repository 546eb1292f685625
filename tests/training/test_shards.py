"""Latents spread over processes: the whole SAE's steps, the bytes that the arithmetic says, and what a dry run plans."""

import json

import pytest
import torch
import torch.distributed as dist
from sae_lens import TrainingSAE

from sae_italian.base.errors import UsageError
from sae_italian.training import load_spec
from sae_italian.training.shards import sharded, traffic
from sae_italian.training.suite import layout_on, memory_of
from tests import fresh
from tests.training.shard_steps import BATCH, D_IN, STEPS, K

CASES = [
    {"dtype": "float64"},
    {"dtype": "float64", "rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False},
    {"dtype": "float64", "k": 48, "start": "zero"},  # more than a quarter of the latents
    {"dtype": "float32"},
    {"dtype": "float64", "k": 48, "start": "zero", "silent": 8},  # dead latents of the first process alone
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `shard_steps.py` tells of each case, with 2 and with 4 processes."""
    given = [str(tmp_path_factory.mktemp("shards")), json.dumps(CASES)]
    done = fresh.run(["-m", "tests.training.shard_steps", *given])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("world", [2, 4])
def test_processes_take_the_steps_of_the_whole_sae(trained, case, world):
    """Ten steps with Adam and clipping, latents dying on the way."""
    told = trained[2 * case + (world == 4)]
    assert told["world"] == world and told["agree"] and told["counters"]
    assert told["away"] < (1e-9 if CASES[case]["dtype"] == "float64" else 1e-6)
    assert told["loss"] < (1e-9 if CASES[case]["dtype"] == "float64" else 1e-5)
    if "k" not in CASES[case]:
        assert told["dead"][-1] > 0 and told["auxiliary"] > 0
    assert [sum(parts) for parts in zip(*told["dead_by_part"], strict=True)] == told["dead"]
    if "silent" in CASES[case]:
        first, *others = (parts[-1] for parts in told["dead_by_part"])
        assert first > 0 and others == [0] * (world - 1) and told["auxiliary"] > 0


@pytest.mark.parametrize("world", [2, 4])
def test_the_bytes_of_a_step_are_those_of_the_arithmetic(trained, world):
    told = trained[2 * 3 + (world == 4)]
    for dead, sent in zip(told["dead"], told["sent"], strict=True):
        expected = traffic(BATCH, D_IN, K, world, dead=dead > 0)
        assert {kind: sent[kind] for kind in expected} == expected
        assert sent["small"] == 4 * D_IN + 4 + 8  # b_dec's gradient, the norm, the number of the dead
    assert len(told["sent"]) == STEPS


def test_bytes_at_the_size_of_the_reference():
    """4,096 tokens, d_in 2,048, k 64: 70 MB as its page says, whatever d_sae; replicas of 65,536 latents: 1.07 GB."""
    found = traffic(4096, 2048, 64, 8, dead=False)
    whole_batch = 4 * 4096 * 2048
    assert found == {"gather": whole_batch // 8 + 4 * 4096 * 64, "add": whole_batch}
    received = (
        8 * found["gather"] - 7 * 4 * 4096 * 64 + found["add"]
    )  # the tokens of all, the reconstruction, own scores
    assert received == pytest.approx(68e6, rel=0.01)
    more = traffic(4096, 2048, 64, 8, dead=True)
    assert more["add"] - found["add"] == whole_batch and more["gather"] - found["gather"] == 4 * 4096 * 1024


def test_latents_that_cannot_be_shared_out_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    values = {"architecture": "sparse_topk", "d_in": 8, "d_sae": 64, "k": 4}
    with pytest.raises(UsageError, match="d_sae is 64, which 3 processes cannot share equally"):
        sharded(TrainingSAE.from_dict(values))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="reshape_activations"):
        sharded(TrainingSAE.from_dict(values | {"reshape_activations": "hook_z"}))  # pyright: ignore[reportArgumentType]


def test_eight_processes_take_their_own_rows():
    """Who holds what, with PyTorch's fake process group: any rank of eight in this process."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.manual_seed(0)
    sae = TrainingSAE.from_dict({"architecture": "sparse_topk", "d_in": 8, "d_sae": 64, "k": 4})
    for rank in range(8):
        dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
        try:
            part = sharded(sae)  # pyright: ignore[reportArgumentType]
        finally:
            dist.destroy_process_group()
        own = slice(8 * rank, 8 * rank + 8)
        assert torch.equal(part.W_dec, sae.W_dec[own]) and torch.equal(part.W_enc, sae.W_enc[:, own])  # pyright: ignore
        assert part.b_enc.shape == (8,) and torch.equal(part.b_dec, sae.b_dec) and part.cfg.d_sae == 8  # pyright: ignore


def test_a_dry_run_says_which_layout_a_config_needs():
    """d_sae 262,144 at d_in 128: 4 copies of 4 bytes of two matrices, 1.07 GB, and the scores of a batch, 2.1 GB."""
    spec = load_spec("mini/topk", "sae.architecture=sparse_topk", "sae.d_sae=262144", "sae.k=32")
    memory = memory_of([spec])
    assert layout_on(24, spec, memory)["layout"] == "replicas"
    small = layout_on(2, spec, memory)
    assert (small["layout"], small["devices"]) == ("sharded", 2)
    assert "latents sharded over 2 (shard_latents=true --processes 2)" in small["text"]
    rest = sum(memory.values()) - memory["saes_gb"] - memory["step_gb"]
    assert small["memory_gb"] == pytest.approx(rest + (memory["saes_gb"] + memory["step_gb"]) / 2)
    stock = load_spec("mini/topk", "sae.architecture=topk", "sae.d_sae=262144", "sae.k=32")
    assert "only sparse_topk can be sharded" in layout_on(2, stock, memory_of([stock]))["text"]
