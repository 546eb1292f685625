"""Runs whose latents are spread over processes: the weights, numbers and folder of the run of the whole SAE, stopped or not."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from sae_italian.base.errors import UsageError
from sae_italian.saes import load_sae
from sae_italian.training import train
from sae_italian.training.loop import SAERun
from sae_italian.training.processes import check_joint
from sae_italian.training.run import check_run
from tests.training.forked import together
from tests.training.test_processes import apart, in_step, killed_and_resumed, resumed, weights
from tests.training.wandb_file import OfflineRun

SHARDED = {"shard_latents": True}


@pytest.fixture(scope="module")
def spec(small_spec):
    """Twenty steps in which latents die, saved at 5, 10, 15 and 20."""
    changes = {"training_tokens": 10_240, "checkpoint_every_tokens": 2560, "process_timeout_seconds": 20.0}
    sae = {"architecture": "sparse_topk", "start": "mean", "k": 4, "normalize_activations": "expected_average_only_in"}
    return small_spec.model_copy(update=changes | {"dead_feature_window": 3, "sae": {**small_spec.sae, **sae}})


@pytest.fixture(scope="module")
def exact(spec):
    return spec.model_copy(update={"sae": {**spec.sae, "dtype": "float64"}})


@pytest.fixture(scope="module")
def alone(exact, tmp_path_factory):
    return train(exact, tmp_path_factory.mktemp("alone") / "sae")


@pytest.mark.parametrize(
    ("n", "dtype"), [(2, "float64"), (2, "float32"), pytest.param(4, "float64", marks=pytest.mark.slow)]
)
def test_it_gives_the_weights_and_the_folder_of_the_whole_sae(exact, spec, alone, tmp_path, n, dtype):
    """Also its metrics, its frequencies and, at a pause, the whole state: Adam's averages and both counters."""
    given, out = (exact if dtype == "float64" else spec).model_copy(update=SHARDED), tmp_path / "sae"
    whole = alone if dtype == "float64" else train(spec, tmp_path / "whole")
    assert together(n, train, given, out) == [out] * n
    assert apart(out, whole) < (1e-9 if dtype == "float64" else 1e-5)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    rows, expected = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (out, whole)
    )
    assert rows == [pytest.approx(row, rel=1e-5) for row in expected]
    assert expected[-1]["sparsity/dead_features"] > 0 and expected[-1]["losses/auxiliary_reconstruction_loss"] > 0
    counts = [load_file(folder / "sparsity.safetensors")["sparsity"] for folder in (out, whole)]
    assert torch.equal(*counts)
    assert load_sae(out).cfg.to_dict() == load_sae(whole).cfg.to_dict()


def stopped_in_step(spec, out, step=8):
    """Train until a signal comes in a step: the state is saved."""
    own = SAERun.step

    def changed(self, batch):
        own(self, batch)
        if self.n_steps == step and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGTERM)

    SAERun.step = changed
    try:
        return train(spec, out)
    finally:
        SAERun.step = own


def state_of(out):
    (folder,) = (out / "checkpoints").iterdir()
    return folder, torch.load(folder / "sae/trainer_state.pt"), load_file(folder / "sae/sae_weights.safetensors")


def test_its_checkpoint_is_that_of_the_whole_sae(exact, tmp_path):
    assert "saved at 4,096 tokens" in together(1, stopped_in_step, exact, tmp_path / "whole")[0]
    told = together(2, stopped_in_step, exact.model_copy(update=SHARDED), tmp_path / "parts")
    assert told == ["KeyboardInterrupt: saved at 4,096 tokens; --resume continues"] * 2
    (one, state, tensors), (other, its, parts) = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (one, other)]
    assert files[0] == files[1] and state.keys() == its.keys()
    assert all(torch.allclose(tensors[name], parts[name], rtol=0, atol=1e-9) for name in tensors)
    for number, moments in state["optimizer"]["state"].items():
        for name, tensor in moments.items():
            found = its["optimizer"]["state"][number][name]
            assert torch.allclose(tensor, found, rtol=0, atol=1e-12) and tensor.stride() == found.stride()
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(state[name], its[name])
    same = set(state) - {"optimizer", "act_freq_scores", "n_forward_passes_since_fired"}
    assert {name: state[name] for name in same} == {name: its[name] for name in same}


WAYS = {"apart, then whole": ((2, True), (1, False)), "whole, then apart": ((1, False), (2, True))}
WAYS |= {"apart, then replicas": ((2, True), (2, False)), "two, then four": ((2, True), (4, True))}


