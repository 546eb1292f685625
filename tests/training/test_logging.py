"""Runs of W&B, kept offline and read back from disk; sweeps as wandb itself checks and expands them."""

import json
import os
import re
from itertools import islice
from pathlib import Path

import pytest
import yaml

from sae_italian.autointerp import AutointerpConfig, run_autointerp
from sae_italian.autointerp.run import STORE_FILE
from sae_italian.autointerp.summary import export as export_tables
from sae_italian.base.errors import UsageError
from sae_italian.base.hub import WandbRun
from sae_italian.browser.exports import export
from sae_italian.cache import FeatureCache, build_cache
from sae_italian.cli import main
from sae_italian.corpora import iter_documents
from sae_italian.evaluation import read_card
from sae_italian.training import load_spec, train
from sae_italian.training.config import configs_folder
from sae_italian.training.logging import LATENT_COLUMNS, RunLog, sweep_folder
from tests.training.wandb_file import OfflineRun

SWEEPS = sorted((configs_folder() / "sweeps").glob("*.yaml"))
FEW_STEPS = (
    "model=sae-italian-mini", "corpus=micro-italiano", "hook_name=blocks.1.hook_resid_post", "context_size=64",
    "training_tokens=5120", "train_batch_size_tokens=256", "buffer_tokens=2048", "store_batch_size_prompts=8",
    "lr_warm_up_steps=0", "lr_decay_steps=0", "evaluate_tokens=500",
)  # fmt: skip


