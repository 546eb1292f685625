"""Feature patching: what patching nothing, everything and the one right latent must give, and the original's decisions."""

import copy
import json

import numpy as np
import pytest
import torch

from sae_italian.analysis import patching
from sae_italian.analysis.patching import Patcher, PatchInputs, eliminate, patch_inputs, patch_saes, thresholds
from sae_italian.analysis.tasks import default_words, ioi_pairs
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import time_bound
from sae_italian.models.activations import logits_with_replacement, read_activations
from sae_italian.saes.baselines import random_twin
from tests.analysis.causal.planted import Pca, name_carrier

PLANTED = 17
FEW = (1e-4, 1e-3, 1e-2, 0.1, 1.0)


@pytest.fixture(scope="module")
def pairs(mini):
    return ioi_pairs(5, mini.tokenizer, default_words("micro-italiano"), seed=1)


@pytest.fixture(scope="module")
def inputs(mini, pairs):
    return patch_inputs(mini.tokenizer, mini, pairs)


def last_logits(model, tokens):
    return model(tokens, use_cache=False).logits[0, -1].detach()


def ids(mini, text):
    return mini.tokenizer(text, return_tensors="pt").input_ids


def test_patching_a_run_with_itself_changes_nothing(mini, identity_sae, pairs):
    same = patch_inputs(mini.tokenizer, mini, ((pair.base, pair.base) for pair in pairs))
    patcher = Patcher(mini, identity_sae, same)
    assert len(patcher.candidates) == 0
    assert patcher.unpatched.abs().max() < 1e-6 and patcher.patched_kl().abs().max() < 1e-6
    assert patcher.magnitude(patcher.delta()) == 0


def test_patching_everything_gives_the_counterfactual_logits(mini, identity_sae, topk_sae, pairs, inputs):
    """An SAE without error needs its latents alone; any other needs its error patched too."""
    patcher = Patcher(mini, identity_sae, inputs)
    assert patcher.unpatched.min() > 0.5 and patcher.patched_kl().max() < 1e-5
    for row, pair in enumerate(pairs):
        added = patcher.delta()[row : row + 1, : int(inputs.lengths[row])]
        patched = logits_with_replacement(mini, ids(mini, pair.base), patcher.hook_out, lambda x, a=added: x + a)
        assert torch.allclose(patched[0, -1], last_logits(mini, ids(mini, pair.counterfactual)), atol=1e-4)
    delta, lengths = patcher.delta(), inputs.lengths.tolist()
    size = torch.cat([delta[row, :n].norm(dim=-1) for row, n in enumerate(lengths)])
    assert len(set(lengths)) > 1 and patcher.magnitude(delta) == pytest.approx(float(size.mean()), rel=1e-5)
    lossy = Patcher(mini, topk_sae, inputs)
    base, target = (read_activations(mini, tokens, lossy.hook_out) for tokens in (inputs.base, inputs.target))
    whole = (target - base) * inputs.differ[..., None]
    assert lossy.kl(torch.arange(lossy.n_pairs), whole).max() < 1e-5 < 0.5 < lossy.patched_kl().max()


@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.3.hook_resid_post"])
def test_a_run_begun_at_the_sae_is_the_whole_run(mini, identity_sae, pairs, inputs, hook_name):
    """The blocks before the edit are left out; the answer is that of the whole model, at every site."""
    sae = copy.deepcopy(identity_sae)
    sae.cfg.metadata.hook_name = hook_name
    patcher = Patcher(mini, sae, inputs)
    chosen = torch.arange(len(patcher.candidates)) % 3 == 0
    delta, rows = patcher.delta(chosen), torch.tensor([3, 1])
    found = patcher.kl(rows, delta[rows])
    for row, kl in zip(rows.tolist(), found, strict=True):
        added = delta[row : row + 1, : int(inputs.lengths[row])]
        edited = logits_with_replacement(mini, ids(mini, pairs[row].base), hook_name, lambda x, a=added: x + a)[0, -1]
        log_p = edited.log_softmax(-1)
        log_q = last_logits(mini, ids(mini, pairs[row].counterfactual)).log_softmax(-1)
        assert float(kl.detach()) == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum().detach()), abs=1e-4)
    assert last_logits(mini, ids(mini, pairs[0].base)).isfinite().all()  # the model itself is whole again


