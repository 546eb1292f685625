"""One SAE in several processes: the same training whatever their number, and what they say when one of them fails.

The processes are forked from this one, which has everything imported; the commands are run in `test_launching`.
"""

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sae_italian.base.errors import UsageError
from sae_italian.saes import architectures
from sae_italian.training import ActivationStream, train
from sae_italian.training import processes as room
from sae_italian.training.logging import RunLog
from sae_italian.training.loop import SAERun
from sae_italian.training.processes import ALONE, JOINT, Processes, joined
from tests.training.forked import free_port, together

SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"]


def in_step(monkeypatch, rank: int, at_step: int, do) -> None:
    """Let one of the processes do something after a step."""
    step = SAERun.step

    def changed(self, batch):
        step(self, batch)
        if os.environ.get("RANK") == str(rank) and self.n_steps == at_step:
            do(self)

    monkeypatch.setattr(SAERun, "step", changed)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae_weights.safetensors")


def apart(one: Path, other: Path) -> float:
    """Return the largest difference of two SAEs' weights."""
    a, b = weights(one), weights(other)
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.fixture(scope="module")
def spec(small_spec):
    changes = {"training_tokens": 10_240, "checkpoint_every_tokens": 2560, "process_timeout_seconds": 20.0}
    changes |= {"dead_feature_window": 3, "sae": {**small_spec.sae, "architecture": "sparse_topk", "start": "mean"}}
    return small_spec.model_copy(update=changes)


@pytest.fixture(scope="module")
def exact(spec):
    return spec.model_copy(update={"sae": {**spec.sae, "dtype": "float64"}})


@pytest.fixture(scope="module")
def alone(exact, tmp_path_factory) -> Path:
    return train(exact, tmp_path_factory.mktemp("alone") / "sae")


@pytest.fixture(scope="module")
def two(spec, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two") / "sae"
    assert together(2, train, spec, out) == [out, out]
    return out


def test_the_hash_of_a_training_is_of_its_scale_its_weights_and_its_counters():
    def trainer(scale: float | None = None, weight=1.0, fired=0.0, rate=0.0):
        return SimpleNamespace(
            activation_scaler=SimpleNamespace(scaling_factor=scale),
            sae=SimpleNamespace(state_dict=lambda: {"W": torch.full((2, 2), weight)}),
            n_forward_passes_since_fired=torch.tensor([fired]),
            act_freq_scores=torch.tensor([rate]),
        )

    different = [{}, {"scale": 2.0}, {"weight": 2.0}, {"fired": 1.0}, {"rate": 1.0}]
    assert len({room._hash_of(trainer(**each)) for each in different}) == len(different)
    assert room._hash_of(trainer(scale=2.0)) == room._hash_of(trainer(scale=2.0))


# --- the same whatever their number -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_gives_the_full_batch_in_float64(exact, alone, tmp_path, n):
    """512 rows a batch: three processes have 171, 171 and 170. Metrics and frequencies are those of the whole batch too."""
    assert together(n, train, exact, tmp_path / "sae") == [tmp_path / "sae"] * n
    assert apart(tmp_path / "sae", alone) < 1e-12
    rows, expected = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "sae", alone)
    )
    assert rows == [pytest.approx(row, rel=1e-5) for row in expected]
    counts = [load_file(folder / "sparsity.safetensors")["sparsity"] for folder in (tmp_path / "sae", alone)]
    assert torch.equal(*counts)
    assert json.loads((tmp_path / "sae/run.json").read_text())["spec"] == exact.model_dump(mode="json")


def test_in_float32_it_is_the_full_batch_to_rounding(spec, two, tmp_path):
    """To 1e-6 here; on longer runs until two latents of a token are nearly equal and the other one is kept."""
    assert 0 < apart(two, train(spec, tmp_path / "sae")) < 1e-5