@pytest.fixture
def logged_out(monkeypatch, tmp_path):
    """No login of any kind, and no server in reach."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def offline(small_spec, tmp_path_factory):
    """A training that keeps its W&B run offline."""
    spec = small_spec.model_copy(update={"wandb": "offline", "wandb_checkpoints": True, "evaluate_tokens": 1000})
    return train(spec, tmp_path_factory.mktemp("wandb") / "sae")


def test_an_offline_run_holds_the_metrics_of_the_run(offline):
    run = OfflineRun(offline)
    rows = [json.loads(line) for line in (offline / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in run.rows if "metrics/l0" in row]
    assert [row["_step"] for row in logged] == [row["step"] for row in rows]
    for name in ("losses/overall_loss", "metrics/explained_variance", "metrics/l0", "sparsity/dead_features"):
        assert [row[name] for row in logged] == [row[name] for row in rows]
    assert run.exit_code == 0


def test_the_summary_holds_the_card_and_the_cursor(offline):
    run, card = OfflineRun(offline), read_card(offline)
    assert card is not None and card.n_tokens >= 1000
    logged = next(row for row in run.rows if "eval/l0" in row)
    for key, estimate in card.estimates().items():
        if estimate.value == estimate.value:
            assert logged[f"eval/{key}"] == estimate.value
    kinds = [value for row in run.rows for key, value in row.items() if key.startswith("eval/density")]
    assert "html-file" in str(kinds)  # one file that needs nothing else
    (picture,) = offline.rglob("media/html/eval/density*.html")
    assert picture.read_text(encoding="utf-8") == card._repr_html_()
    assert "eval/dead_in_1m" not in logged  # not measured, so not told
    assert not [key for key in (*logged, *run.summary) if key.endswith(("_lo", "_hi"))], "intervals are in the table"
    (table,) = offline.glob("wandb/offline-run-*/files/media/table/eval/card*.json")
    rows = {row[0]: row[1:] for row in json.loads(table.read_text())["data"]}
    assert rows["l0"] == [card.l0.value, card.l0.lo, card.l0.hi] and set(rows) <= set(card.estimates())
    corpus = run.summary["corpus"] if "corpus" in run.summary else {"n_blocks": run.summary["corpus/n_blocks"]}
    assert corpus["n_blocks"] > 0 and not [key for key in (*run.summary, *corpus) if "packer" in key]


def test_the_table_of_latents_has_true_passages_and_scores(offline, mini):
    """Each passage is held-out text with its strongest token between asterisks; the token named is the one fired on most."""
    (table,) = offline.glob("wandb/offline-run-*/files/media/table/eval/latents*.json")
    told = json.loads(table.read_text(encoding="utf-8"))
    assert told["columns"][:5] == LATENT_COLUMNS and len(told["data"]) > 100
    rows = [dict(zip(told["columns"], row, strict=True)) for row in told["data"]]
    assert all(0 < row["density"] <= 1 and row["max"] > 0 and 0 < row["token_share"] <= 1 for row in rows)
    texts = " ".join(" ".join(d.text.split()) for d in islice(iter_documents("micro-italiano", "heldout"), 300))
    shown = [row[f"context {i}"] for row in rows for i in (1, 2, 3) if row[f"context {i}"]]
    assert all(text.count("**") == 2 for text in shown)
    assert sum(" ".join(text.replace("**", "").split()) in texts for text in shown) > 0.9 * len(shown)
    sure = [row for row in rows if row["token_share"] > 0.99 and row["token"].strip()]
    assert sure and all(f"**{row['token'].strip()}**" in row["context 1"] for row in sure)


def test_an_export_joins_the_trainings_project_and_group(offline, mini, tmp_path):
    cache = FeatureCache.open(build_cache(offline, mini, out=tmp_path / "cache", n_tokens=2000))
    export(cache, mini.tokenizer, tmp_path / "out", "wandb", latents=(0, 7))
    trained, joined = OfflineRun(offline), OfflineRun(tmp_path / "out")
    assert joined.group == trained.group == trained.id and joined.id != trained.id
    assert joined.project == trained.project == "sae-italian" and joined.config["training_run"] == trained.id
    (page,) = (tmp_path / "out").rglob("strongest*.html")  # in one piece
    assert not re.search(r"<script|<link|(src|href)=|url[(]|@import", page.read_text(encoding="utf-8"))
    run_autointerp(cache, mini.tokenizer, AutointerpConfig(latents=4, n_examples=10))
    export_tables(cache.folder / STORE_FILE, tmp_path / "tables", "wandb")
    assert OfflineRun(tmp_path / "tables").group == trained.id


def test_an_online_export_uses_the_artifact_that_the_training_sent(offline, mini, tmp_path, monkeypatch):
    """The lineage W&B draws: the latents' run asks for the SAE by the very name it was sent under. Offline it asks nobody."""
    wandb, asked = pytest.importorskip("wandb"), []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: init(**given | {"mode": "offline"}))  # no server here
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "use_artifact", lambda run, name: asked.append((run.group, name)))
    cache = FeatureCache.open(build_cache(offline, mini, out=tmp_path / "cache", n_tokens=2000))
    trained = OfflineRun(offline)
    export(cache, mini.tokenizer, tmp_path / "kept", "wandb", latents=(0, 2))
    assert not asked
    export(cache, mini.tokenizer, tmp_path / "sent", "wandb", latents=(0, 2), online=True)
    ((group, name),) = asked
    assert group == trained.id and name.removesuffix(":latest") in trained.names and name.endswith(":latest")


def test_config_and_artifact(offline, small_spec):
    run = OfflineRun(offline)
    assert run.config["sae_italian"]["sae"]["k"] == 8 and run.config["training_tokens"] == small_spec.training_tokens
    assert run.id == json.loads((offline / "wandb.json").read_text())["id"]
    kinds = dict(run.artifacts)
    assert {"cfg.json", "sae_weights.safetensors", "card.json", "run.json"} <= set(kinds["sae"])
    checkpoints = [files for kind, files in run.artifacts if kind == "sae-checkpoint"]
    assert len(checkpoints) == 4 and all({"cfg.json", "sae_weights.safetensors"} <= set(files) for files in checkpoints)


def test_online_without_a_login_is_offline_and_says_so(small_spec, logged_out, tmp_path, capsys):
    spec = small_spec.model_copy(update={"wandb": "online"})
    log = RunLog(spec, tmp_path)
    with log.to_wandb():
        log({"metrics/l0": 8.0}, 0)
    told = [line for line in capsys.readouterr().err.splitlines() if "WARNING" not in line]  # wandb has its own
    assert len(told) == 2 and "nobody is logged in" in told[0] and f"wandb sync {tmp_path}/wandb/offline-*" in told[1]
    assert OfflineRun(tmp_path).rows[0]["metrics/l0"] == 8


