"""Dictionaries whose geometry is known by construction, and the two ways of saying what is near by chance."""

import math
import types

import numpy as np
import pytest
import torch

from sae_italian.analysis import directions as module
from sae_italian.analysis.directions import (
    Set,
    compare,
    nearest_directions,
    random_directions,
    threshold,
)
from sae_italian.analysis.geometry import geometry
from sae_italian.base.errors import UsageError

D = 256  # sqrt(12 ln F / D) is 0.50 for 200 latents


def sae(rows, model="m", hook="blocks.1.hook_resid_post"):
    metadata = types.SimpleNamespace(model_name=model, hook_name=hook)
    return types.SimpleNamespace(W_dec=torch.as_tensor(rows), cfg=types.SimpleNamespace(metadata=metadata))


@pytest.fixture(scope="module")
def orthogonal():
    return torch.linalg.qr(torch.randn(D, 200, generator=torch.Generator().manual_seed(0)))[0].T


def one_of(found, source, target):
    return next(item for item in found.comparisons if (item.source, item.target) == (source, target))


def noise(rows, size, seed):
    drawn = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(rows.shape[1])
    return rows + size * drawn


def test_an_orthogonal_dictionary_has_no_neighbours(orthogonal):
    result = one_of(geometry({"a": sae(orthogonal)}), "a", "a")
    assert result.neighbours.value == 0 and result.several.value == 0 and result.matches.largest < 1e-5
    assert result.used == result.threshold == pytest.approx(math.sqrt(12 * math.log(200) / D))