def test_the_latent_that_carries_the_name_is_found_first(mini, identity_sae):
    texts = [
        f"{when} {{}} e {giver} sono andati al {place}, {giver} ha dato un libro a"
        for when, giver, place in (
            ("Quando", "Marco", "mercato"),
            ("Appena", "Paolo", "parco"),
            ("Mentre", "Marco", "bar"),
        )
    ]
    carried = [(text.format("Luca"), text.format("Bruno")) for text in texts]
    sae = name_carrier(mini, identity_sae, carried[0], PLANTED)
    found = patch_saes(mini, mini.tokenizer, {"planted": sae}, carried, thresholds=FEW).curves[0]
    assert found.n_candidates > 10
    assert found.order[0] == PLANTED == found.effects[0].latent
    assert found.effects[0].exact == pytest.approx(found.unpatched.value, rel=1e-3)  # alone, it does everything
    alone = next(point for point in found.points if point.n_patched == 1)
    assert alone.kl.value < 1e-3 * found.unpatched.value


def one_at_a_time(patcher, thresholds, seed):
    """The paper's loop as it stands: every visit runs all prompts once."""
    rng = np.random.default_rng(seed)
    kept = torch.ones(len(patcher.candidates), dtype=torch.bool)
    kl = float(patcher.patched_kl(kept).double().mean())
    trace, removed = [], []
    for threshold in thresholds:
        for column in rng.permutation(kept.nonzero()[:, 0].tolist()):
            without = kept.clone()
            without[column] = False
            new = float(patcher.patched_kl(without).double().mean())
            if new - kl < threshold:
                kept, kl = without, new
                removed.append(int(patcher.candidates[column]))
        trace.append((threshold, int(kept.sum()), kl))
    return trace, removed


class CountedPatcher(Patcher):
    """Counts how often the model is run."""

    passes = 0

    def _last_log_p(self, *args):
        self.passes += 1
        return super()._last_log_p(*args)


@pytest.mark.parametrize("kind", ["topk", "pca"])
def test_guessing_ahead_takes_the_decisions_of_one_step_at_a_time(mini, topk_sae, inputs, kind):
    dictionary = topk_sae
    if kind == "pca":
        dictionary = Pca(topk_sae, read_activations(mini, inputs.base, "blocks.2.hook_resid_post")[0])
        dictionary.components, dictionary.cfg.d_sae = dictionary.components[:20], 20
    two, levels = PatchInputs(*(part[:2] for part in inputs)), (1e-3, 0.05, 1.0)
    patcher, plain = CountedPatcher(mini, dictionary, two), CountedPatcher(mini, dictionary, two)
    points, order = eliminate(patcher, levels, seed=3)
    trace, removed = one_at_a_time(plain, levels, seed=3)
    assert [point.n_patched for point in points[1:]] == [n for _, n, _ in trace]
    assert [point.kl.value for point in points[1:]] == pytest.approx([kl for _, _, kl in trace], abs=1e-4)
    assert order[points[-1].n_patched :] == removed[::-1]
    assert patcher.passes < plain.passes / 2


def test_an_effect_is_what_patching_that_latent_alone_does(mini, topk_sae, inputs):
    patcher = Patcher(mini, topk_sae, inputs)
    effects, attribution = patcher.effects(), patcher.attribution()
    for column in (0, 5, int(effects.argmax())):
        alone = torch.arange(len(effects)) == column
        fall = float((patcher.unpatched - patcher.patched_kl(alone)).mean())
        assert float(effects[column]) == pytest.approx(fall, abs=1e-5)
    small, large = 2e-4, attribution.abs().topk(4).indices  # for a small enough edit, the first order is all there is
    patcher.diff *= small
    assert torch.allclose(patcher.effects()[large], small * attribution[large], rtol=0.1)


