"""The map of latents: two coordinates from decoder directions, the same every time."""

import sys
import types

import numpy as np
import pytest
import torch

from sae_italian.analysis.directions import Set, map_of
from sae_italian.base.errors import UsageError


def sae(rows) -> types.SimpleNamespace:
    return types.SimpleNamespace(W_dec=torch.as_tensor(rows, dtype=torch.float32))


def latent_map(sae, **settings):
    return map_of(Set.of("a", sae).units, **settings)


@pytest.fixture(scope="module")
def two_groups():
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(16)[:2].repeat_interleave(50, dim=0)
    return sae((centres + 0.1 * torch.randn(100, 16, generator=generator)) * torch.rand(100, 1, generator=generator))


def test_groups_of_close_directions_lie_apart_whatever_their_norms(two_groups):
    found = latent_map(two_groups)
    assert found.shape == (100, 2) and found.dtype == np.float32
    first, second = found[:50], found[50:]
    gap = np.linalg.norm(first.mean(0) - second.mean(0))
    assert gap > 5 * max(first.std(0).max(), second.std(0).max())


def test_the_map_repeats_and_does_not_depend_on_a_mirror_image(two_groups):
    assert np.array_equal(latent_map(two_groups), latent_map(two_groups))
    order = np.random.default_rng(0).permutation(100)
    mixed = sae(two_groups.W_dec[order])
    assert np.allclose(latent_map(mixed), latent_map(two_groups)[order], atol=1e-5)


def test_distances_are_those_of_the_two_leading_components(two_groups):
    units = torch.nn.functional.normalize(two_groups.W_dec, dim=-1).numpy()
    _, scale, _ = np.linalg.svd(units - units.mean(0))
    assert np.allclose((latent_map(two_groups) ** 2).sum(0), scale[:2] ** 2, rtol=1e-4)


def test_one_dimension_and_dead_directions():
    assert np.isfinite(latent_map(sae([[1.0], [0.0], [-2.0]]))).all()
    assert np.isfinite(latent_map(sae(torch.zeros(4, 3)))).all()


def test_umap_that_is_not_installed_says_what_to_do(two_groups, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UsageError, match="pip install umap-learn, or use 'pca'"):
        latent_map(two_groups, method="umap")
