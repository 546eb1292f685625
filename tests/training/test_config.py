import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import write_json
from sae_italian.cli import main
from sae_italian.training import load_config, load_spec, read_values, recipes
from sae_italian.training.config import configs_folder, find_config
from sae_italian.training.text import check_length, check_pretokenized

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """What `load_config` writes for SAELens' runner goes here, and is little."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return ("training_tokens=8k", "buffer_tokens=4_096", "train_batch_size_tokens=256")


def test_load_config_is_saelens_own_object(own_cache):
    from sae_lens import LanguageModelSAERunnerConfig, TopKTrainingSAEConfig

    config = load_config("mini/topk.yaml", *own_cache, "sae.architecture=topk", "sae.k=64", "lr=2e-4")
    assert config.training_tokens == 8000
    assert type(config) is LanguageModelSAERunnerConfig and type(config.sae) is TopKTrainingSAEConfig
    assert config.sae.k == 64 and config.lr == 2e-4
    assert config.sae.d_in == 128 and config.model_name == "sae-italian-mini"
    assert config.hook_name == "blocks.1.hook_resid_post" and config.exclude_special_tokens is True
    told = read_values("mini/topk", *own_cache)
    assert load_config(told, "sae.k=64").sae.k == 64 and told == read_values(
        "mini/topk", *own_cache
    )  # a copy is changed


def test_a_size_in_thousands_is_a_number_for_whoever_reads_the_settings():
    spec = load_spec("mini/topk", "sae.d_sae=1k", "training_tokens=20k")
    assert spec.sae["d_sae"] == 1000 and spec.training_tokens == 20_000 and spec.sae_config().d_sae == 1000


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
        (["training_tokens=null"], "config key 'training_tokens' is None; it should be a valid integer"),
        (["lr=-1"], "config key 'lr' is -1; it should be greater than 0"),
        (["lr=.inf"], "config key 'lr' is inf; it should be a finite number"),
        (["training_tokens=many"], "config key 'training_tokens' is 'many'; it should be a valid integer[.]"),
        (["seed=9223372036854775808"], "config key 'seed'"),
        (["wandb_project=a/b/c"], "config key 'wandb_project'"),
        (["l1_coefficient=3"], "unknown key 'l1_coefficient'"),
        (["sae.k=banana"], "config key 'sae.k'.*banana"),
        (["sae.normalize_activations=no"], "config key 'sae.normalize_activations'"),
        (["sae.normalize_activations=layer_norm"], "it should be 'none', .* or 'covariance_whitening'"),
        (
            ["sae={architecture: tied, d_sae: 256, normalize_activations: layer_norm}"],
            "it should be 'none' or 'expected_average_only_in'",
        ),
        (
            ["sae={architecture: transcoder, d_sae: 256, normalize_activations: covariance_whitening}"],
            "it should be 'none' or 'expected_average_only_in'",
        ),
        (["sae.reshape_activations=hook_z"], "config key 'sae.reshape_activations' is 'hook_z'; it should be 'none'"),
        (["context_size=1024"], "the model has 512 positions"),
        (["sae.k=4096"], "below sae.d_sae"),
        (["sae.d_sae=1" + "0" * 400], "'sae.d_sae' is 1000.*; it should be less than 9007199254740992"),
        (["hook_name=blocks.٢.hook_resid_post"], "hook_name"),
        (["sae.d_in=7"], "has 128"),
        (["sae.k=0"], "sae.k is 0; it must be above 0"),
        (["sae.dtype=float8"], "config key 'sae.dtype' is 'float8'; it should be 'float32', .* or 'torch.bfloat16'"),
        (["sae={architecture: gated, d_sae: 256, dtype: bfloat16}"], "it should be 'float32', 'float64', "),
        (["sae={architecture: jumprelu, d_sae: 256, jumprelu_bandwidth: 0}"], "should be greater than 0"),
        (["sae={architecture: standard, d_sae: 256, l1_coefficient: .nan}"], "should be a finite number"),
        (["sae={architecture: matryoshka_batchtopk, d_sae: 64, k: 8}"], "matryoshka_widths is .*; numbers that rise"),
        (["sae={architecture: matryoshka_batchtopk, d_sae: 64, k: 8, matryoshka_widths: [9, 3]}"], "numbers that rise"),
        (["sae={architecture: matryoshka_batchtopk, d_sae: 64, k: 8, matryoshka_widths: [65]}"], "numbers that rise"),
        (["sae={architecture: transcoder, d_sae: 256, d_out: 7}", "hook_name_out=blocks.1.hook_mlp_out"], "has 128"),
        (["sae.device=cuda"], "unknown key 'sae.device'"),
        (["sae.metadata=1"], "unknown key 'sae.metadata'"),
        (["d_sae=512"], "Did you mean 'sae.d_sae'"),
        (["hook_name=blocks.9.hook_resid_post"], "layers 0 to 3"),
        (["hook_name=blocks.2.hook_resid_pst"], "Did you mean 'blocks.2.hook_resid_post'"),
        (["model=minervva-1b"], "Did you mean 'minerva-1b'"),
        (["lr"], "key=value"),
        (["model.name=x"], "is a value, not a group"),
        ([["sae.k=4"]], r"\['sae.k=4'\] is no text of the form key=value"),
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
    with pytest.raises(
        UsageError, match=f"Did you mean '{right}'" if right else f"recipes` lists all {len(recipes())}"
    ):
        load_spec(wrong)


def test_the_command_recipes_lists_all_with_one_line_each(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(recipes()) + 2 and any(line.startswith("mini/topk  ") and "TopK" in line for line in lines)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["mini/transcoder"], "SAELens' runner knows no hook_name_out"),
        (["mini/topk", "training_tokens=6000B"], "training_tokens is 6,000,000,000,000: .* twice 48000 GB; .* GB free"),
        (["mini/topk", "corpus=HERE"], "is pretokenised, .* override_dataset"),
        (["mini/topk", "corpus=JSONL"], "training tokens, fewer than the 1,500,000"),
    ],
)
def test_what_the_stock_runner_cannot_do_is_refused(given, message, own_cache, jsonl, tmp_path):
    (tmp_path / "sae_lens.json").write_text("{}")
    with pytest.raises(UsageError, match=message):
        load_config(*[word.replace("HERE", str(tmp_path)).replace("JSONL", str(jsonl)) for word in given])


def test_text_for_the_stock_runner_that_would_fill_the_disk_is_not_written(own_cache, monkeypatch):
    monkeypatch.setattr("sae_italian.training.text.room_on", lambda _: 15_000_000)
    with pytest.raises(UsageError, match="up to twice 0 GB; the disk of .* Lower it"):  # 8.3 MB: `datasets` copies it
        load_config("mini/topk", "training_tokens=1M", "buffer_tokens=4096", "train_batch_size_tokens=1024")


def test_the_stock_runner_gets_our_documents_and_no_held_out_one(own_cache, tmp_path):
    """Of a file of paragraphs, and of a column of another name: each training document once, in order."""
    from datasets import load_dataset

    from sae_italian.corpora import iter_documents

    texts = [
        f"Il paragrafo {i} è qui.\n" + "La casa di Anna è bella e grande, e il sole la scalda. " * 6 for i in range(200)
    ]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"testo": text, "text": "no"}) + "\n" for text in texts))
    for words in (["corpus=a.txt"], ["corpus=a.jsonl", "text_column=testo"]):
        words = [word.replace("corpus=", f"corpus={tmp_path}/") for word in words]
        config = load_config("mini/topk", *own_cache, *words)
        rows = list(load_dataset(config.dataset_path, split="train", streaming=True))
        ours = iter_documents(
            words[0].removeprefix("corpus="), "train", text_column=words[-1].partition("=")[2] if words[1:] else "text"
        )
        assert [row["text"] for row in rows] == [document.text for document in ours] and 150 < len(rows) < 200


def test_saelens_own_config_is_a_run(own_cache):
    """`train(load_config(...))`: the same settings; what only SAELens' runner has is refused by its name."""
    from sae_italian.training import RunSpec

    config, spec = load_config("mini/topk", *own_cache), load_spec("mini/topk", *own_cache)
    again = RunSpec.from_saelens(config)
    assert again.to_saelens().sae == spec.to_saelens().sae and again.corpus == config.dataset_path
    same = ("training_tokens", "lr", "lr_decay_steps", "context_size", "buffer_tokens", "hook_name", "seed", "device")
    assert all(getattr(again, key) == getattr(spec, key) for key in same)
    config.adam_beta1 = 0.5
    with pytest.raises(UsageError, match="adam_beta1 is 0.5; training here has it at 0.9 alone"):
        RunSpec.from_saelens(config)