def test_the_report_holds_every_curve_and_is_the_same_each_time(mini, topk_sae, pairs):
    saes = {"SAE": topk_sae, "twin": random_twin(topk_sae)}
    one, two = (patch_saes(mini, mini.tokenizer, saes, pairs[:2], thresholds=(0.01, 1.0, 100.0)) for _ in range(2))
    shown = json.loads(json.dumps(one.as_dict()))
    assert [curve["name"] for curve in shown["curves"]] == ["SAE", "twin"] and shown["n_pairs"] == 2
    assert one.svg() == two.svg() and one.svg().startswith("<?xml")
    curve = one.curves[0]
    assert [point.n_patched for point in curve.points] == sorted((p.n_patched for p in curve.points), reverse=True)
    assert curve.points[-1].n_patched == 0 and curve.points[-1].kl.value == pytest.approx(
        curve.unpatched.value, rel=1e-3
    )
    assert len(curve.order) == curve.n_candidates == len(set(curve.order)) and -1 <= curve.spearman <= 1
    half = curve.reached(0.5)
    assert half is None or half.kl.value <= 0.5 * curve.unpatched.value
    assert one.table().count("\n") == 3 and "| SAE |" in one.table()
    assert len(thresholds()) == 50 and thresholds()[0] == pytest.approx(1e-5) and thresholds()[-1] == pytest.approx(1)


def test_thresholds_rise_and_the_default_kind_of_numbers_changes_nothing(mini, topk_sae, pairs):
    def told(thresholds):
        return patch_saes(mini, mini.tokenizer, {"a": topk_sae}, pairs[:2], thresholds=thresholds).as_dict()

    rising = told((0.1, 0.5))
    assert told([0.5, 0.1, 0.5]) == rising
    torch.set_default_dtype(torch.float64)
    try:
        assert told((0.1, 0.5))["curves"][0]["order"] == rising["curves"][0]["order"]
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_sae_that_is_dead_patches_nothing(mini, topk_sae, pairs):
    dead = copy.deepcopy(topk_sae)
    torch.nn.init.zeros_(dead.W_enc)
    found = patch_saes(mini, mini.tokenizer, {"dead": dead}, pairs[:5], thresholds=thresholds(3))
    (curve,) = found.curves
    assert curve.n_candidates == 0 and curve.all_patched == curve.unpatched and curve.reached(0.5) is None
    assert "| dead | 0 |" in found.table() and found.svg()


def test_bad_input_is_refused_in_one_line(mini, topk_sae, pairs):
    other = copy.deepcopy(topk_sae)
    other.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    cases = [
        ({"saes": {"a": topk_sae, "b": other}, "pairs": pairs}, "a writes at blocks.2.*b writes at blocks.1"),
        ({"saes": {}, "pairs": pairs}, "no SAE was given by name"),
        ({"saes": topk_sae, "pairs": pairs}, "by name, as {'mine': sae}, but a TopKSAE"),
        ({"saes": [topk_sae], "pairs": pairs}, "by name, as {'mine': sae}, but a list"),
        *(
            ({"saes": {"a": topk_sae}, "pairs": pairs, "thresholds": none}, "thresholds is .*numbers above 0")
            for none in ([], [-1.0], [0.1, float("nan")])
        ),
        ({"saes": {"a": topk_sae}, "pairs": []}, "no pairs"),
        ({"saes": {"a": topk_sae}, "pairs": [("Marta ha dato a", "La nonna ha dato a")]}, "both need as many"),
    ]
    for arguments, said in cases:
        with pytest.raises(UsageError, match=said) as error:
            patch_saes(mini, mini.tokenizer, **arguments)
        assert "\n" not in str(error.value)


def test_what_the_time_bound_left_out_is_no_effect_of_zero(mini, topk_sae, inputs, pairs, monkeypatch):
    """A bound that ends the effects after one batch: the others are not known, and nothing is compared with them."""
    monkeypatch.setattr(patching, "BATCH_ROWS", 16)
    with time_bound(1e-9) as cut:
        patcher = Patcher(mini, topk_sae, inputs)
        effects = patcher.effects()
        (curve,) = patch_saes(mini, mini.tokenizer, {"one": topk_sae}, pairs, thresholds=(1e-3, 1.0)).curves
    known = torch.isfinite(effects)
    assert 0 < int(known.sum()) <= 16 and int(known.sum()) < len(effects) and len(cut) == 3
    assert curve.spearman is None and 0 < len(curve.effects) <= 16
    assert all(torch.isfinite(torch.tensor(effect.exact)) for effect in curve.effects)
    alone = torch.arange(len(effects)) == int(known.nonzero()[0])
    fall = (patcher.unpatched - patcher.patched_kl(alone))[0]  # of the first pair, the only one that was run
    assert float(effects[alone]) == pytest.approx(float(fall), abs=1e-4)