def test_two_processes_give_the_bits_of_two_micro_batches(spec, two, tmp_path, monkeypatch):
    """The step is written out here: two halves' losses, their gradients added, SAELens' clip and optimiser."""
    from sae_lens.saes.sae import TrainStepInput

    def step(self, batch):
        trainer, sae, rows = self.trainer, self.sae, self.trainer.activation_scaler(self._beside(batch))
        if self.n_steps == 0:
            architectures.start_at(sae, TrainStepInput(rows, {}, None, 0, False))
            sae.cfg.start = "zero"
        dead, fired = trainer.dead_neurons, torch.zeros(sae.cfg.d_sae)
        for half in rows.split(256):
            output = sae.training_forward_pass(TrainStepInput(half, {}, dead, self.n_steps, False))
            (output.loss / 2).backward()
            fired += output.feature_acts.to_dense().bool().sum(0)
        trainer.n_forward_passes_since_fired = torch.where(fired > 0, 0, trainer.n_forward_passes_since_fired + 1)
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        for part in (trainer.optimizer.step, trainer.optimizer.zero_grad, trainer.lr_scheduler.step):
            part()
        trainer.n_training_samples += 512
        trainer.n_training_steps += 1
        trainer.act_freq_scores, trainer.n_frac_active_samples = trainer.act_freq_scores + fired, 512 * self.n_steps

    monkeypatch.setattr(SAERun, "step", step)
    monkeypatch.setattr(SAERun, "row", lambda self: dict.fromkeys(ROW, 0.0))
    halves = train(spec, tmp_path / "halves")
    assert all(torch.equal(tensor, weights(two)[name]) for name, tensor in weights(halves).items())


ROW = ("metrics/explained_variance", "sparsity/dead_features")


def test_without_the_sum_of_the_counters_it_is_another_training(exact, alone, tmp_path, monkeypatch):
    """The control: each process then has dead latents of its own, while the weights still agree between them."""
    monkeypatch.setattr(Processes, "check_equal", lambda *_: None)
    monkeypatch.setattr(Processes, "_count", count_alone)
    assert together(2, train, exact, tmp_path / "sae") == [tmp_path / "sae"] * 2
    assert apart(tmp_path / "sae", alone) > 1e-6


def count_alone(self, trainer, before):
    trainer.act_freq_scores = before + trainer.act_freq_scores


ARCHITECTURES = {
    "standard": {"l1_coefficient": 0.1},
    "gated": {"l1_coefficient": 0.1},
    "topk": {"k": 8, "normalize_activations": "expected_average_only_in"},
    "abstopk": {"k": 8},
    "batchtopk": {"k": 8},
    "matryoshka_batchtopk": {"k": 8, "matryoshka_widths": [32, 128], "use_matryoshka_aux_loss": True},
    "jumprelu": {"l0_coefficient": 0.1},
    "matching_pursuit": {"max_iterations": 3},
    "tied": {},
    "sparse_topk": {"k": 8, "normalize_activations": "covariance_whitening", "start": "mean"},
    "topk_transcoder": {"k": 8},
    "transcoder": {"l1_coefficient": 0.1},
}


def stepped(specs, model, batches, out) -> None:
    """Take steps with every architecture, and write the weights that each has then."""
    with joined(next(iter(specs.values()))) as processes:
        for name, spec in specs.items():
            run = SAERun(spec, model, out, processes)
            for batch in batches:
                run.step(batch)
            processes.check_equal(run)
            found = [run.sae.state_dict(), run.row()]
            if processes.first:
                torch.save(found, out / name)


