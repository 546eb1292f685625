from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sae_italian.base.errors import UsageError
from sae_italian.models import load_model, parse_hook_name
from sae_italian.models.activations import centred, logit_lens, read_activations
from sae_italian.models.hooks import SITES, adapter_of
from tests.models.hub import random_model, save_model


@pytest.mark.parametrize(
    ("name", "site", "path"),
    [
        ("blocks.3.hook_resid_post", "R", "model.layers.3"),
        ("blocks.0.hook_attn_out", "A", "model.layers.0.self_attn"),
        ("blocks.0.hook_mlp_out", "M", "model.layers.0.mlp"),
        ("blocks.1.mlp.hook_in", "TC", "model.layers.1.mlp"),
        ("blocks.3.hook_out", "R", "model.layers.3"),  # the Bridge's name
        ("blocks.3.mlp.hook_out", "M", "model.layers.3.mlp"),
        ("model.layers.3", "R", "model.layers.3"),
        ("layers.3.mlp", "M", "model.layers.3.mlp"),
        ("gpt_neox.layers.2.attention", "A", "model.layers.2.self_attn"),
        ("h.1.attn", "A", "model.layers.1.self_attn"),
    ],
)
def test_the_three_spellings_meet_in_one_hook(name, site, path, mini):
    hook = parse_hook_name(name, n_layers=4)
    assert hook.site == site
    assert hook.module_path(mini.config) == f"model.{hook.llama_path}" == path
    assert parse_hook_name(hook.name) == hook


@pytest.mark.parametrize(
    ("name", "offered"), [("blocks.2.hook_resid_pots", "blocks.2.hook_resid_post"), ("foo", "Valid")]
)
def test_an_unknown_hook_is_refused_with_the_nearest(name, offered):
    with pytest.raises(UsageError, match=offered):
        parse_hook_name(name)


def test_a_layer_the_model_does_not_have():
    with pytest.raises(UsageError, match="layers 0 to 3"):
        parse_hook_name("blocks.4.hook_resid_post", n_layers=4)


@pytest.mark.parametrize("form", ["blocks.{}.hook_resid_post", "model.layers.{}"])
def test_a_number_that_python_reads_no_more_is_an_unknown_hook(form):
    with pytest.raises(UsageError, match="is unknown") as told:
        parse_hook_name(form.format("9" * 6_000))
    assert len(str(told.value)) < 300


@pytest.mark.parametrize(
    ("model_type", "paths"),
    [
        ("gpt2", ["transformer.h.1", "transformer.h.1.attn", "transformer.h.1.mlp", "transformer.h.1.mlp"]),
        ("qwen3", ["model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp", "model.layers.1.mlp"]),
        (
            "gemma3_text",  # a norm behind attention and MLP: what it gives is what is added to the residual stream
            ["model.layers.1", "model.layers.1.post_attention_layernorm", "model.layers.1.post_feedforward_layernorm"]
            + ["model.layers.1.mlp"],
        ),
    ],
)
def test_every_family_that_transformer_lens_knows(model_type, paths):
    config = AutoConfig.for_model(model_type, architectures=["Gemma3ForCausalLM"] if "gemma" in model_type else None)
    assert [parse_hook_name(f"blocks.1.{hook}").module_path(config) for hook in SITES.values()] == paths


def test_an_unknown_family_is_refused_by_name():
    config = AutoConfig.for_model("biogpt", architectures=["BioGptForCausalLM"])
    with pytest.raises(UsageError, match=r"'biogpt' \(BioGptForCausalLM\) is none that TransformerLens knows"):
        parse_hook_name("blocks.1.hook_resid_post").module_path(config)


