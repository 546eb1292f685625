"""Baselines with known answers: planted components are found, and each is a plain SAELens SAE."""

import copy

import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardSAE, TopKSAE

from sae_italian.base.errors import UsageError
from sae_italian.saes.baselines import KINDS, _read, fit_baselines, with_top_k
from sae_italian.saes.fit import mean_l0
from sae_italian.saes.loading import weights_hash
from tests.conftest import described

D_IN = 16


@pytest.fixture(scope="module")
def sae():
    """Random weights, top 3 of 40."""
    from sae_lens import TopKSAEConfig

    torch.manual_seed(0)
    made = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=40, k=3))
    with torch.no_grad():
        made.W_enc.normal_()
        made.W_dec.copy_(made.W_enc.T)
    return described(made)


@pytest.fixture(scope="module")
def axes():
    """Orthonormal directions [16, 16]."""
    torch.manual_seed(1)
    return torch.linalg.qr(torch.randn(D_IN, D_IN))[0]


@pytest.fixture(scope="module")
def gaussian(axes):
    """Tokens whose variance falls by a factor 2 from axis to axis, around a mean that is not zero."""
    torch.manual_seed(2)
    return torch.randn(4000, D_IN) * 2 ** (-torch.arange(D_IN) / 2) @ axes + 3.0


def test_pca_finds_the_axes_in_their_order_each_with_its_negative(sae, axes, gaussian):
    pca = fit_baselines(gaussian, sae, ["pca"])["pca"]
    cosine = (pca.W_dec[:D_IN] @ axes.T).abs()
    assert torch.all(cosine.diagonal() > 0.95)
    assert torch.equal(pca.W_dec[D_IN:], -pca.W_dec[:D_IN])
    assert torch.allclose(pca.b_dec, gaussian.mean(0), atol=1e-4)
    assert torch.allclose(pca(gaussian), gaussian, atol=1e-3)
    assert mean_l0(pca, gaussian) == D_IN  # of each pair one is on


def test_a_stream_gives_the_pca_of_its_tokens(sae, gaussian):
    whole = fit_baselines(gaussian, sae, ["pca"])["pca"]
    batches = iter(gaussian.split(97))
    streamed = fit_baselines(batches, sae, ["pca"], n_tokens=len(gaussian))["pca"]
    assert torch.allclose((whole.W_dec[:4] * streamed.W_dec[:4]).sum(-1).abs(), torch.ones(4), atol=1e-3)
    assert torch.allclose(whole.b_dec, streamed.b_dec, atol=1e-4)
    sample, mean, _ = _read(gaussian.split(97), 1000, 150, D_IN, 0)
    assert torch.equal(sample, gaussian[:150]) and torch.allclose(mean, gaussian[:1000].mean(0), atol=1e-4)


def test_only_so_many_tokens_of_an_endless_stream_are_read(sae, gaussian):
    read = []

    def endless():
        while True:
            read.append(100)
            yield gaussian[:100]

    fit_baselines(endless(), sae, ["pca"], n_tokens=1000)
    assert sum(read) == 1000


def test_ica_finds_independent_sources_that_pca_does_not(sae, axes):
    """Sources with heavy tails, mixed by directions that are not orthogonal."""
    torch.manual_seed(3)
    mixing = axes + 0.4 * torch.randn(D_IN, D_IN)
    mixing /= mixing.norm(dim=-1, keepdim=True)
    sources = torch.distributions.Laplace(0.0, 1.0).sample((20_000, D_IN))
    found = fit_baselines(sources @ mixing, sae, ["ica", "pca"])
    best = {kind: (found[kind].W_dec @ mixing.T).max(0).values.min() for kind in ("ica", "pca")}
    assert best["ica"] > 0.98 and best["pca"] < 0.95
    x = sources[:200] @ mixing
    assert torch.allclose(found["ica"](x), x, atol=1e-2)
    assert torch.allclose(found["ica"].W_dec.norm(dim=-1), torch.ones(2 * D_IN), atol=1e-4)


def test_nmf_reconstructs_non_negative_parts(sae):
    torch.manual_seed(4)
    parts = torch.eye(D_IN) + 0.5 * torch.eye(D_IN).roll(1, 0)
    x = torch.rand(3000, D_IN) * (torch.rand(3000, D_IN) < 0.2) @ parts
    nmf = fit_baselines(x, sae, ["nmf"])["nmf"]
    assert (nmf.W_dec >= 0).all()
    assert 1 - (nmf(x) - x).square().sum() / x.square().sum() > 0.9


def test_identity_is_the_neurons_with_relu(sae, gaussian):
    x = gaussian - 3
    identity = fit_baselines(x, sae, ["identity"])["identity"]
    assert torch.equal(identity.encode(x), x.relu()) and torch.equal(identity(x), x.relu())


def test_random_directions_have_the_factor_that_reconstructs_best(sae, gaussian):
    for name, random in fit_baselines(gaussian, sae, ["random"]).items():
        assert random.W_dec.shape == sae.W_dec.shape

        def error(scale, random=random):
            other = copy.deepcopy(random)
            other.W_dec.data *= scale
            return (other(gaussian) - gaussian).square().sum().item()

        assert error(1.0) < min(error(0.97), error(1.03)), name


