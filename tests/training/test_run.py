import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_italian.errors import UsageError
from sae_italian.saes import load_sae
from sae_italian.training import load_config, load_spec, train


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
    again = train(small_spec, tmp_path / "again")
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(trained_sae).items())
    other = train(small_spec.model_copy(update={"seed": 1}), tmp_path / "other")
    assert not torch.equal(weights(other)["W_enc"], weights(trained_sae)["W_enc"])


def test_the_stock_runner_trains_from_load_config(tmp_path, monkeypatch):
    """No override of any kind: model, corpus and SAE all come from the config object."""
    from sae_lens import LanguageModelSAETrainingRunner

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = load_config(
        "mini/topk.yaml",
        "training_tokens=8192",
        "sae.d_sae=256",
        "train_batch_size_tokens=1024",
        "buffer_tokens=4096",
        "lr_warm_up_steps=0",
        "lr_decay_steps=0",
    )
    sae = LanguageModelSAETrainingRunner(config).run()
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert sae.cfg.metadata.l0 == 8.0


# --- runs that are killed --------------------------------------------------------------------------------------------

SETTINGS = [
    "training_tokens=204800",
    "sae.d_sae=256",
    "train_batch_size_tokens=512",
    "buffer_tokens=4096",
    "store_batch_size_prompts=8",
    "lr_warm_up_steps=5",
    "lr_decay_steps=10",
    "dead_feature_window=10",
    "checkpoint_every_tokens=5120",
]


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "sae_italian.cli", "train", "mini/topk.yaml", *SETTINGS, "--out", str(out), *more]


def wait_for(condition, process, seconds: float = 90) -> None:
    started = time.time()
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.time() - started < seconds
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, number):
    whole = train(load_spec("mini/topk.yaml", *SETTINGS), tmp_path / "whole")
    out = tmp_path / "killed"
    process = subprocess.Popen(command(out), stderr=subprocess.PIPE, text=True)
    wait_for(
        lambda: (out / "checkpoints").is_dir() and any(p.name.isdigit() for p in (out / "checkpoints").iterdir()),
        process,
    )
    os.kill(process.pid, number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    if number == signal.SIGTERM:
        assert "--resume continues" in error and "Traceback" not in error
    assert not (out / "sae_weights.safetensors").exists()
    subprocess.run(command(out, "--resume"), check=True, capture_output=True)
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(whole).items())
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(0, 400, 10))
    assert not (out / "checkpoints").exists()


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


def test_resuming_a_finished_run_changes_nothing(trained_sae, small_spec):
    stamp = (trained_sae / "sae_weights.safetensors").stat().st_mtime_ns
    assert train(small_spec, trained_sae, resume=True) == trained_sae
    assert (trained_sae / "sae_weights.safetensors").stat().st_mtime_ns == stamp


def test_a_diverging_run_stops_and_says_so(small_spec, tmp_path):
    spec = small_spec.model_copy(update={"lr": 1e30, "lr_warm_up_steps": 0})
    with pytest.raises(UsageError, match="lower lr"):
        train(spec, tmp_path / "out")


def test_norm_scaling_is_folded_into_the_saved_weights(small_spec, tmp_path, mini):
    """Trained on scaled inputs, saved for raw ones: the explained variance on raw activations is that of training."""
    from sae_italian.training import evaluate

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
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_corpus_too_short_for_the_training_is_refused_or_repeated_on_request(small_spec, tmp_path, jsonl):
    short = small_spec.model_copy(update={"corpus": str(jsonl), "training_tokens": 300_000})
    with pytest.raises(UsageError, match="training tokens, fewer than the 300,000 of training_tokens.*repeat_corpus"):
        train(short, tmp_path / "short")
    assert not (tmp_path / "short").exists()
    fits = short.model_copy(update={"training_tokens": 5120})
    assert (train(fits, tmp_path / "fits") / "sae_weights.safetensors").is_file()
    again = short.model_copy(update={"training_tokens": 51_200, "repeat_corpus": True})
    assert (train(again, tmp_path / "again") / "sae_weights.safetensors").is_file()