def test_a_site_that_is_no_single_module_is_refused():
    """Granite scales what attention and MLP give on its way to the residual stream; no module holds the result."""
    config = AutoConfig.for_model("granite", architectures=["GraniteForCausalLM"])
    with pytest.raises(UsageError, match="blocks.1.hook_mlp_out' is no single module of 'granite'"):
        parse_hook_name("blocks.1.hook_mlp_out").module_path(config)


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 64, "vocab_size": 300, "head_dim": 16, "pad_token_id": 0}
GPT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize(
    "family",
    ["gemma", "gemma2", "gemma3_text", "qwen3", "olmo2", "gpt2", "gpt_neox", "stablelm", "cohere", "nemotron", "phi"],
)
def test_the_logit_lens_is_what_the_models_own_end_makes_of_a_direction(family):
    """But for the norm's scale: Gemma's and Nemotron's gain is 1 + w, a LayerNorm takes the mean away, Cohere's too."""
    sizes = {**GPT, "vocab_size": len(load_model("mini").tokenizer)} if family.startswith("gpt") else SIZES
    model = random_model({"model_type": family, **sizes})
    model.config.architectures = [type(model).__name__]  # as from_pretrained leaves it
    norm = model.get_submodule(adapter_of(model.config).component_mapping["ln_final"].name)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    head, d = model.get_output_embeddings().weight, torch.randn(20, 32) + 1.0
    with torch.no_grad():
        own = (norm(d) - norm(torch.zeros(32))) @ head.T
    found = logit_lens(model)(d)
    assert torch.allclose(*(x / x.norm(dim=-1, keepdim=True) for x in (found, own)), atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_logit_lens_is_transformer_lens_own(family, tmp_path):
    """Of weights folded as TransformerLens folds them, W_U is the lens."""
    mini = load_model("mini")
    sizes = {**(GPT if family.startswith("gpt") else SIZES), "vocab_size": len(mini.tokenizer)}
    save_model(random_model({"model_type": family, "max_position_embeddings": 64, **sizes}), tmp_path)
    theirs: Any = load_model(str(tmp_path), "hooked")
    theirs.process_weights_(center_writing_weights=False, center_unembed=False)
    d = torch.randn(20, 32) + 1.0
    assert torch.allclose(logit_lens(load_model(str(tmp_path)))(d), d @ theirs.W_U, atol=1e-5)


def test_a_norm_that_makes_nothing_of_anything_says_nothing_of_others_of_its_class():
    nothing, norm, x = torch.nn.RMSNorm(8, eps=1e-6), torch.nn.RMSNorm(8, eps=1e-6), torch.randn(3, 8) + 1.0
    torch.nn.init.zeros_(nothing.weight)
    centred(x, nothing)
    assert torch.equal(centred(x, norm), x)


def test_the_lens_of_an_unknown_family_and_of_a_norm_without_a_weight_is_refused(mini):
    class Unknown(torch.nn.Module):
        config = AutoConfig.for_model("biogpt", architectures=["BioGptForCausalLM"])

    with pytest.raises(UsageError, match="none that TransformerLens knows"):
        logit_lens(Unknown())

    class Plain(torch.nn.Module):
        config = mini.config

        def __init__(self):
            super().__init__()
            self.model = torch.nn.ModuleDict({"norm": torch.nn.Identity()})

    with pytest.raises(UsageError, match="no weight in its last norm"):
        logit_lens(Plain())


def tiny() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = random_model({"model_type": "llama", "intermediate_size": 64, "vocab_size": 300, **sizes})
    model.config.architectures = [type(model).__name__]
    return model


def test_a_layer_that_is_used_twice_is_refused():
    """As ALBERT shares its layers: the hook fires once for each, and the first would pass for all."""
    model, tokens = tiny(), torch.arange(6)[None]
    assert read_activations(model, tokens, "blocks.2.hook_resid_post").shape == (1, 6, 32)
    model.model.layers[2] = model.model.layers[0]
    for hook in ("blocks.0.hook_resid_post", "blocks.2.hook_mlp_out"):
        with pytest.raises(UsageError, match=r"uses one module as model.layers.0.*, model.layers.2"):
            read_activations(model, tokens, hook)
    assert read_activations(model, tokens, "blocks.1.hook_resid_post").shape == (1, 6, 32)


def test_a_layer_of_another_width_is_refused(tmp_path):
    from sae_italian.models import load_model_config

    model, tokens = tiny(), torch.arange(6)[None]
    model.model.layers[2].mlp = torch.nn.Sequential(model.model.layers[2].mlp, torch.nn.Linear(32, 48))
    with pytest.raises(UsageError, match="'blocks.2.hook_mlp_out' has 48 dimensions.*config says 32"):
        read_activations(model, tokens, "blocks.2.hook_mlp_out")
    config = AutoConfig.for_model("gemma3")  # a model that sees has its width one level down
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no one hidden_size"):
        load_model_config(str(tmp_path))
