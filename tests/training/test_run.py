import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from sae_italian.base import pace
from sae_italian.base.errors import UsageError
from sae_italian.base.storage import STOP_SIGNALS, claimed
from sae_italian.cli import main
from sae_italian.saes import load_sae
from sae_italian.training import load_config, load_spec, read_run, train
from sae_italian.training import run as run_module
from sae_italian.training.logging import RunLog
from sae_italian.training.loop import Loop, SAERun
from sae_italian.training.run import open_stream
from tests import fresh


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae_weights.safetensors")


def test_the_saved_sae_is_saelens_own(trained_sae, mini):
    from sae_lens import SAE

    from sae_italian.models import load_model

    sae = SAE.load_from_disk(trained_sae)
    assert sae.cfg.architecture() == "topk" and sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert sae.cfg.metadata.model_name == "sae-italian-mini" and sae.cfg.metadata.hf_hook_name == "model.layers.1"
    hooked = load_model("sae-italian-mini", "hooked")
    tokens = torch.randint(3, 500, (1, 20))
    clean = hooked(tokens)
    spliced = hooked.run_with_saes(tokens, saes=[sae])
    assert spliced.shape == clean.shape and not torch.equal(spliced, clean)
    _, cache = hooked.run_with_cache_with_saes(tokens, saes=[sae])
    acts = cache["blocks.1.hook_resid_post.hook_sae_acts_post"]
    assert ((acts != 0).sum(-1) == 8).all()


def test_training_learns(trained_sae):
    rows = [json.loads(line) for line in (trained_sae / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert rows[-1]["losses/mse_loss"] < 0.8 * rows[0]["losses/mse_loss"]
    assert rows[-1]["metrics/explained_variance"] > rows[0]["metrics/explained_variance"] + 0.2
    assert rows[0]["metrics/l0"] == 8


def test_the_seed_is_honoured(small_spec, trained_sae, tmp_path):
    with torch.inference_mode():  # what a notebook has switched off is on while it trains
        again = train(small_spec, tmp_path / "again")
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(trained_sae).items())
    other = train(small_spec.model_copy(update={"seed": 1}), tmp_path / "other")
    assert not torch.equal(weights(other)["W_enc"], weights(trained_sae)["W_enc"])


def test_the_stock_runner_trains_from_load_config_as_well_as_ours(mini, tmp_path, monkeypatch):
    """No override of any kind: model, documents, column, held-out split, annealing and SAE come from the config object."""
    from sae_lens import LanguageModelSAETrainingRunner

    from sae_italian.corpora import iter_documents
    from sae_italian.evaluation import evaluate

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    documents = itertools.islice(iter_documents("micro-italiano", "all"), 12_000)
    rows = [json.dumps({"text": "no " * 40, "testo": document.text}) for document in documents]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    settings = ("training_tokens=100k", "train_batch_size_tokens=512", "buffer_tokens=8192", "sae.d_sae=256")
    short = ("lr_warm_up_steps=0", "lr_decay_steps=60", "dead_feature_window=20", "k_anneal_share=0.1")
    words = ("mini/topk.yaml", *settings, *short, f"corpus={tmp_path}/a.jsonl", "text_column=testo")
    theirs = LanguageModelSAETrainingRunner(load_config(*words)).run()
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    theirs.save_inference_model(tmp_path / "theirs")
    saes = [load_sae(folder) for folder in (tmp_path / "theirs", train(load_spec(*words), tmp_path / "ours"))]
    text = {"n_tokens": 10_000, "loss_tokens": 500, "text_column": "testo"}
    cards = [evaluate(sae, mini, **text) for sae in saes]  # the held-out text too is found by both
    assert [card.corpus for card in cards] == [str(tmp_path / "a.jsonl")] * 2
    assert [card.l0.value for card in cards] == [8, 8]
    assert cards[0].explained_variance.value == pytest.approx(cards[1].explained_variance.value, abs=0.01)


# --- runs that are killed --------------------------------------------------------------------------------------------

SETTINGS = [
    "training_tokens=81920",
    "sae.d_sae=256",
    "train_batch_size_tokens=512",
    "buffer_tokens=4096",
    "store_batch_size_prompts=8",
    "lr_warm_up_steps=5",
    "lr_decay_steps=10",
    "dead_feature_window=10",
    "checkpoint_every_tokens=5120",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return train(load_spec("mini/topk.yaml", *SETTINGS), tmp_path_factory.mktemp("whole") / "sae")


def start(out: Path, *more: str) -> fresh.Fresh:
    """Start the run as a user does, with as many threads as this process has."""
    command = ["-m", "sae_italian.cli", "train", "mini/topk.yaml", *SETTINGS, "--out", str(out), *more]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "MKL_NUM_THREADS": str(torch.get_num_threads())}
    return fresh.Fresh(command, os.environ | threads)


def last_checkpoint(out: Path) -> int:
    folder = out / "checkpoints"
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0) if folder.is_dir() else 0