def test_a_missing_key_is_named_and_a_half_precision_model_is_asked_for(tmp_path):
    (tmp_path / "a.yaml").write_text("model: sae-italian-mini\nhook_name: blocks.1.hook_resid_post\n")
    with pytest.raises(UsageError, match="lacks the key 'sae'"):
        load_spec(tmp_path / "a.yaml")
    asked = [load_spec("mini/topk", f"dtype={name}").to_saelens() for name in ("float32", "bfloat16")]
    given = {"center_writing_weights": False}
    assert [config.model_from_pretrained_kwargs for config in asked] == [given, given | {"dtype": "bfloat16"}]
    assert [config.verbose for config in asked] == [False, False]


def test_a_corpus_too_long_to_be_read_is_not_said_to_be_long_enough(mini, jsonl, monkeypatch):
    monkeypatch.setattr("sae_italian.training.text.COUNTED_CHARACTERS", 1000)
    spec = load_spec("mini/topk", f"corpus={jsonl}", "training_tokens=6B")
    assert check_length(spec, mini.tokenizer).endswith("its tokens are not counted")


@pytest.mark.parametrize(("n_tokens", "words"), [
    ("1k", "1,000 training tokens or more, at most one epoch"),
    ("400k", "training tokens, 1[0-9].[0-9] epochs"),
])  # fmt: skip
def test_the_length_of_a_corpus_is_told_in_tokens_and_epochs(mini, jsonl, n_tokens, words):
    spec = load_spec("mini/topk", f"corpus={jsonl}", f"training_tokens={n_tokens}", "repeat_corpus=true")
    assert re.search(words, check_length(spec, mini.tokenizer))
    if n_tokens == "400k":
        with pytest.raises(UsageError, match="training tokens, fewer than the 400,000"):
            check_length(spec.model_copy(update={"repeat_corpus": False}), mini.tokenizer)
        mixed = spec.model_copy(update={"corpus": f"0.7*{jsonl},0.3*{jsonl}"})  # files with weights are counted too
        assert re.search("training tokens, [0-9.]+ epochs", check_length(mixed, mini.tokenizer))


