"""Hook names on the Bridge and on HookedTransformer with SAEs: legacy names work, and nothing is skipped in silence."""

import copy

import pytest
import torch

from sae_italian.base.errors import UsageError
from sae_italian.models import load_model
from sae_italian.models.activations import check_model, logits_with_replacement, read_activations
from sae_italian.models.loud import LoudHooked
from sae_italian.saes import check_fits

NAME, OTHER_NAME = "blocks.2.hook_resid_post", "blocks.2.hook_out"
TOKENS = torch.randint(3, 500, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["bridge", "hooked"])
def model(request):
    return load_model("sae-italian-mini", request.param)


@pytest.fixture(scope="module")
def bridge():
    return load_model("sae-italian-mini", "bridge")


def test_a_model_with_its_dropout_on_is_refused(mini):
    """Two measurements of it differ; one without dropout is the same in training."""
    model = copy.deepcopy(mini).train()
    assert check_model(model) is model
    model.config.attention_dropout = 0.1
    with pytest.raises(UsageError, match="its dropout is on \\(attention_dropout\\). Call model.eval"):
        check_model(model)
    assert check_model(model.eval()) is model


def test_saelens_bridge_still_drops_legacy_names(mini):
    """If this fails, SAELens has mended `hook_dict` and our subclass may go."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    stock = SAETransformerBridge.boot_transformers("m", hf_model=copy.deepcopy(mini), tokenizer=mini.tokenizer)
    assert NAME not in stock.hook_dict
    assert not stock.run_with_cache(TOKENS, names_filter=[NAME])[1]


def test_run_with_cache_takes_legacy_names(model, mini):
    _, cache = model.run_with_cache(TOKENS, names_filter=[NAME])
    assert (cache[NAME] - read_activations(mini, TOKENS, NAME)).abs().max() < 1e-4
    _, cache = model.run_with_cache(TOKENS, names_filter=NAME)
    assert cache[NAME].shape == (2, 30, mini.config.hidden_size)


def test_run_with_hooks_fires_and_changes_the_output(model, mini):
    expected = logits_with_replacement(mini, TOKENS, NAME, torch.zeros_like)
    with torch.no_grad():
        out = model.run_with_hooks(TOKENS, fwd_hooks=[(NAME, lambda x, hook: torch.zeros_like(x))])
        assert (out - expected).abs().max() < 1e-4
        assert (model(TOKENS) - mini(TOKENS).logits).abs().max() < 1e-4  # the hook is gone


def test_hooks_may_come_from_a_generator(model, mini):
    """They are looked at twice: a zip was empty by the time it was used, and nothing was hooked, without a word."""
    expected, hook = logits_with_replacement(mini, TOKENS, NAME, torch.zeros_like), lambda x, hook: torch.zeros_like(x)
    with torch.no_grad():
        out = model.run_with_hooks(TOKENS, fwd_hooks=zip([NAME], [hook], strict=True))
        assert (out - expected).abs().max() < 1e-4
        with model.hooks(zip([NAME], [hook], strict=True)):
            assert (model(TOKENS) - expected).abs().max() < 1e-4
        assert (model(TOKENS) - mini(TOKENS).logits).abs().max() < 1e-4


def test_run_with_saes_is_what_replacing_by_the_sae_is(model, mini, topk_sae):
    expected = logits_with_replacement(mini, TOKENS, NAME, topk_sae)
    with torch.no_grad():
        out = model.run_with_saes(TOKENS, saes=[topk_sae])
        assert (out - expected).abs().max() < 1e-3
        exact = model.run_with_saes(TOKENS, saes=[topk_sae], use_error_term=True)
        assert (exact - mini(TOKENS).logits).abs().max() < 1e-3
        assert (model(TOKENS) - mini(TOKENS).logits).abs().max() < 1e-4  # and taken off again


def test_hooks_fire_after_an_sae_was_there(model, mini, topk_sae):
    with torch.no_grad():
        model.run_with_saes(TOKENS, saes=[topk_sae])
        for name in [NAME] if isinstance(model, LoudHooked) else [NAME, OTHER_NAME]:
            out = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: torch.zeros_like(x))])
            assert (out - logits_with_replacement(mini, TOKENS, NAME, torch.zeros_like)).abs().max() < 1e-4
        with model.saes(saes=[topk_sae]):
            model.run_with_saes(TOKENS, saes=[topk_sae])  # and puts the one before back
            assert list(model.acts_to_saes) == [NAME]
        model.run_with_hooks(TOKENS, fwd_hooks=[(NAME, lambda x, hook: x)])


def test_latents_are_cached_under_the_legacy_name(model, mini, topk_sae):
    acts_name = f"{NAME}.hook_sae_acts_post"
    _, cache = model.run_with_cache_with_saes(TOKENS, saes=[topk_sae], names_filter=[acts_name])
    expected = topk_sae.encode(read_activations(mini, TOKENS, NAME))
    assert (cache[acts_name] - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    "place", ["hook_resid_post", "hook_attn_out", "hook_mlp_out", "mlp.hook_in", "ln2.hook_normalized"]
)
def test_every_site_is_read_and_replaced_in_a_bridge(bridge, mini, place):
    """A bridge holds its attention and its MLP under two names; that is not one module in several layers."""
    name = f"blocks.1.{place}"
    assert (read_activations(bridge, TOKENS, name) - read_activations(mini, TOKENS, name)).abs().max() < 1e-4
    if place != "ln2.hook_normalized":
        found, expected = (logits_with_replacement(each, TOKENS, name, lambda x: 0.5 * x) for each in (bridge, mini))
        assert (found - expected).abs().max() < 1e-4


def test_a_bridge_with_saes_in_it_is_not_measured(bridge, topk_sae):
    """What is read behind an SAE is its own output: the card of the second time was another SAE's."""
    with bridge.saes(saes=[topk_sae]), pytest.raises(UsageError, match=f"SAEs in it, at {NAME}. Take them out"):
        check_fits(topk_sae, bridge)
    assert check_fits(topk_sae, bridge) == NAME


