"""Every shipped config: it builds SAELens' own config object, keeps its paper's ratios, and the small ones train."""

import json
import re
import types
from pathlib import Path

import pytest
import yaml

from sae_italian.base.errors import UsageError
from sae_italian.models import resolve
from sae_italian.saes import load_sae
from sae_italian.training import load_spec, load_suite, read_values, train, train_suite
from sae_italian.training.config import SUITE_KEY, configs_folder

# Shapes of models that are neither in the catalogue nor reachable offline, from their papers.
SHAPES = {
    "EleutherAI/pythia-70m-deduped": ("gpt_neox", 512, 6, 2048),
    "EleutherAI/pythia-410m-deduped": ("gpt_neox", 1024, 24, 2048),
    "meta-llama/Llama-3.1-8B": ("llama", 4096, 32, 131_072),
}
FAMILIES = {"MistralForCausalLM": "mistral", "LlamaForCausalLM": "llama", "Gemma3ForCausalLM": "gemma3_text"}
RECIPES = sorted(
    file.relative_to(configs_folder()).as_posix()
    for file in configs_folder().rglob("*.yaml")
    if file.relative_to(configs_folder()).parts[0] not in ("sweeps", "curves")
)
MINI = [name for name in RECIPES if name.startswith("mini/")]


def shape_of(name: str) -> types.SimpleNamespace:
    """Return what a recipe needs of a model's config, from the catalogue or SHAPES. KeyError for any other model."""
    entry = resolve(name).entry
    if entry is not None:
        family, d_model, layers = FAMILIES[entry.architecture], entry.d_model, entry.n_layers
        context = entry.context
    else:
        family, d_model, layers, context = SHAPES[name]
    return types.SimpleNamespace(
        model_type=family,
        architectures=None if entry is None else [entry.architecture],
        hidden_size=d_model,
        num_hidden_layers=layers,
        max_position_embeddings=context,
        intermediate_size=4 * d_model,
    )


@pytest.fixture
def offline(monkeypatch):
    """Let shapes come from the catalogue, as no hub is reachable."""
    for module in ("sae_italian.training.config", "sae_italian.training.suite"):
        monkeypatch.setattr(f"{module}.load_model_config", shape_of)
    monkeypatch.setattr(
        "sae_italian.training.suite.n_parameters",
        lambda name: 12 * shape_of(name).num_hidden_layers * shape_of(name).hidden_size ** 2,
    )


