from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sae_italian.base.errors import UsageError
from sae_italian.models import parse_hook_name
from sae_italian.models.activations import final_gain, read_activations
from sae_italian.models.hooks import SITES
from tests.models.hub import random_model


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


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "qwen3", "gpt2", "gpt_neox"])
def test_the_last_norms_gain_is_what_the_norm_multiplies_by(family):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": 300, "head_dim": 16, "pad_token_id": 0}
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 300}
    if family == "gpt_neox":
        del sizes["num_key_value_heads"], sizes["head_dim"]
    model = random_model({"model_type": family, **sizes})
    model.config.architectures = [type(model).__name__]  # as from_pretrained leaves it
    norm = model.get_submodule(
        {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}.get(family, "model.norm")
    )
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(1, 1, 32)
    x = (x - x.mean()) / x.std(correction=0)  # normalised already, so the norm only multiplies
    assert torch.allclose(norm(x), x * final_gain(model), atol=1e-4)


def test_the_gain_of_an_unknown_family_and_of_a_norm_without_a_weight_is_refused(mini):
    class Unknown(torch.nn.Module):
        config = AutoConfig.for_model("biogpt", architectures=["BioGptForCausalLM"])

    with pytest.raises(UsageError, match="none that TransformerLens knows"):
        final_gain(Unknown())

    class Plain(torch.nn.Module):
        config = mini.config

        def __init__(self):
            super().__init__()
            self.model = torch.nn.ModuleDict({"norm": torch.nn.Identity()})

    with pytest.raises(UsageError, match="no weight in its last norm"):
        final_gain(Plain())


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