def logged_steps(out: Path) -> list[int]:
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line)["step"] for line in lines]


def wait_for(condition, process, seconds: float = 120) -> None:
    started = time.time()
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.time() - started < seconds
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes_to_the_same_weights(whole, tmp_path, number):
    out = tmp_path / "killed"
    process = start(out)
    wait_for(lambda: last_checkpoint(out), process)
    os.kill(process.pid, number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    if number == signal.SIGTERM:
        assert "--resume continues" in error and "Traceback" not in error
    assert not (out / "sae_weights.safetensors").exists()
    train(load_spec("mini/topk.yaml", *SETTINGS), out, resume=True)
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(whole).items())
    assert logged_steps(out) == list(range(0, 160, 10))
    assert not (out / "checkpoints").exists()


@pytest.mark.slow
def test_ten_kills_at_random_moments_lose_no_more_than_one_interval(whole, tmp_path):
    out, random = tmp_path / "killed", Random(0)
    for _ in range(10):
        before = logged_steps(out)
        process = start(out, "--resume")
        wait_for(lambda before=before: (out / "run.json").exists() and logged_steps(out) != before, process)
        time.sleep(random.uniform(0, 0.6))
        if process.poll() is not None:
            break  # it was faster than the kills
        process.kill()
        process.communicate()
        reached = max(logged_steps(out), default=0) * 512
        assert last_checkpoint(out) > reached - 5120 or (out / "sae_weights.safetensors").exists()
    train(load_spec("mini/topk.yaml", *SETTINGS), out, resume=True)
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(whole).items())
    assert logged_steps(out) == list(range(0, 160, 10))


def test_a_folder_with_another_run_is_refused_and_untouched(trained_sae, small_spec, tmp_path):
    before = weights(trained_sae)
    with pytest.raises(UsageError, match="--resume.*--overwrite"):
        train(small_spec, trained_sae)
    with pytest.raises(UsageError, match="lr was 0.006, is now 0.1"):
        train(small_spec.model_copy(update={"lr": 0.1}), trained_sae, resume=True)
    (tmp_path / "mine.txt").write_text("keep me")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match="holds no run of ours"):
            train(small_spec, tmp_path, **options)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    assert torch.equal(before["W_enc"], weights(trained_sae)["W_enc"])