def specs_of(name: str) -> dict:
    """Return the runs of a config by name, one for a run and many for a suite."""
    if SUITE_KEY in read_values(name):
        return load_suite(name).members()
    return {name: load_spec(name)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_config_builds_saelens_own_config(name, offline):
    from sae_lens import LanguageModelSAERunnerConfig
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
    from sae_lens.saes.sae import TrainingSAEConfig

    for spec in specs_of(name).values():
        config = spec.sae_config()
        assert isinstance(config, TrainingSAEConfig) and config.architecture() in SAE_TRAINING_CLASS_REGISTRY
        assert config.d_in == shape_of(spec.model).hidden_size
        steps = spec.training_tokens // spec.train_batch_size_tokens
        assert spec.lr_warm_up_steps + spec.lr_decay_steps < steps
        if spec.lr_decay_steps and name != "mini/topk.yaml":
            assert spec.lr_decay_steps == pytest.approx(0.2 * steps, abs=2), "the last fifth, as the file says"
        assert spec.buffer_tokens >= 2 * spec.train_batch_size_tokens
    if "hub" not in name and not spec.corpus.startswith("hf://"):
        assert isinstance(spec.to_saelens(), LanguageModelSAERunnerConfig)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_suite_fits_its_memory(name, offline):
    values = read_values(name)
    if SUITE_KEY in values:
        groups = load_suite(name).groups()
        assert groups and all(groups)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_config_says_what_it_is_and_is_readable(name):
    lines = (configs_folder() / name).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and max(map(len, lines)) <= 130
    assert sum(not line.startswith(("#", " ")) and ":" in line for line in lines) <= 22, "few keys"


def test_every_paper_has_its_recipe_and_every_recipe_a_small_one(offline):
    for wanted in (
        *(f"minerva-{size}/clic-it-2025.yaml" for size in ("350m", "1b", "3b", "7b")),
        *(f"minerva-350m/{kind}.yaml" for kind in ("jumprelu", "gated", "batchtopk", "matryoshka")),
        *(f"cunningham-2023/{model}.yaml" for model in ("pythia-70m", "pythia-410m", "minerva-350m", "minerva-1b")),
        *(f"llama-scope/{model}.yaml" for model in ("minerva-1b", "llama-3.1-8b", "suite-minerva-1b")),
    ):
        assert wanted in RECIPES
    small = {spec.sae["architecture"] for name in MINI for spec in specs_of(name).values()}
    large = {spec.sae["architecture"] for name in RECIPES if name not in MINI for spec in specs_of(name).values()}
    assert large <= small


def test_papers_values():
    clic = load_spec("minerva-1b/clic-it-2025")
    assert clic.hook_name == "blocks.14.hook_resid_post" and clic.sae["d_sae"] == 65_536 == 32 * 2048
    assert clic.training_tokens == 6_000_000_000 and clic.corpus == "clean-mc4-it-tiny"
    tied = load_spec("cunningham-2023/pythia-70m")
    assert tied.sae["l1_coefficient"] == pytest.approx(8.6e-4 * 512, abs=1e-3) and tied.sae["d_sae"] == 2 * 512
    assert (tied.lr, tied.train_batch_size_tokens) == (1e-3, 256)
    scope = load_spec("llama-scope/llama-3.1-8b")
    assert (scope.sae["k"], scope.lr, scope.k_anneal_share, scope.sae["d_sae"]) == (50, 8e-4, 0.1, 32_768)


def test_the_suite_of_llama_scope_has_128_saes(offline):
    members = load_suite("llama-scope/suite-minerva-1b").members()
    assert len(members) == 16 * 4 * 2 and {"L14R-32x", "L0TC-8x", "L15A-8x", "L7M-32x"} <= set(members)
    ratios = load_suite("cunningham-2023/pythia-70m-ratios").members()
    assert [spec.sae["d_sae"] for spec in ratios.values()] == [256, 512, 1024, 2048, 4096, 8192, 16_384]


def test_commands_named_in_the_configs_exist():
    from sae_italian import cli as app

    text = "\n".join((configs_folder() / name).read_text(encoding="utf-8") for name in RECIPES)
    commands = re.findall(r"`sae-italian ([^`]*)`", text)
    assert commands
    for command in commands:
        app.build().parse_args(command.split(), exit_on_error=False, print_error=False)


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        (
            "mini/topk",
            "hook_name_out=blocks.1.hook_mlp_out",
            "'sparse_topk' does not go with hook_name_out 'blocks.1.hook_mlp_out'.*an SAE has none",
        ),
        ("mini/transcoder", "hook_name_out=null", "does not go with hook_name_out None.*e.g. blocks.1.hook_mlp_out"),
        ("mini/transcoder", "hook_name_out=blocks.0.hook_mlp_out", "comes before hook_name"),
        ("mini/transcoder", "hook_name_out=blocks.9.hook_mlp_out", "layers 0 to 3"),
        ("mini/topk", "k_anneal_share=1.5", "config key 'k_anneal_share'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, override, message):
    with pytest.raises(UsageError, match=message) as error:
        load_spec(config, override).to_saelens()
    assert "\n" not in str(error.value)


FEW_STEPS = (
    "training_tokens=768",
    "train_batch_size_tokens=256",
    "buffer_tokens=1024",
    "store_batch_size_prompts=8",
    "lr_warm_up_steps=0",
    "lr_decay_steps=0",
)


@pytest.mark.parametrize("name", MINI)
def test_a_small_recipe_trains_and_its_sae_loads(name, tmp_path):
    if SUITE_KEY in read_values(name):
        folders = train_suite(load_suite(name, *FEW_STEPS), tmp_path / "out")
    else:
        folders = [train(load_spec(name, *FEW_STEPS), tmp_path / "out")]
    for folder in folders:
        sae = load_sae(folder)
        assert sae.cfg.metadata.model_name == "sae-italian-mini" and sae.cfg.normalize_activations == "none"
        assert (sae(sae.W_enc.new_ones(3, sae.cfg.d_in))).isfinite().all()


# What a whole run ends with: explained variance at least, L0 between, share of dead latents at most.
HEALTHY = {
    "mini/topk.yaml": (0.8, 8, 8, 0.2),
    "mini/clic-it-2025.yaml": (0.7, 8, 8, 0.55),
    "mini/batchtopk.yaml": (0.75, 7, 9, 0.2),
    "mini/matryoshka.yaml": (0.6, 7, 9, 0.3),
    "mini/jumprelu.yaml": (0.65, 5, 16, 0.2),
    "mini/gated.yaml": (0.65, 5, 30, 0.2),
    "mini/cunningham-2023.yaml": (0.7, 20, 45, 0.1),
    "mini/llama-scope.yaml": (0.75, 8, 8, 0.1),
    "mini/transcoder.yaml": (0.5, 8, 8, 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MINI if SUITE_KEY not in read_values(name)])
def test_a_small_recipe_ends_healthy(name, tmp_path):
    spec = load_spec(name)
    rows = (train(spec, tmp_path / "out") / "metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, rows) if "metrics/l0" in row][-1]
    least, lo, hi, dead = HEALTHY[name]
    assert last["metrics/explained_variance"] > least and lo <= last["metrics/l0"] <= hi
    assert last["sparsity/dead_features"] <= dead * spec.sae["d_sae"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MINI if SUITE_KEY in read_values(name)])
def test_a_small_suite_ends_healthy(name, tmp_path):
    for folder in train_suite(load_suite(name), tmp_path / "out"):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["metrics/explained_variance"] > 0.3
        # at step 0 an annealing lets all latents fire, so the loss is low; in mini/suite it ends at step 10
        assert rows[1]["step"] == 10
        assert rows[-1]["losses/mse_loss"] < 0.8 * rows[1]["losses/mse_loss"]


def test_yaml_of_every_config_has_no_key_twice():
    """YAML lets the second of two equal keys win without a word."""

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader, node):
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), keys
        return loader.construct_mapping(node)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    for name in RECIPES:
        yaml.load(Path(configs_folder() / name).read_text(encoding="utf-8"), Strict)  # noqa: S506