def test_top_k_is_at_the_saes_own_l0(sae, gaussian):
    found = fit_baselines(gaussian, sae, ["pca", "ica", "random", "identity"])
    assert list(found) == [name for kind in ("pca", "ica", "random", "identity") for name in (kind, f"{kind}-topk")]
    for name, baseline in found.items():
        assert type(baseline) is (TopKSAE if name.endswith("topk") else StandardSAE)
        if name.endswith("topk"):
            assert baseline.cfg.k == round(mean_l0(sae, gaussian)), name
    for asked, k in ((5, 5), (50, D_IN)):  # of all the latents there are, where k is more
        assert fit_baselines(gaussian, sae, ["identity"], k=asked)["identity-topk"].cfg.k == k


def test_they_are_saved_and_read_as_plain_saelens_with_the_saes_place(sae, gaussian, tmp_path):
    for name, baseline in fit_baselines(gaussian, sae, ["pca", "random"]).items():
        baseline.save_model(tmp_path / name)
        read = SAE.load_from_disk(tmp_path / name)
        assert torch.equal(read(gaussian), baseline(gaussian)), name
        metadata = read.cfg.metadata
        assert (metadata.hook_name, metadata.model_name) == ("blocks.2.hook_resid_post", "sae-italian-mini")
        assert metadata.baseline == name and len(metadata.baseline_of) == 64


def test_the_same_seed_gives_the_same(sae, gaussian):
    first, second = (fit_baselines(gaussian, sae, ["ica", "random"], seed=seed) for seed in (7, np.int64(7)))
    other = fit_baselines(gaussian, sae, ["ica", "random"], seed=8)
    for name in first:
        assert torch.equal(first[name].W_dec, second[name].W_dec), name
        assert not torch.equal(first[name].W_dec, other[name].W_dec), name


def test_with_top_k_of_a_latent_that_writes_nothing_is_finite(sae, gaussian):
    pruned = copy.deepcopy(sae)
    pruned.W_dec.data[7] = 0
    kept, hidden = with_top_k(pruned, len(sae.W_dec)), (gaussian - sae.b_dec) @ sae.W_enc + sae.b_enc
    assert torch.allclose(kept(gaussian), hidden.relu() @ pruned.W_dec + sae.b_dec, atol=1e-3)
    assert hidden[:, 7].max() > 0 and not kept.encode(gaussian)[:, 7].any()


def test_with_top_k_keeps_the_function_of_what_it_keeps(sae, gaussian):
    kept = with_top_k(sae, 3)
    scaled = copy.deepcopy(sae)
    scaled.W_dec.data *= torch.linspace(0.5, 2, 40)[:, None]
    assert mean_l0(with_top_k(sae, 1), gaussian) == 1
    assert kept.cfg.metadata.top_k_of == weights_hash(sae) and sae.cfg.metadata.top_k_of is None
    assert fit_baselines(gaussian, kept, ["pca"])["pca"].cfg.metadata.top_k_of is None  # PCA is not made of it
    pca = fit_baselines(gaussian, sae, ["pca"])["pca"]
    assert torch.allclose(with_top_k(pca, 2 * D_IN)(gaussian), gaussian, atol=1e-3)
    strongest = (sae.W_enc.norm(dim=0) - sae.W_dec.norm(dim=-1)).abs().max()
    assert strongest < 1e-5 and kept.cfg.k == 3
    one = with_top_k(scaled, 1)
    hidden = (gaussian - scaled.b_dec) @ scaled.W_enc + scaled.b_enc
    latent = (hidden * scaled.W_dec.norm(dim=-1)).argmax(-1)
    value = hidden.gather(1, latent[:, None]).relu()
    assert torch.allclose(one(gaussian), value * scaled.W_dec[latent] + scaled.b_dec, atol=1e-4)


def test_bad_input_is_named(sae, gaussian, mini):
    with pytest.raises(UsageError, match="'pcaa' is unknown. Did you mean 'pca'"):
        fit_baselines(gaussian, sae, ["pcaa"])
    with pytest.raises(UsageError, match="20 tokens are too few"):
        fit_baselines(gaussian[:20], sae, ["pca"])
    with pytest.raises(UsageError, match="8 dimensions, but the SAE reads 16"):
        fit_baselines(gaussian[:, :8], sae, ["pca"])
    with pytest.raises(UsageError, match=r"never negative; at blocks.2.hook_resid_post .* Leave out nmf"):
        fit_baselines(gaussian - 3, sae, ["nmf"])
    flat = gaussian.clone()
    flat[:, 3:] = 0
    with pytest.raises(UsageError, match="span fewer than 16 dimensions"):
        fit_baselines(flat, sae, ["ica"])
    transcoder = copy.deepcopy(sae)
    transcoder.cfg.metadata.hook_name_out = "blocks.2.hook_mlp_out"
    with pytest.raises(UsageError, match="a transcoder has two"):
        fit_baselines(gaussian, transcoder)
    assert set(KINDS) >= {"pca", "ica", "nmf", "random", "identity"}