def test_a_copied_dictionary_has_all(orthogonal):
    """Also when the copy is scaled and in another order; and each latent's partner is the right one."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(200))
    found = one_of(geometry({"a": sae(orthogonal), "copy": sae(3.5 * orthogonal[order])}), "a", "copy")
    assert found.neighbours.value == found.mutual.value == found.alike.value == found.above_random.value == 1
    assert found.new.value == 0 == found.split.value and found.splits == []
    assert torch.equal(order[torch.tensor(found.rows.nearest.tolist())], torch.arange(200))
    assert found.matches.quantiles["5 %"] == pytest.approx(1, abs=1e-5)


def test_a_latent_that_stands_twice_in_a_dictionary_has_a_neighbour(orthogonal):
    result = one_of(geometry({"a": sae(torch.cat([orthogonal, orthogonal[:5]]))}), "a", "a")
    near = result.rows.latent[result.rows.cosine > result.used]
    assert near.tolist() == [0, 1, 2, 3, 4, 200, 201, 202, 203, 204]


def test_an_sae_split_by_construction_is_reported_split_and_what_is_new_is_new(orthogonal):
    """Latents 3 and 7 of the narrow SAE become 2 and 3 of the wide one; ten of the wide one are in neither."""
    narrow, fresh = orthogonal[:100], orthogonal[190:]
    children = torch.cat([noise(narrow[[3, 3]], 0.4, 1), noise(narrow[[7, 7, 7]], 0.4, 2)])
    kept = narrow[[i for i in range(100) if i not in (3, 7)]]
    wide = torch.cat([kept, children, fresh])
    result = geometry({"narrow": sae(narrow), "wide": sae(wide)})
    found, back = one_of(result, "wide", "narrow"), one_of(result, "narrow", "wide")
    assert back.several.value == pytest.approx(2 / 100) and back.threshold == found.threshold  # F is the larger width
    assert {split.latent: split.into for split in found.splits} == {
        3: sorted([98, 99], key=lambda i: -found.rows.cosine[i]),
        7: sorted([100, 101, 102], key=lambda i: -found.rows.cosine[i]),
    }
    assert found.splits[0].latent == 7  # the one that splits most comes first
    assert found.split.value == pytest.approx(2 / 100)
    assert found.new.value == pytest.approx(10 / len(wide)) and sorted(found.newest) == list(range(103, 113))
    assert found.new.lo < found.new.value < found.new.hi


def test_random_dictionaries_are_no_nearer_than_chance():
    a, b = (random_directions(300, D, seed) for seed in (50, 51))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(random_directions(300, D, 50), a)
    finally:
        torch.set_default_dtype(torch.float32)
    found = one_of(geometry({"a": sae(a), "b": sae(b)}), "a", "b")
    assert found.neighbours.value == 0 and found.above_random.value < 0.02
    assert found.matches.mean == pytest.approx(found.random.mean, abs=0.01)
    assert 0 < found.random.largest < found.threshold


def test_a_common_subspace_is_what_the_second_baseline_is_for():
    """Random directions of 16 dimensions of 256 are near one another: not because their SAEs learnt the same."""
    basis = torch.randn(16, D, generator=torch.Generator().manual_seed(0))
    a, b = (torch.randn(300, 16, generator=torch.Generator().manual_seed(seed)) @ basis for seed in (1, 2))
    found = one_of(geometry({"a": sae(a), "b": sae(b)}), "a", "b")
    assert found.matches.mean > found.random.mean + 0.3
    assert found.matches.mean == pytest.approx(found.random_like.mean, abs=0.03)
    a, b = a + 2 * basis.sum(0), b + 2 * basis.sum(0)  # and what they have in common
    found = one_of(geometry({"a": sae(a), "b": sae(b)}), "a", "b")
    assert found.matches.mean == pytest.approx(found.random_like.mean, abs=0.01) and found.matches.mean > 0.9


def test_where_the_bound_says_nothing_the_random_maximum_decides():
    narrow = random_directions(100, 16, 7)
    found = compare(Set.of("a", sae(narrow)), Set.of("b", sae(noise(narrow, 0.05, 3))))
    assert found.threshold > 1 and found.used == found.random.largest < 1
    assert found.mutual.value == 1
    given = compare(Set.of("a", sae(narrow)), Set.of("b", sae(noise(narrow, 0.05, 3))), above=0.5)
    assert given.used == 0.5 and given.neighbours.value == 1


def test_the_papers_thresholds():
    assert threshold(32_768, 4096) == pytest.approx(0.1746, abs=1e-4)  # Llama Scope gives 0.174 and 0.186
    assert threshold(131_072, 4096) == pytest.approx(0.1858, abs=1e-4)


@pytest.mark.parametrize("elements", [1, 700, 2**24])
def test_blocks_of_any_size_give_what_all_pairs_give(monkeypatch, elements):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
    rows, others = random_directions(31, 8, 0), random_directions(45, 8, 1)
    cosine = (rows @ others.T).numpy()
    found = nearest_directions(rows, others, above=0.5)
    assert np.allclose(found.cosine, cosine.max(1)) and np.array_equal(found.nearest, cosine.argmax(1))
    assert np.array_equal(found.neighbours, (cosine >= 0.5).sum(1))


def test_a_sample_finds_its_neighbours_among_all(orthogonal):
    twice = Set.of("a", sae(torch.cat([orthogonal, orthogonal])))
    found = compare(twice, twice, sample=50, seed=4)
    assert found.n_source == 50 and found.n_target == 400
    assert found.neighbours.value == 1 and found.mutual.value == 1
    assert np.array_equal(found.rows.nearest, (found.rows.latent + 200) % 400)


def test_dead_latents_stay_out(orthogonal):
    alive = np.arange(200) >= 20
    result = geometry({"a": sae(orthogonal), "b": sae(orthogonal)}, alive={"a": alive})
    found = one_of(result, "a", "b")
    assert found.n_source == 180 and found.n_target == 200 and found.rows.latent[0] == 20
    assert one_of(result, "b", "a").new.value == pytest.approx(0.1)
    assert len(result.points[0]) == 180
    with pytest.raises(UsageError, match="a has 0 live latents"):
        geometry({"a": sae(orthogonal)}, alive={"a": np.zeros(200, bool)})


def test_seeds_are_compared_where_widths_agree(orthogonal):
    result = geometry(
        {
            "s0": sae(orthogonal),
            "s1": sae(orthogonal.flip(0)),
            "s2": sae(orthogonal),
            "wide": sae(random_directions(300, D, 0, like=orthogonal)),
        }
    )
    assert (
        result.seeds["pairs"] == 6 and result.seeds["mutual"] == 1 and result.seeds["mean_cosine"] == pytest.approx(1)
    )
    assert geometry({"a": sae(orthogonal)}).seeds == {}


def test_saes_of_other_widths_are_refused_and_of_other_hooks_noted(orthogonal):
    with pytest.raises(UsageError, match="small writes 64 dimensions .d_in., a 256: .*cannot be compared"):
        geometry({"a": sae(orthogonal), "small": sae(torch.eye(64))})
    other = sae(orthogonal, hook="blocks.2.hook_resid_post")
    assert "b has hook_name" in geometry({"a": sae(orthogonal), "b": other}).notes[0]
    with pytest.raises(UsageError, match="no SAE was given"):
        geometry({})


def test_saes_that_began_as_one_are_noted(orthogonal):
    """One seed draws the same first rows whatever the width: training moved neither, and all "match"."""
    rows = [torch.randn(n, 32, generator=torch.Generator().manual_seed(3)) for n in (40, 120)]
    notes = geometry({"a": sae(rows[0]), "b": sae(rows[1])}).notes
    assert notes[0].startswith("100% of the latents of a have their nearest in b at their own number")
    other = torch.randn(120, 32, generator=torch.Generator().manual_seed(4))
    assert not geometry({"a": sae(rows[0]), "b": sae(other)}).notes
