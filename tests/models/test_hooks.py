import pytest
from transformers import AutoConfig

from sae_italian.base.errors import UsageError
from sae_italian.models import parse_hook_name
from sae_italian.models.hooks import SITES


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