def test_every_architecture_gives_the_full_batch(exact, mini, tmp_path):
    """BatchTopK's threshold is that of the whole batch: 12.5 % of the rows are five times as long, all in one process."""
    assert set(ARCHITECTURES) == set(JOINT)
    torch.manual_seed(0)
    scale = torch.where(torch.arange(64) < 8, 5.0, 1.0)[:, None]
    hooks = ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out")
    batches = [{hook: torch.randn(64, mini.config.hidden_size) * scale for hook in hooks} for _ in range(6)]
    few = {"dead_feature_window": 2, "training_tokens": 384, "train_batch_size_tokens": 64}
    few |= {"lr_warm_up_steps": 0, "lr_decay_steps": 0}
    specs = {}
    for name, own in ARCHITECTURES.items():
        sae = {"architecture": name, "d_sae": 256, "dtype": "float64", **own}
        target = {"hook_name_out": hooks[1]} if "transcoder" in name else {}
        specs[name] = exact.model_copy(update={"sae": sae, "hook_name": hooks[0], **few, **target})
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    stepped(specs, mini, batches, tmp_path / "one")
    assert together(2, stepped, specs, mini, batches, tmp_path / "two") == [None, None]
    for name in specs:
        (one, row), (other, its) = (torch.load(tmp_path / part / name) for part in ("one", "two"))
        most = 1e-6 if name == "jumprelu" else 1e-12  # SAELens keeps its thresholds in float32
        assert all(torch.allclose(one[key], other[key], rtol=0, atol=most) for key in one), name
        assert its == pytest.approx(row, rel=1e-5, nan_ok=True), name


def first_batches(model, corpus, **settings) -> list[torch.Tensor]:
    processes = settings.pop("processes", ALONE)
    stream = ActivationStream(model, corpus, "blocks.1.hook_resid_post", **settings, processes=processes)
    return [next(stream) for _ in range(6)]


def batches_in(spec, model, corpus, settings) -> list:
    with joined(spec) as processes:
        return [batch.numpy() for batch in first_batches(model, corpus, **settings, processes=processes)]


@pytest.mark.parametrize("text", ["long", "short"])
def test_the_batches_are_the_same_bits_whatever_the_number(spec, mini, jsonl, tmp_path, text):
    """Also for a corpus of fewer blocks of windows than processes, which is read again and again."""
    from sae_italian.training.text import documents_of

    if text == "short":
        (tmp_path / "a.txt").write_text("\n\n".join(f"La casa numero {i} è bella e grande." for i in range(20)))
    corpus = documents_of(str(jsonl if text == "long" else tmp_path / "a.txt"))
    settings = {"context_size": 32, "batch_size": 64, "forward_windows": 4, "buffer_tokens": 512, "seed": 3}
    expected = first_batches(mini, corpus, **settings)
    for found in together(3, batches_in, spec, mini, corpus, settings):
        assert all((one == other.numpy()).all() for one, other in zip(found, expected, strict=True))


