"""The random SAE beside one with thresholds fires as often on the same text, so that their scores can be compared."""

import numpy as np
import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

from sae_italian.autointerp import AutointerpConfig, random_sae_control
from sae_italian.autointerp.run import TWIN_FOLDER
from sae_italian.cache import FeatureCache, build_cache
from sae_italian.evaluation.diagnosis import held_out_activations
from tests.conftest import described


def test_the_control_of_a_jumprelu_has_its_l0_and_rates(mini, tmp_path):
    """Of 457 latents on a token where the trained SAE had 41, before; the same 16,384 tokens calibrate and are cached."""
    sae = described(JumpReLUSAE(JumpReLUSAEConfig(d_in=128, d_sae=200)))
    x, *_ = held_out_activations(sae, mini, "micro-italiano", 6000)
    with torch.no_grad():
        sae.W_enc.copy_(torch.nn.functional.normalize(x[::25][:200] - x.mean(0), dim=-1).T)
        sae.threshold.copy_((x @ sae.W_enc).quantile(0.93, dim=0))
    folder = build_cache(sae, mini, "micro-italiano", tmp_path / "cache", n_tokens=20_000, context_size=64)
    cache = FeatureCache.open(folder)
    random_sae_control(cache, sae, mini, AutointerpConfig(latents=2))
    counts = [np.sort(FeatureCache.open(each).statistics["count"]) for each in (folder, folder / TWIN_FOLDER)]
    assert counts[1].sum() == pytest.approx(counts[0].sum(), rel=0.02)
    assert np.quantile(counts[1], np.arange(0.1, 1, 0.1)) == pytest.approx(
        np.quantile(counts[0], np.arange(0.1, 1, 0.1)), rel=0.1
    )


def test_the_control_has_all_of_a_text_that_is_shorter_than_was_asked_for(identity_sae, mini, jsonl, tmp_path):
    """`cache build` takes what there is by default; its control, which asked for the same, was refused after the scores."""
    options = {"n_tokens": 300_000, "at_most": True, "context_size": 64}
    cache = FeatureCache.open(build_cache(identity_sae, mini, str(jsonl), tmp_path / "cache", **options))
    random_sae_control(cache, identity_sae, mini, AutointerpConfig(latents=2))
    twin = FeatureCache.open(cache.folder / TWIN_FOLDER)
    assert twin.tokens.shape == cache.tokens.shape and (twin.tokens == cache.tokens).all()
