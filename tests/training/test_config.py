import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sae_italian.base.errors import UsageError
from sae_italian.cli import main
from sae_italian.training import load_config, load_spec, recipes
from sae_italian.training.config import configs_folder, find_config

ROOT = Path(__file__).parents[2]


def test_load_config_is_saelens_own_object():
    from sae_lens import LanguageModelSAERunnerConfig, TopKTrainingSAEConfig

    config = load_config("mini/topk.yaml", "sae.k=64", "lr=2e-4")
    assert type(config) is LanguageModelSAERunnerConfig and type(config.sae) is TopKTrainingSAEConfig
    assert config.sae.k == 64 and config.lr == 2e-4
    assert config.sae.d_in == 128 and config.model_name == "sae-italian-mini"
    assert config.hook_name == "blocks.1.hook_resid_post" and config.exclude_special_tokens is True


@pytest.mark.parametrize("path", ["configs/mini/topk.yaml", "mini/topk.yaml", "mini/topk"])
def test_shipped_configs_are_found_by_name(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(path) == configs_folder() / "mini" / "topk.yaml"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sea.k=3"], "unknown key 'sea'.*'sae'"),
        (["learning_rate=1"], "unknown key 'learning_rate'"),
        (["sae.kk=3"], "unknown key 'sae.kk'.*'k'"),
        (["sae.architecture=topkk"], "Did you mean 'topk'"),
        (["lr=viel"], "config key 'lr'"),
        (["lr=-1"], "config key 'lr'"),
        (["sae.k=banana"], "config key 'sae.k'.*banana"),
        (["sae.normalize_activations=no"], "config key 'sae.normalize_activations'"),
        (["context_size=1024"], "the model has 512 positions"),
        (["sae.k=4096"], "below sae.d_sae"),
        (["sae.d_in=7"], "has 128"),
        (["d_sae=512"], "Did you mean 'sae.d_sae'"),
        (["hook_name=blocks.9.hook_resid_post"], "layers 0 to 3"),
        (["hook_name=blocks.2.hook_resid_pst"], "Did you mean 'blocks.2.hook_resid_post'"),
        (["model=minervva-1b"], "Did you mean 'minerva-1b'"),
        (["lr"], "key=value"),
        (["model.name=x"], "is a value, not a group"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(overrides, message):
    with pytest.raises(UsageError, match=message) as error:
        load_config("mini/topk.yaml", *overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "right"), [("configs/mini/tokp.yaml", "mini/topk"), ("transcodr", "mini/transcoder"), ("nothing", "")]
)
def test_a_missing_config_offers_the_nearest_of_all(wrong, right):
    with pytest.raises(UsageError, match=f"Did you mean '{right}'" if right else "recipes` lists all 30"):
        load_spec(wrong)


def test_the_command_recipes_lists_all_with_one_line_each(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(recipes()) + 2 and any(line.startswith("mini/topk  ") and "TopK" in line for line in lines)


def test_what_the_stock_runner_cannot_do_is_refused(tmp_path):
    for arguments, message in (
        (["mini/transcoder"], "no hook_name_out"),
        (["mini/topk", "text_column=testo"], "no text_column"),
    ):
        with pytest.raises(UsageError, match=message):
            load_config(*arguments)


@pytest.mark.parametrize("text", ["model: [", "- a\n- b\n"])
def test_a_file_that_is_no_config(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError, match="a.yaml"):
        load_spec(tmp_path / "a.yaml")


def test_the_wheel_ships_configs_and_the_mini_model(tmp_path):
    """Built without isolation: the build backend is a development dependency."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
        capture_output=True,
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for wanted in (
        "sae_italian/configs/mini/topk.yaml",
        "sae_italian/models/catalogue.yaml",
        "sae_italian/models/mini/model.safetensors",
        "sae_italian/models/mini/tokenizer.json",
        "sae_italian/browser/static/main.js",
    ):
        assert wanted in names
    assert not [name for name in names if name.startswith("tests")]