# --- stopped and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_to_any_of_them_saves_and_stops_all(exact, alone, tmp_path, monkeypatch, name):
    """Resumed by another number of processes, the training ends as one that was never stopped."""
    n = SIGNALS.index(name) % 3 + 1
    in_step(monkeypatch, 1, 8, lambda run: os.kill(os.getpid(), getattr(signal, name)))
    stopped = together(2, train, exact, tmp_path / "sae")
    assert stopped == ["KeyboardInterrupt: saved at 4,096 tokens; --resume continues"] * 2
    monkeypatch.undo()
    assert set(together(n, resumed, exact, tmp_path / "sae")) == {tmp_path / "sae"}
    assert apart(tmp_path / "sae", alone) < 1e-12
    steps = [json.loads(line)["step"] for line in (tmp_path / "sae/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 10] and not (tmp_path / "sae/checkpoints").exists()


def resumed(spec, out):
    return train(spec, out, resume=True)


def killed_and_resumed(spec, two, out, n: int, kill) -> None:
    """Kill one of the processes; the others must say so at once and in one line, and the resumed run must lose nothing."""
    began = time.monotonic()
    found = together(n, train, spec, out)
    others = [told for told in found if told is not None]
    assert len(others) == n - 1 and time.monotonic() - began < 30 + 10
    assert all("UsageError: rank" in told and "--resume continues" in told and "\n" not in told for told in others), (
        found
    )
    assert all(f"rank {kill} of {n} was ended or hangs" in told for told in others), found


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_named_and_its_training_resumes_to_the_same_bits(spec, two, tmp_path, monkeypatch, rank):
    in_step(monkeypatch, rank, 7, lambda run: os.kill(os.getpid(), signal.SIGKILL))
    killed_and_resumed(spec, two, tmp_path / "sae", 2, rank)
    monkeypatch.undo()
    assert together(2, resumed, spec, tmp_path / "sae") == [tmp_path / "sae"] * 2
    assert all(torch.equal(tensor, weights(two)[name]) for name, tensor in weights(tmp_path / "sae").items())


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["replicas", "sharded"])
def test_ten_kills_at_random_moments(spec, two, tmp_path, monkeypatch, sharded):
    """Of any one of two: twice by the clock, while it joins or reads, then from a step on: it steps, sends, gathers or saves."""
    given, expected, random = spec.model_copy(update={"shard_latents": sharded}), two, Random(0)
    if sharded:
        expected = tmp_path / "two"
        assert together(2, train, given, expected) == [expected] * 2

    def kill_in(seconds):
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def killed(given, out, rank):
        if os.environ["RANK"] == str(rank):
            kill_in(random.uniform(0.01, 0.3))
        return train(given, out)

    n_saved = 0
    for number in range(10):
        rank, at, delay, out = (
            random.randrange(2),
            random.randrange(20),
            random.uniform(1e-6, 0.05),
            tmp_path / f"{number}",
        )
        began = time.monotonic()
        if number < 2:
            found = together(2, killed, given, out, rank)
        else:
            in_step(monkeypatch, rank, at, lambda run, delay=delay: kill_in(delay))
            found = together(2, train, given, out)
            monkeypatch.undo()
        told = found[1 - rank]
        assert found[rank] is None and time.monotonic() - began < 30 and "\n" not in told, found
        assert any(sign in told for sign in ("of 2 was ended or hangs", "does not reach", "not all 2")), found
        n_saved += (out / "checkpoints").exists()
        assert together(2, resumed, given, out) == [out] * 2
        assert all(torch.equal(tensor, weights(expected)[name]) for name, tensor in weights(out).items()), (rank, at)
    assert n_saved >= 5, "most of them go on from a checkpoint"


def refused_at(spec, out):
    with pytest.raises(UsageError, match="fills no window"):
        train(spec, out)
    return time.monotonic()


def test_what_all_refuse_rank_0_says_before_the_others(spec, tmp_path):
    """The launcher tells the line of the first that fails, and that of rank 0 is on the terminal already: two lines of one."""
    (tmp_path / "a.txt").write_text("Ciao.")
    first, second = together(
        2, refused_at, spec.model_copy(update={"corpus": str(tmp_path / "a.txt")}), tmp_path / "sae"
    )
    assert second - first > 1


@pytest.mark.slow
def test_the_others_wait_for_the_first_to_open_its_log(spec, two, tmp_path, monkeypatch):
    """W&B may take longer than `process_timeout_seconds`, in which a process that steps must answer."""

    @contextlib.contextmanager
    def slow(log):
        time.sleep(15)
        yield

    monkeypatch.setattr(RunLog, "to_wandb", slow)
    impatient = spec.model_copy(update={"process_timeout_seconds": 8.0})
    assert together(2, train, impatient, tmp_path / "sae") == [tmp_path / "sae"] * 2
    assert apart(tmp_path / "sae", two) == 0


def test_a_process_that_hangs_is_named(spec, tmp_path, monkeypatch):
    in_step(monkeypatch, 2, 3, lambda run: time.sleep(60))
    impatient = spec.model_copy(update={"process_timeout_seconds": 5.0})
    found = together(3, train, impatient, tmp_path / "sae", hangs=2)
    assert all("rank 2 of 3 was ended or hangs" in told for told in found[:2]) and found[2] == "nothing", found


def test_a_full_disk_stops_all_and_is_told_where_it_is_full(spec, tmp_path, monkeypatch):
    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SAERun, "save", full)
    told, other = together(2, train, spec, tmp_path / "sae")
    assert "GiB free" in told and "Make room" in told and "rank 0 of 2 was ended" in other


