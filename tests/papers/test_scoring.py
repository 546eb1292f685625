"""What the papers' evaluations read off a cache, against the same worked out densely; and a layer's pictures."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats

from sae_italian.cache import FeatureCache
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.papers.measure import curves, moments, strongest
from sae_italian.papers.report import scores_svg, suite_svg


def test_moments_are_those_of_the_dense_activation(small_cache):
    cache = FeatureCache.open(small_cache)
    for latent in np.argsort(-cache.statistics["count"])[:3].tolist():
        dense = np.zeros(len(cache.doc))
        position, value = cache.latent(latent)
        dense[position] = value
        dense = dense[cache.doc != NO_DOCUMENT]
        assert moments(cache, latent) == pytest.approx((stats.skew(dense), stats.kurtosis(dense)), rel=1e-6)


def test_moments_of_a_silent_latent_are_not_a_number(silent_latent):
    folder, _, latent = silent_latent
    assert np.isnan(moments(FeatureCache.open(folder), latent)).all()


def test_the_strongest_segment_marks_the_latents_own_tokens(small_cache, mini):
    cache = FeatureCache.open(small_cache, tokenizer=mini.tokenizer)
    latent = int(cache.statistics["max"].argmax())
    text = strongest(cache, latent)
    shown = cache.latent(latent).windows("top", 1).shown()[0]
    active = [shown.text[a:b].strip() for (a, b), v in zip(shown.spans.tolist(), shown.values, strict=True) if v > 0]
    assert "".join("".join(part.split("»")[0] for part in text.split("«")[1:]).split()) == "".join(
        "".join(active).split()
    )
    assert text.replace("«", "").replace("»", "").split() == shown.text.split()


def test_a_curve_is_of_tokens_that_nothing_was_fitted_on(identity_sae, monkeypatch):
    """The first half lies in the dimensions that the SAE writes, the second, which counts, in the others."""
    half, rows = copy.deepcopy(identity_sae), torch.randn(400, 128, generator=torch.Generator().manual_seed(0))
    rows[:200, 64:] = rows[200:, :64] = 0
    half.W_dec.data[:, 64:] *= 1e-3
    monkeypatch.setattr("sae_italian.papers.measure.held_out", lambda *_: (rows, rows))
    (curve,) = curves({"half": half}, None, 0).values()  # pyright: ignore[reportArgumentType]
    assert [point["k"] for point in curve] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert max(point["explained_variance"] for point in curve) < 0.01


def estimate(value):
    return {"value": value, "lo": value - 0.1, "hi": value + 0.1}


def test_pictures_hold_what_they_are_given():
    parts = ("detection", "fuzzing", "simulation")
    scores = {f"{prefix}{part}": estimate(0.7) for part in parts for prefix in ("", "lookup_", "shuffled_")}
    picture = scores_svg(scores, scores)
    assert all(label in picture for label in ("token lookup", "random SAE", *parts))
    keys = ("explained_variance_uncentred", "delta_lm_loss", "dead")
    rows = [
        {"layer": 1, "site": site, "expansion": x, **{k: estimate(0.5) for k in keys}} for site in "RM" for x in (8, 32)
    ]
    picture = suite_svg(rows)
    assert all(label in picture for label in ("L1R", "L1M", "8x", "32x"))