def test_a_pretokenised_corpus_must_be_of_the_tokenizer_the_context_and_the_training_split():
    made = SimpleNamespace(folder="tok", context_size=128, split="train", is_made_for=lambda tokenizer: tokenizer == 1)
    check_pretokenized(made, 1, 128)  # pyright: ignore[reportArgumentType]
    heldout = SimpleNamespace(**{**vars(made), "split": "heldout"})
    for corpus, tokenizer, context, message in (
        (made, 2, 128, "tok was made with another tokenizer"),
        (made, 1, 64, "windows of 128 tokens, context_size is 64"),
        (heldout, 1, 128, "holds the split 'heldout'"),
    ):
        with pytest.raises(UsageError, match=message):
            check_pretokenized(corpus, tokenizer, context)  # pyright: ignore[reportArgumentType]


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


def test_a_folder_that_holds_no_training_is_no_config(tmp_path):
    """A quickstart's folder was read as a config, whose first key, cache_tokens, was then called unknown."""
    record = {
        "kind": "quickstart",
        "created": "2026-11-28T00:00:00Z",
        "spec": {"config": "mini/topk", "cache_tokens": 9},
    }
    write_json(tmp_path / "run.json", record)
    with pytest.raises(DataError, match="Name a training's folder, or the config itself"):
        read_values(tmp_path)