def test_weights_that_part_are_never_saved(spec, tmp_path, monkeypatch):
    def flip(run):
        with torch.no_grad():
            run.sae.W_dec[3, 5] += 1e-7

    in_step(monkeypatch, 1, 4, flip)
    found = together(2, train, spec, tmp_path / "sae")
    assert all("after 5 steps the weights of ranks [1] are not those of rank 0" in told for told in found), found
    assert not list((tmp_path / "sae").glob("checkpoints/*"))


# --- refused ----------------------------------------------------------------------------------------------------------


def test_processes_that_differ_are_refused(spec, tmp_path, monkeypatch):
    versions = room.package_versions()

    def other_config(spec):
        lr = 0.5 if os.environ["RANK"] == "1" else spec.lr
        return train(spec.model_copy(update={"lr": lr}), tmp_path / "sae")

    def other_torch(spec):
        wrong = {"torch": "1.0"} if os.environ["RANK"] == "1" else {}
        monkeypatch.setattr(room, "package_versions", lambda: versions | wrong)
        return train(spec, tmp_path / "sae")

    for told in together(2, other_config, spec):
        assert "rank 1 on" in told and "config.lr was 0.006, of rank 1 is 0.5" in told
    for told in together(2, other_torch, spec):
        assert f"versions.torch was '{versions['torch']}', of rank 1 is '1.0'" in told
    assert not (tmp_path / "sae").exists()


def test_one_that_never_comes_and_a_port_in_use_are_told_in_one_line(spec, tmp_path):
    hasty, began = spec.model_copy(update={"process_timeout_seconds": 2.0}), time.monotonic()
    port = free_port()
    (told,) = together(1, in_world_of_two, hasty, tmp_path / "sae", port=port)
    assert f"not all 2 processes came to 127.0.0.1:{port} within 2 s" in told and time.monotonic() - began < 20
    (told,) = together(2, train, hasty, tmp_path / "sae", first=1)
    assert "rank 1 of 2 does not reach rank 0 at 127.0.0.1:" in told and "\n" not in told
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        told = together(1, in_world_of_two, hasty, tmp_path / "sae", port=sock.getsockname()[1])[0]
    assert "is in use on this machine" in told
    assert not (tmp_path / "sae").exists()


def in_world_of_two(spec, out):
    os.environ["WORLD_SIZE"] = "2"
    return train(spec, out)


def test_what_several_processes_cannot_train_is_refused_by_name(spec, tmp_path, monkeypatch):
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY as KNOWN

    monkeypatch.setenv("WORLD_SIZE", "600")
    with pytest.raises(UsageError, match="600 processes share a batch of 512 tokens, less than one each"):
        train(spec, tmp_path / "sae")
    room.check_joint(spec, 512)  # one token each will do
    with pytest.raises(UsageError, match="device is mps, which one process alone"):
        room.check_joint(spec.model_copy(update={"device": "mps"}), 2)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UsageError, match="'cuda', but this PyTorch .* is built without CUDA"):
        room.check_joint(spec.model_copy(update={"device": "cuda"}), 2)
    monkeypatch.setitem(KNOWN, "mine", KNOWN["sparse_topk"])
    mine = spec.model_copy(update={"sae": {**spec.sae, "architecture": "mine"}})
    with pytest.raises(UsageError, match="'mine' is not known to train alike in several processes.*sparse_topk"):
        train(mine, tmp_path / "sae")


def test_only_the_first_one_writes(spec, tmp_path, monkeypatch):
    """And a folder that the others do not see is refused: every machine needs it to resume."""

    def elsewhere(spec, out):
        return train(spec, out / os.environ["RANK"])

    first, other = together(2, elsewhere, spec, tmp_path)
    assert "is not shared with" in other and "rank 1 of 2 was ended" in first
    assert not (tmp_path / "1").exists()