def test_a_resumed_run_keeps_its_id_and_a_failed_one_says_so(small_spec, logged_out, tmp_path):
    spec = small_spec.model_copy(update={"wandb": "offline"})
    log = RunLog(spec, tmp_path)
    with pytest.raises(UsageError), log.to_wandb():
        raise UsageError("diverged")
    first = OfflineRun(tmp_path)
    assert first.exit_code == 1
    first.file.unlink()
    log = RunLog(spec, tmp_path)
    with log.to_wandb():
        log({"metrics/l0": 8.0}, 10)
    assert OfflineRun(tmp_path).id == first.id


def test_off_is_silent(small_spec, tmp_path):
    log = RunLog(small_spec, tmp_path)
    with log.to_wandb():
        assert log.wandb_run is None
        log({}, 0)
        log.checkpoint(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_runs_of_a_sweep_do_not_share_a_folder(monkeypatch):
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    assert sweep_folder(Path("runs/topk")) == Path("runs/topk")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    assert sweep_folder(Path("runs/topk")) == Path("runs/topk/r1")


def test_wandb_names_the_runs_of_a_sweep(small_spec, logged_out, tmp_path, monkeypatch):
    """SAELens' name says architecture, width and rate: one name for all runs of a sweep over k."""
    wandb, names = pytest.importorskip("wandb"), []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: names.append(given.get("name")) or init(**given))
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    for out in (tmp_path / "alone", tmp_path / "swept"):
        log = RunLog(small_spec.model_copy(update={"wandb": "offline"}), out)
        with log.to_wandb():
            monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    assert names == [small_spec.to_saelens().logger.run_name, None]


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_a_sweep_is_what_wandb_accepts(file):
    sweeps = pytest.importorskip("sweeps", reason="needs wandb[sweeps]")
    from sweeps.config.schema import validator
    from wandb.sdk.launch.sweeps.utils import load_sweep_config

    config = load_sweep_config(str(file))  # how `wandb sweep FILE` reads it
    assert config == yaml.safe_load(file.read_text()) and not list(validator.iter_errors(config))
    assert config["project"] == WandbRun().project  # a sweep's runs stand beside the others
    sweeps.next_run(config, [])
    broken = {**config, "method": "guess"}
    assert list(validator.iter_errors(broken))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_what_a_sweep_starts_trains_and_logs_its_metric(file, logged_out, tmp_path, monkeypatch, capsys):
    """The command as `wandb agent` expands it for the first run, on the mini model and for a few steps."""
    sweeps = pytest.importorskip("sweeps", reason="needs wandb[sweeps]")
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    config = yaml.safe_load(file.read_text())
    run = sweeps.next_run(config, [])
    macros = create_sweep_command_args({"args": run.config})
    macros["program"] = [config["program"]]
    command = []
    for part in create_sweep_command(config["command"]):
        macro = part.removeprefix("${").removesuffix("}") if part.startswith("${") else None
        command += macros[macro] if macro else [part]
    assert command[0] == "sae-italian" and f"{next(iter(config['parameters']))}=" in command[-1]
    swept = [part for part in command if part.split("=")[0] in config["parameters"]]
    extra = FEW_STEPS if "sae.d_sae" in config["parameters"] else (*FEW_STEPS, "sae.d_sae=256")
    monkeypatch.chdir(tmp_path)
    assert main([*command[1:], *extra]) == 0, capsys.readouterr().err
    (folder,) = {file.parent for file in tmp_path.glob("runs/**/run.json")}
    logged = OfflineRun(folder)
    assert any(config["metric"]["name"] in row for row in logged.rows)
    spec = json.loads((folder / "run.json").read_text())["spec"]
    for part in swept:
        key, _, value = part.partition("=")
        found = spec["sae"][key.removeprefix("sae.")] if key.startswith("sae.") else spec[key]
        assert float(found) == float(value)


def test_nobody_is_asked_for_a_login_by_default():
    assert load_spec("mini/topk.yaml").wandb == "off"