def test_the_bridge_knows_both_names_and_they_are_one_hook(bridge):
    hooks = bridge.hook_dict
    assert hooks[NAME] is hooks[OTHER_NAME]


@pytest.mark.parametrize("name", ["blocks.9.hook_resid_post", "blocks.2.hook_resid_pots", "model.layers.2"])
def test_a_name_the_model_does_not_have_is_an_error(model, name):
    with pytest.raises(UsageError, match="is not in this model"):
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: x)])
    with pytest.raises(UsageError, match="is not in this model"):
        model.run_with_cache(TOKENS, names_filter=[NAME, name])
    with pytest.raises(UsageError, match="is not in this model"), model.hooks([(name, lambda x, hook: x)]):
        pass  # the bridge's own leaves it out


def test_a_hook_that_never_fires_is_an_error(model):
    with pytest.raises(UsageError, match="never fired"):
        model.run_with_cache(TOKENS, names_filter=["blocks.3.hook_resid_post"], stop_at_layer=2)


def test_an_sae_at_an_unknown_or_missing_hook_is_an_error(model, topk_sae):
    for name, message in (("blocks.9.hook_resid_post", "is not in this model"), (None, "no hook_name")):
        sae = copy.deepcopy(topk_sae)
        sae.cfg.metadata.hook_name = name
        with pytest.raises(UsageError, match=message):
            model.run_with_saes(TOKENS, saes=[sae])


def test_a_hook_that_is_switched_off_is_an_error(bridge):
    with pytest.raises((UsageError, ValueError, AssertionError)):
        bridge.run_with_hooks(TOKENS, fwd_hooks=[("blocks.2.hook_mlp_in", lambda x, hook: x)])


def test_hook_never_fired_in_hf(mini):
    from torch import nn

    from sae_italian.models.activations import read_many

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.model = mini.config, mini.model

        def forward(self, *_args, **_kwargs):
            return None

    with pytest.raises(UsageError, match="never fired"):
        read_many(Idle(), TOKENS, [NAME])
