import pytest

from sae_italian.base.errors import UsageError
from sae_italian.models import parse_hook_name


@pytest.mark.parametrize(
    ("name", "site", "path"),
    [
        ("blocks.3.hook_resid_post", "R", "model.layers.3"),
        ("blocks.0.hook_attn_out", "A", "model.layers.0.self_attn"),
        ("blocks.0.hook_mlp_out", "M", "model.layers.0.mlp"),
        ("blocks.1.mlp.hook_in", "TC", "model.layers.1.mlp"),
        ("blocks.3.hook_out", "R", "model.layers.3"),  # the Bridge's name
        ("model.layers.3", "R", "model.layers.3"),
    ],
)
def test_the_three_spellings_meet_in_one_hook(name, site, path):
    hook = parse_hook_name(name, n_layers=4)
    assert hook.site == site
    assert hook.module_path("mistral") == path
    assert parse_hook_name(hook.name) == parse_hook_name(hook.bridge_name) == hook


@pytest.mark.parametrize(
    ("name", "offered"), [("blocks.2.hook_resid_pots", "blocks.2.hook_resid_post"), ("foo", "Valid")]
)
def test_an_unknown_hook_is_refused_with_the_nearest(name, offered):
    with pytest.raises(UsageError, match=offered):
        parse_hook_name(name)


def test_a_layer_the_model_does_not_have():
    with pytest.raises(UsageError, match="layers 0 to 3"):
        parse_hook_name("blocks.4.hook_resid_post", n_layers=4)