@pytest.mark.parametrize("way", list(WAYS)[:2] + [pytest.param(way, marks=pytest.mark.slow) for way in list(WAYS)[2:]])
def test_it_resumes_with_any_number_sharded_or_not(exact, alone, tmp_path, way):
    (n, sharded), (then, and_then) = WAYS[way]
    out = tmp_path / "sae"
    told = together(n, stopped_in_step, exact.model_copy(update={"shard_latents": sharded}), out)
    assert told == ["KeyboardInterrupt: saved at 4,096 tokens; --resume continues"] * n
    assert together(then, resumed, exact.model_copy(update={"shard_latents": and_then}), out) == [out] * then
    assert apart(out, alone) < 1e-9
    assert json.loads((out / "run.json").read_text())["spec"]["shard_latents"] is and_then


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_is_named_and_its_training_resumes_to_the_same_bits(spec, tmp_path, monkeypatch, rank):
    given = spec.model_copy(update=SHARDED)
    assert together(2, train, given, tmp_path / "two") == [tmp_path / "two"] * 2
    in_step(monkeypatch, rank, 7, lambda run: os.kill(os.getpid(), signal.SIGKILL))
    killed_and_resumed(given, None, tmp_path / "sae", 2, rank)
    monkeypatch.undo()
    assert together(2, resumed, given, tmp_path / "sae") == [tmp_path / "sae"] * 2
    two = weights(tmp_path / "two")
    assert all(torch.equal(tensor, two[name]) for name, tensor in weights(tmp_path / "sae").items())


def test_wandb_and_evaluations_on_the_way_are_of_the_whole_sae(exact, tmp_path):
    """W&B, at rank 0 alone, holds the rows, the card and the artifacts of one process; each evaluation is of all latents."""
    changes = {
        "wandb": "offline",
        "wandb_checkpoints": True,
        "evaluate_every_tokens": 5120,
        "evaluate_tokens": 500,
        "process_timeout_seconds": 300.0,
    }
    given, whole, out = exact.model_copy(update=changes), tmp_path / "whole", tmp_path / "sae"
    assert (
        together(2, train, given.model_copy(update=SHARDED), out, seconds=300) == [out] * 2
    )  # forked before W&B starts
    train(given, whole)
    one, two = OfflineRun(whole), OfflineRun(out)
    assert two.exit_code == 0 and sorted(two.artifacts) == sorted(one.artifacts)
    assert [row.keys() for row in two.rows] == [row.keys() for row in one.rows]
    judged = [
        [row["eval/explained_variance"] for row in run.rows if "eval/explained_variance" in row] for run in (one, two)
    ]
    assert len(judged[0]) == 2 and judged[1] == pytest.approx(judged[0], rel=1e-5)  # at half, and at the end
    assert load_sae(out).cfg.d_sae == 256


def test_what_the_processes_share_is_compared_and_a_bad_weight_of_one_stops_all(spec, tmp_path, monkeypatch):
    given = spec.model_copy(update=SHARDED)

    def flip(name, value):
        def do(run):
            with torch.no_grad():
                getattr(run.sae, name).flatten()[3] += value

        return do

    in_step(monkeypatch, 1, 5, flip("b_dec", 1e-7))
    for told in together(2, train, given, tmp_path / "sae"):
        assert "after 5 steps the weights of ranks [1] are not those of rank 0" in told
    monkeypatch.undo()
    in_step(monkeypatch, 1, 5, flip("b_enc", torch.nan))
    first, second = together(2, train, given, tmp_path / "other")
    assert "a weight elsewhere is no longer finite at step 4: the training has diverged" in first
    assert "b_enc is no longer finite at step 4: the training has diverged" in second
    assert not list(tmp_path.glob("*/checkpoints/*"))


def test_what_cannot_be_sharded_is_refused_by_name(spec, tmp_path):
    given = spec.model_copy(update=SHARDED)

    def of(**sae):
        return given.model_copy(update={"sae": {**spec.sae, **sae}})

    with pytest.raises(UsageError, match="architecture is 'topk'; latents are sharded with sparse_topk alone"):
        train(of(architecture="topk"), tmp_path / "sae")
    with pytest.raises(UsageError, match="shard_latents is for several processes, as --processes 4"):
        train(given, tmp_path / "sae")
    with pytest.raises(UsageError, match="d_sae is 256, which 3 processes cannot share equally"):
        check_joint(given, 3)
    check_joint(of(k=60), 8)  # fewer latents each than are kept of all
    with pytest.raises(UsageError, match="k falls from d_in, 128, but each of 4 processes has 64 latents"):
        check_joint(given.model_copy(update={"k_anneal_share": 0.5}), 4)
    with pytest.raises(UsageError, match="seeds is 2; several processes train one seed"):
        check_joint(given.model_copy(update={"seeds": 2}), 2)
    with pytest.raises(UsageError, match="from_pretrained_path goes with neither shard_latents"):
        check_run(given.model_copy(update={"from_pretrained_path": str(tmp_path)}))
    assert not (tmp_path / "sae").exists()
