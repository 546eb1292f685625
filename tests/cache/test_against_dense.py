"""Caches of arbitrary activations, compared with the dense array they were made from."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from sae_italian.base.errors import DataError, UsageError
from sae_italian.cache import build, layout, shards
from sae_italian.cache.layout import FP16_MAX
from sae_italian.cache.shards import encode_sparse
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.saes.sparse import top_positive
from tests.cache.made import VOCABULARY, made_cache


def drawn(seed: int, n_windows: int, context: int, d_sae: int, density: float, loud: bool):
    """Return activations, documents and tokens; the first token of a window is special, documents end anywhere."""
    rng = np.random.default_rng(seed)
    acts = rng.gamma(2.0, 1.0, (n_windows, context, d_sae)).astype(np.float32)
    acts *= rng.random(acts.shape) < density * rng.random(d_sae)
    acts[:, 0] = 0
    if loud:
        acts[rng.random(acts.shape) < 0.1] *= 1e6
    doc = np.cumsum(rng.random((n_windows, context)) < 0.2).reshape(n_windows, context)
    doc -= doc.min()
    doc[:, 0] = NO_DOCUMENT
    _, doc[:, 1:] = (
        np.unique(doc[:, 1:], return_inverse=True)[0],
        np.unique(doc[:, 1:], return_inverse=True)[1].reshape(n_windows, context - 1),
    )
    return acts, doc, rng.integers(1, VOCABULARY, (n_windows, context))


CASES = {
    "seed": st.integers(0, 10**6),
    "n_windows": st.integers(1, 9),
    "context": st.sampled_from([3, 8, 40]),
    "d_sae": st.sampled_from([2, 5, 30]),
    "density": st.sampled_from([0.0, 0.05, 0.9]),
    "per_shard": st.integers(1, 4),
    "loud": st.booleans(),
    "small_ranges": st.booleans(),
}


@settings(max_examples=25, deadline=None)
@given(**CASES)
def test_latents_windows_and_statistics_equal_the_dense_reference(
    seed, n_windows, context, d_sae, density, per_shard, loud, small_ranges
):
    acts, doc, tokens = drawn(seed, n_windows, context, d_sae, density, loud)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "LATENTS_PER_RANGE", 3 if small_ranges else 512)
        patch.setattr(build, "NON_ZEROS_PER_RANGE", 10 if small_ranges else 2**22)
        cache = made_cache(Path(folder), acts, doc, tokens, per_shard)
        dense = acts.reshape(-1, d_sae)
        assert cache.manifest.n_wide == (dense > FP16_MAX).sum()
        for latent in range(d_sae):
            position, value = found = cache.latent(latent)
            assert np.array_equal(position, np.flatnonzero(dense[:, latent]))
            np.testing.assert_allclose(value, dense[position, latent], rtol=6e-4, atol=6e-8)
            loudest = value > FP16_MAX
            assert np.array_equal(value[loudest], dense[position, latent][loudest])  # in full, so in order
            _check_statistics(cache, found, dense, doc.ravel(), tokens.ravel())
            _check_windows(cache, found, dense[:, latent], doc)


@pytest.mark.parametrize(("seed", "loud", "small_ranges"), [(1, False, False), (2, True, True)])
def test_one_case_of_each_kind_equals_the_dense_reference(seed, loud, small_ranges):
    """What hypothesis draws above, two cases alone: in a tenth of its time."""
    check = test_latents_windows_and_statistics_equal_the_dense_reference.hypothesis.inner_test
    sizes = {"n_windows": 7, "context": 8, "d_sae": 5, "density": 0.9, "per_shard": 2}
    check(seed=seed, loud=loud, small_ranges=small_ranges, **sizes)


def _check_statistics(cache, found, dense, doc, tokens):
    row, (position, value), context = found.statistics, found, cache.manifest.context_size
    assert row["latent"] == found.latent and row["count"] == len(value)
    assert row["density"] == pytest.approx(len(value) / (doc != NO_DOCUMENT).sum())
    if not len(value):
        assert row["token_ids"] == row["cofiring_ids"] == [] and row["max"] == row["token_entropy"] == 0
        return
    value = value.astype(np.float64)
    assert row["max"] == value.max() and row["mean"] == pytest.approx(value.mean())
    np.testing.assert_allclose(row["quantiles"], np.quantile(value, (0.1, 0.25, 0.5, 0.75, 0.9)), rtol=1e-6)
    assert row["histogram"] == np.histogram(value, 20, (0, value.max()))[0].tolist()
    assert row["n_documents"] == len(set(doc[position])) and row["n_windows"] == len(set(position // context))
    mass = np.bincount(tokens[position], weights=value, minlength=VOCABULARY) / value.sum()
    order = [token for token in np.argsort(-mass, kind="stable") if mass[token] > 0]
    assert row["token_ids"] == order
    np.testing.assert_allclose(row["token_shares"], mass[order])
    text = np.bincount(tokens[doc != NO_DOCUMENT], minlength=VOCABULARY) / (doc != NO_DOCUMENT).sum()
    np.testing.assert_allclose(row["token_lifts"], mass[order] / text[order])
    assert row["token_entropy"] == pytest.approx(-(mass[order] * np.log(mass[order])).sum(), abs=1e-9)
    places = np.bincount(position % context * 10 // context, minlength=10)
    np.testing.assert_allclose(row["position_profile"], places / len(value))
    first = [place % context == 0 or doc[place - 1] == NO_DOCUMENT for place in position]
    assert row["first_token_share"] == pytest.approx(np.mean(first))
    fires = dense > 0
    both = (fires & fires[:, [found.latent]]).sum(0)
    jaccard = both / np.maximum(1, fires.sum(0) + fires[:, found.latent].sum() - both)
    jaccard[found.latent] = 0
    expected = [i for i in np.argsort(-jaccard, kind="stable")[:10] if jaccard[i] > 0]
    assert row["cofiring_ids"] == expected
    np.testing.assert_allclose(row["cofiring_jaccard"], jaccard[expected])


def _check_windows(cache, found, acts, doc):
    segments = cache.segments(4)
    maxima = np.array([acts[s : s + n].max() for s, n in zip(segments.start, segments.length, strict=True)])
    known = {int(s): i for i, s in enumerate(segments.start)}
    for kind in ("top", "quantiles", "random", "silent", "same-token"):
        windows = found.windows(kind, 3, width=4)
        here = [known[int(start)] for start in windows.start]  # every window is a segment
        assert len(set(here)) == len(here) <= 3
        assert np.array_equal(windows.length, segments.length[here]) and np.array_equal(windows.doc, segments.doc[here])
        np.testing.assert_allclose(windows.maximum, maxima[here], rtol=6e-4)
        assert ((windows.maximum > 0) == (kind not in ("silent", "same-token"))).all()
        for start, shown in zip(windows.start, windows.shown(), strict=True):
            np.testing.assert_allclose(shown.values, acts[start : start + len(shown.values)], rtol=6e-4)
            assert len(shown.text) == len(shown.values) == len(shown.spans)
        if kind == "top" and len(here):
            assert windows.maximum[0] == pytest.approx(maxima.max(), rel=6e-4)
            assert (np.diff(windows.maximum) <= 0).all()
        if kind == "same-token" and len(here):
            favourites = set(found.statistics["token_ids"][:5])
            tokens = cache.tokens
            for start, length in zip(windows.start, windows.length, strict=True):
                assert favourites & set(tokens[start : start + length].tolist())
    again = found.windows("random", 3, width=4)
    assert np.array_equal(again.start, found.windows("random", 3, width=4).start)


def test_a_kind_of_window_that_there_is_not_is_refused_with_the_nearest(tmp_path):
    acts, doc, tokens = drawn(3, 6, 40, 5, 0.9, False)
    found = made_cache(tmp_path, acts, doc, tokens, 2).latent(1)
    with pytest.raises(UsageError, match="same-token|quantiles|top"):
        found.windows("tpo")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.sampled_from([1, 3, 8]),
    d_sae=st.sampled_from([64, 300, 512]),
    shift=st.sampled_from([0.0, -2.0, -9.0]),
    rounded=st.booleans(),
)
def test_the_bounded_top_k_is_torchs(seed, k, d_sae, shift, rounded):
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(20, d_sae, generator=generator) + shift
    pre = pre.round() if rounded else pre  # many equal values
    mute = np.random.default_rng(seed).random(20) < 0.2
    value, column = pre.topk(k, dim=-1, sorted=False)
    dense = torch.zeros_like(pre).scatter_(-1, column, value.relu())
    dense[torch.from_numpy(mute)] = 0
    values, latent, begins = top_positive(pre, k, mute)
    row, expected = dense.nonzero(as_tuple=True)
    assert np.array_equal(np.diff(begins), np.bincount(row.numpy(), minlength=20))
    assert np.array_equal(latent, expected.numpy()) and np.array_equal(values, dense[row, expected].numpy())


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("d_sae", [512, 300])
def test_what_is_not_finite_is_refused_not_dropped(tmp_path, value, d_sae):
    """Both ways of taking the k largest; a muted token's are nobody's."""
    pre, mute = torch.randn(4, d_sae, generator=torch.Generator().manual_seed(0)), np.array([False, False, True, False])
    pre[2, 5] = value
    values, _, begins = top_positive(pre, 4, mute)
    assert np.diff(begins).tolist() == [4, 4, 0, 4] and np.isfinite(values).all()
    pre[1, 7] = value
    acts = csr_array(top_positive(pre, 4, mute), pre.shape)
    assert not np.isfinite(acts.data).all() and 7 in acts.indices
    shard = layout.ShardRecord(index=0, n_windows=1, n_documents=1, sha256={})
    with pytest.raises(DataError, match="gives NaN or infinity on shard 0"):
        shards.write_activations(tmp_path, shard, acts)


@pytest.mark.parametrize("architecture", ["topk", "topk-rescaled", "jumprelu", "standard"])
def test_sparse_encoding_is_the_saes_own(architecture):
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

    sae = {
        "topk": lambda: TopKSAE(TopKSAEConfig(d_in=16, d_sae=512, k=6)),
        "topk-rescaled": lambda: TopKSAE(TopKSAEConfig(d_in=16, d_sae=512, k=6, rescale_acts_by_decoder_norm=True)),
        "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(d_in=16, d_sae=512)),
        "standard": lambda: StandardSAE(StandardSAEConfig(d_in=16, d_sae=512)),
    }[architecture]()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        if architecture == "jumprelu":
            sae.threshold.fill_(3.0)
        x = torch.randn(70, 16)
        dense = sae.encode(x).numpy()
        sparse = encode_sparse(sae, x, np.zeros(70, dtype=bool))
    assert np.array_equal(sparse.toarray(), dense) and sparse.has_canonical_format and (sparse.data > 0).all()
    assert type(sae.activation_fn).__name__ != "Identity"


def test_latents_below_0_are_refused_not_left_out():
    """Of SAELens' AbsTopK, whose negative latents would be as if they never fired."""
    from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig

    with pytest.raises(UsageError, match="latents below 0, as an abstopk"):
        encode_sparse(AbsTopKSAE(AbsTopKSAEConfig(d_in=16, d_sae=64, k=6)), torch.randn(7, 16), np.zeros(7, dtype=bool))