def test_overwriting_takes_a_run_of_the_same_kind_and_leaves_what_is_not_ours(small_spec, tmp_path):
    spec, out = small_spec.model_copy(update={"training_tokens": 1024, "seeds": 2}), tmp_path / "out"
    train(spec, out)
    kept = ["tesi.txt", "modello/config.json", "cache/run.json", "cache/manifest.json"]
    for name in (
        *kept,
        ".final/cfg.json",
        "checkpoints/512/a.pt",
        "wandb/run-1/a.txt",
        "seeds/seed-43/checkpoints/9/a.pt",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mia")
    train(spec.model_copy(update={"seed": 1}), out, overwrite=True)
    assert read_run(out)["spec"]["seed"] == 1 and read_run(out / "seeds" / "seed-2")["spec"]["seed"] == 2
    with claimed(out, "train", {}, overwrite=True):
        left = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert left == {"run.json", ".lock", *kept}
    train(spec, out, overwrite=True)
    for text, message in (
        ('{"nome": "di un altro programma"}', "holds no run of ours"),
        ('{"kind": "cache", "created": "2026", "spec": {}}', "holds a cache run, not a train run"),
    ):
        (out / "run.json").write_text(text)
        before = {file: file.read_bytes() for file in out.iterdir() if file.is_file()}
        with pytest.raises(UsageError, match=message) as error:
            train(spec, out, overwrite=True)
        assert "\n" not in str(error.value)
        assert before == {file: file.read_bytes() for file in out.iterdir() if file.is_file()}


def test_resuming_a_finished_run_changes_nothing(trained_sae, small_spec):
    stamp = (trained_sae / "sae_weights.safetensors").stat().st_mtime_ns
    assert train(small_spec, trained_sae, resume=True) == trained_sae
    assert (trained_sae / "sae_weights.safetensors").stat().st_mtime_ns == stamp


def test_a_folder_is_resumed_without_its_first_command(small_spec, trained_sae, tmp_path, monkeypatch, capsys):
    """`train RUN --resume` reads run.json; settings that decide nothing may be changed beside it."""
    out = tmp_path / "out"
    poison(monkeypatch, 24, lambda sae: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(small_spec, out)
    monkeypatch.undo()
    assert main(["train", str(out)]) == 2 and "--resume" in capsys.readouterr().err
    record = json.loads(
        (out / "run.json").read_text()
    )  # as an older version wrote it, before these settings were there
    for newer in ("seeds", "from_pretrained_path", "process_timeout_seconds"):
        del record["spec"][newer]
    (out / "run.json").write_text(json.dumps(record))
    assert main(["train", str(out), "lr=1", "--resume"]) == 2 and "lr was 0.006" in capsys.readouterr().err
    assert main(["train", str(out), "checkpoint_every_tokens=10240", "--resume"]) == 0
    assert all(torch.equal(tensor, weights(trained_sae)[name]) for name, tensor in weights(out).items())
    assert not (tmp_path / "runs").exists()


def test_a_diverging_run_stops_and_says_so(small_spec, tmp_path):
    spec = small_spec.model_copy(update={"lr": 1e30, "lr_warm_up_steps": 0})
    with pytest.raises(UsageError, match="diverged. Lower lr .*There was no checkpoint yet"):
        train(spec, tmp_path / "out")


def poison(monkeypatch, at_step: int, spoil) -> None:
    """Let `spoil` change the SAE after a step, as a learning rate that is too high would."""
    step = SAERun.step

    def poisoned(self, batch):
        step(self, batch)
        if self.n_steps == at_step:
            with torch.no_grad():
                spoil(self.sae)

    monkeypatch.setattr(SAERun, "step", poisoned)


@pytest.mark.parametrize(
    ("at_step", "spoil", "message"),
    [
        (14, lambda sae: sae.W_dec.mul_(1e4), "the loss grew from .* to"),  # seen before the checkpoint of step 20
        (20, lambda sae: sae.W_enc[0].fill_(float("nan")), "W_enc is no longer finite"),  # by the checkpoint itself
    ],
)
def test_a_bad_state_never_replaces_the_good_checkpoint(small_spec, tmp_path, monkeypatch, at_step, spoil, message):
    poison(monkeypatch, at_step, spoil)
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=f"{message}.*diverged.*last good checkpoint is .*/5120"):
        train(small_spec, out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["5120"]
    saved = load_file(out / "checkpoints" / "5120" / "sae" / "sae_weights.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buffer_tokens": 256}, "buffer_tokens is 256, less than one batch of 512"),
        ({"lr_scheduler_name": "cosineannealing", "lr_decay_steps": 999}, "leave cosineannealing none of [0-9]+ steps"),
        ({"seqpos_slice": [500, 600]}, "keeps no position of a window of 128 tokens"),
        ({"seeds": 2, "from_pretrained_path": "x"}, "goes with neither shard_latents nor seeds. Leave one"),
        ({"training_tokens": 100}, "training_tokens is 100, less than one batch of 512"),
        (
            {"sae": {"architecture": "topk", "d_sae": 32, "k": 32}},
            "sae.k is 32; it must be above 0 and below sae.d_sae",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(small_spec, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        train(small_spec.model_copy(update=changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_settings_that_cannot_work(small_spec, monkeypatch):
    monkeypatch.setattr(run_module, "is_pretokenized", lambda corpus: True)
    with pytest.raises(UsageError, match="a pretokenised corpus holds none: set evaluate_corpus"):
        run_module.check_run(small_spec.model_copy(update={"evaluate_every_tokens": 512}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE is set: torchrun or Ray has started the processes already"):
        run_module.check_processes(small_spec, 2)


def test_the_seeds_folders_come_by_number(tmp_path):
    for seed in (10, 9, 2):
        (tmp_path / "seeds" / f"seed-{seed}").mkdir(parents=True)
        (tmp_path / "seeds" / f"seed-{seed}" / "sae_weights.safetensors").touch()
    names = [folder.name for folder in run_module.seed_folders(tmp_path)]
    assert names == [tmp_path.name, "seed-2", "seed-9", "seed-10"]


def test_a_state_that_is_bad_at_the_end_is_not_saved_as_finished(small_spec, tmp_path, monkeypatch):
    poison(monkeypatch, 40, lambda sae: sae.W_dec[0].fill_(float("inf")))
    spec, out = small_spec.model_copy(update={"checkpoint_every_tokens": 10**9}), tmp_path / "out"
    with pytest.raises(UsageError, match="W_dec is no longer finite at step 39.*diverged.*There was no checkpoint yet"):
        train(spec, out)
    assert not (out / "sae_weights.safetensors").exists() and not (out / "cfg.json").exists()


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_every_signal_that_asks_to_stop_saves_the_state(small_spec, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    poison(monkeypatch, 3, lambda sae: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt, match="saved at 1,536 tokens; --resume continues"):
        train(small_spec, tmp_path / "out")
    assert last_checkpoint(tmp_path / "out") == 1536 and signal.getsignal(number) == before
    assert {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"} == {each.name for each in STOP_SIGNALS}


def test_a_folder_that_is_being_trained_into_is_refused(small_spec, tmp_path, monkeypatch):
    told = []

    def again(sae):
        with pytest.raises(UsageError, match="is being written by another"):
            train(small_spec, tmp_path / "out", resume=True)
        told.append(True)

    poison(monkeypatch, 2, again)
    train(small_spec.model_copy(update={"training_tokens": 2048}), tmp_path / "out")
    assert told == [True]


def test_a_pipe_gets_a_line_now_and_then_from_the_first_token(small_spec, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pace, "PIPED_SECONDS", 0)
    train(small_spec.model_copy(update={"training_tokens": 2048}), tmp_path / "out")
    told = capsys.readouterr().err
    lines = told.splitlines()
    assert lines[0].startswith("first activations:") and "train SAE: 100%" in lines[-1] and "tok/s" in lines[-1]
    assert "\r" not in told and "Estimating" not in told


def test_a_copy_of_a_checkpoint_stays(small_spec, tmp_path, monkeypatch):
    out, kept = tmp_path / "out", tmp_path / "out" / "checkpoints" / "1024-copia"

    def copy_the_first(sae):
        shutil.copytree(out / "checkpoints" / "1024", kept)

    poison(monkeypatch, 3, copy_the_first)
    train(small_spec.model_copy(update={"training_tokens": 4096, "checkpoint_every_tokens": 1024}), out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == [kept.name] and any(kept.rglob("*.safetensors"))


def test_checkpoints_by_time(small_spec, tmp_path, monkeypatch):
    def stop(sae):
        raise MemoryError

    poison(monkeypatch, 4, stop)
    spec = small_spec.model_copy(update={"checkpoint_every_tokens": 10**9, "checkpoint_every_minutes": 1e-9})
    with pytest.raises(MemoryError):
        train(spec, tmp_path / "out")
    assert last_checkpoint(tmp_path / "out") == 3 * 512


def test_evaluation_while_training_costs_no_training_token(small_spec, trained_sae, tmp_path):
    spec = small_spec.model_copy(update={"evaluate_every_tokens": 10_240, "evaluate_tokens": 1000})
    out = train(spec, tmp_path / "out")
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(trained_sae).items())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    cards = [row for row in rows if "eval/explained_variance" in row]
    assert [row["step"] for row in cards] == [19, 39] and cards[0]["eval/l0"] == 8
    assert cards[1]["eval/explained_variance"] > cards[0]["eval/explained_variance"]


def test_what_a_killed_evaluation_wrote_goes_with_the_next_start(small_spec, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("sae_italian.training.logging.RunLog.evaluation", lambda _, folder, *__: seen.append(folder))
    spec = small_spec.model_copy(update={"evaluate_every_tokens": 1024, "training_tokens": 2048})
    out = train(spec, tmp_path / "out")
    assert len(seen) == 2 and not seen[0].exists()
    seen[0].mkdir()  # as a killed process leaves it
    (seen[0] / "sae_weights.safetensors").touch()
    train(spec, out, resume=True)
    assert not seen[0].exists()


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_corpus_that_ends_early_saves_the_state_and_can_be_repeated(small_spec, tmp_path, jsonl, monkeypatch, seeds):
    monkeypatch.setattr(run_module, "check_length", lambda *_: None)  # as for a corpus of the hub
    spec = small_spec.model_copy(update={"corpus": str(jsonl), "training_tokens": 40_960, "seeds": seeds})
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="the corpus ended after .* of the 40,960 training_tokens; the state is saved"):
        train(spec, out)
    assert last_checkpoint(out) > 10_000
    again = spec.model_copy(update={"repeat_corpus": True})
    assert (train(again, out, resume=True) / "sae_weights.safetensors").is_file()
    assert read_run(out)["spec"]["repeat_corpus"] is True


def test_several_saes_on_one_stream_are_what_each_is_alone(small_spec, mini, trained_sae, tmp_path):
    """Also when the group is stopped half-way and resumed."""
    spec = small_spec.model_copy(update={"checkpoint_every_tokens": 10**9})
    hooks = ["blocks.0.hook_resid_post", spec.hook_name]

    def group():
        runs = {name: SAERun(spec.model_copy(update={"hook_name": name}), mini, tmp_path / name) for name in hooks}
        for run in runs.values():
            run.out.mkdir(exist_ok=True)
        return Loop(runs, open_stream(spec, mini, hooks), tmp_path)

    class StopsAtStep20(RunLog):
        def __call__(self, row, step):
            first.interrupted = step >= 20

    first = group()
    first.runs[hooks[0]].log = StopsAtStep20(spec, tmp_path)
    with pytest.raises(KeyboardInterrupt, match="saved at 10,752 tokens"):
        first.fit()
    second = group()
    second.resume()
    assert [run.start_loss for run in second.runs.values()] == [run.start_loss for run in first.runs.values()]
    second.fit()
    second.finish()
    assert all(torch.equal(w, weights(tmp_path / hooks[1])[name]) for name, w in weights(trained_sae).items())
    alone = train(spec.model_copy(update={"hook_name": hooks[0]}), tmp_path / "alone")
    assert all(torch.equal(w, weights(tmp_path / hooks[0])[name]) for name, w in weights(alone).items())


def test_norm_scaling_is_folded_into_the_saved_weights(small_spec, tmp_path, mini):
    """Trained on scaled inputs, saved for raw ones: the explained variance on raw activations is that of training."""
    from sae_italian.evaluation import evaluate

    spec = small_spec.model_copy(
        update={"sae": {**small_spec.sae, "normalize_activations": "expected_average_only_in"}}
    )
    sae = load_sae(train(spec, tmp_path / "out"))
    assert sae.cfg.normalize_activations == "none"
    assert evaluate(sae, mini, "micro-italiano", n_tokens=5000).explained_variance.value > 0.1


def test_an_unfinished_folder_is_no_sae(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="--resume"):
        load_sae(tmp_path)


def test_wandb_offline_gets_saelens_metric_names(small_spec, tmp_path, monkeypatch):
    import wandb

    logged = []
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    original = wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda self, row, **kw: (logged.append(row), original(self, row, **kw)))
    train(small_spec.model_copy(update={"wandb": "offline"}), tmp_path / "out")
    assert {"losses/mse_loss", "metrics/l0", "metrics/explained_variance", "sparsity/dead_features"} <= set(logged[0])
    assert list(tmp_path.glob("out/wandb/offline-run-*/*.wandb"))


def test_a_corpus_too_short_for_the_training_is_refused_or_repeated_on_request(small_spec, tmp_path, jsonl):
    short = small_spec.model_copy(update={"corpus": str(jsonl), "training_tokens": 300_000})
    with pytest.raises(UsageError, match="training tokens, fewer than the 300,000 of training_tokens.*repeat_corpus"):
        train(short, tmp_path / "short")
    assert not (tmp_path / "short").exists()
    fits = short.model_copy(update={"training_tokens": 5120})
    assert (train(fits, tmp_path / "fits") / "sae_weights.safetensors").is_file()
    again = short.model_copy(update={"training_tokens": 51_200, "repeat_corpus": True})
    assert (train(again, tmp_path / "again") / "sae_weights.safetensors").is_file()


@pytest.mark.slow
def test_no_home_that_can_be_written_is_needed(tmp_path):
    """As in a container: 2c011dc ended with "No such file or directory (/proc/nowhere)"."""
    sizes = {"training_tokens": 2048, "buffer_tokens": 2048, "train_batch_size_tokens": 512, "sae.d_sae": 256}
    words = [f"{key}={value}" for key, value in {**sizes, "lr_warm_up_steps": 1, "lr_decay_steps": 1}.items()]
    nowhere = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere/.cache"}
    environment = {key: value for key, value in os.environ.items() if key != "HF_HOME"} | nowhere
    command = [sys.executable, "-m", "sae_italian.cli", "train", "mini/topk", *words, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (tmp_path / "out" / "sae_weights.safetensors").is_file(), done.stderr[-300:]
