"""The causal tree: a latent that another is made of is found, with the share that it has."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch

from sae_italian.analysis.tree import _Growth, causal_tree
from sae_italian.base.errors import UsageError
from sae_italian.base.report import plain

TARGET, CAUSE, DECOY = 3, 7, 9
OPTIONS = {"corpus": "micro-italiano", "n_tokens": 1000, "n_contexts": 3, "context_size": 16, "branches": 2}


@pytest.fixture(scope="module")
def layers(identity_sae):
    """Identity SAEs at the residual stream before and after the last block, and one before them."""
    saes = []
    for hook in ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "blocks.3.hook_resid_pre"):
        sae = copy.deepcopy(identity_sae)
        sae.cfg.metadata.hook_name = hook
        saes.append(sae)
    return saes


@pytest.fixture(scope="module")
def planted(layers):
    """The target reads 0.75 of one dimension and 0.25 of another, at the very place where the SAE before writes them.

    `blocks.2.hook_resid_post` and `blocks.3.hook_resid_pre` are the same activation.
    """
    _, before, target = layers
    target = copy.deepcopy(target)
    with torch.no_grad():
        target.W_enc.zero_()
        target.W_enc[CAUSE, TARGET], target.W_enc[DECOY, TARGET] = 0.75, 0.25
        target.b_enc.zero_()
    return before, target


def test_the_causes_are_found_with_their_shares(mini, planted):
    before, target = planted
    root = causal_tree(mini, [("before", before), ("target", target)], TARGET, **OPTIONS | {"n_contexts": 12})
    assert (root.latent, root.n_contexts, root.drop) == (TARGET, 12, None) and root.maximum > 0
    assert {child.latent for child in root.children} <= {CAUSE, DECOY, CAUSE + 128, DECOY + 128}
    first = root.children[0]
    assert first.drop.value > 0.3 and first.drop.lo <= first.drop.value <= first.drop.hi
    assert first.sae == "before" and all("«" in example for example in root.examples)


def test_ablating_the_only_cause_silences_the_target(mini, planted):
    before, target = planted
    target = copy.deepcopy(target)
    target.W_enc.data[DECOY, TARGET] = 0
    root = causal_tree(mini, [("before", before), ("target", target)], TARGET, **OPTIONS)
    assert [child.latent for child in root.children] == [CAUSE]
    assert root.children[0].drop.value == pytest.approx(1, abs=1e-4)
    one = causal_tree(mini, [("before", before), ("target", target)], TARGET, **OPTIONS | {"n_contexts": 1})
    assert "-100%  " in one.text()  # without the interval that one context does not have


def test_a_drop_is_measured_where_it_did_not_choose_its_latent():
    """Of 100 latents that change nothing but by noise, the largest drop of the contexts that chose it is far from 0."""

    class Noise(_Growth):
        def _falls(self, *_):
            return pd.Series(rng.normal(0, 0.3, 100))

    held = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        growth = Noise(None, [("a", None), ("b", None)], ["", ""], torch.empty(0), {}, 2, 20, seed)
        held += [drop.lo < 0 < drop.hi for _, drop in growth._causes(1, 0, [(torch.empty(0), 1.0)] * 20)]
    assert len(held) == 60 and np.mean(held) > 0.85  # 95 %; of the contexts that chose them none


def test_contexts_are_of_windows_in_which_it_is_half_as_active_as_ever():
    tokens, activation = (
        torch.arange(9).reshape(3, 3),
        torch.tensor([[0.0, 4.0, 1.0], [1.0, 0.0, 0.0], [2.0, 0.0, 0.0]]),
    )
    growth = _Growth(None, [], [], tokens, {}, 1, 5, 0)
    assert [(ids.tolist(), a) for ids, a in growth._contexts(activation)] == [([0, 1], 4.0), ([6], 2.0)]
    assert not growth._contexts(0 * activation)


def test_the_tree_goes_down_layer_by_layer(mini, layers):
    names = ("first", "second", "third")
    root = causal_tree(mini, list(zip(names, layers, strict=True)), 5, **OPTIONS)
    assert root.sae == "third" and all(child.sae == "second" for child in root.children)
    assert root.children[0].latent == 5  # third and second see the same activation
    grandchildren = [node for child in root.children for node in child.children]
    assert grandchildren and all(node.sae == "first" and node.drop.value > 0 for node in grandchildren)
    drops = [child.drop.value for child in root.children]
    assert drops == sorted(drops, reverse=True) and len(root.children) <= 2
    shown = json.loads(json.dumps(plain(root)))
    assert shown["children"][0]["latent"] == 5 and shown["children"][0]["drop"]["value"] == pytest.approx(1, abs=1e-4)
    assert root.svg().startswith("<?xml") and root.svg() == root.svg()
    assert root.text().splitlines()[1].startswith("  second 5  -100%")


def test_bad_input_is_refused_in_one_line(mini, layers):
    first, second, third = layers
    never = copy.deepcopy(third)
    never.b_enc.data[5] = -1e6
    cases = [
        ([("a", first)], 5, "at least two layers"),
        ([("b", second), ("a", first)], 5, "in the order of layers"),
        ([("a", first), ("b", second)], 1000, "latents 0 to 255"),
        ([("a", first), ("c", never)], 5, "never active in [0-9,]+ tokens"),
    ]
    for saes, latent, said in cases:
        with pytest.raises(UsageError, match=said) as error:
            causal_tree(mini, saes, latent, **OPTIONS)
        assert "\n" not in str(error.value)
