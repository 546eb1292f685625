"""What the papers' evaluations read off a cache, against the same worked out densely; and a layer's pictures."""

import numpy as np
import pytest
from scipy import stats

from sae_italian.cache import FeatureCache
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.papers.measure import moments, strongest
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
