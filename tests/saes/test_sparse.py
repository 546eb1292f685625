"""The kernels by themselves: selection against torch.topk, products against dense ones, gradients by finite differences."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_italian.saes import sparse_products
from sae_italian.saes.sparse import decode, encode_topk
from sae_italian.saes.sparse_products import Workspace, latent_sums, row_dots, weighted_rows
from sae_italian.saes.sparse_screen import screened_topk
from sae_italian.saes.sparse_select import largest, select_topk


@settings(deadline=None, max_examples=60, derandomize=True)
@given(rows=st.integers(1, 9), n=st.integers(1, 900), kept=st.floats(0, 1), ties=st.booleans())
def test_largest_are_the_largest(rows, n, kept, ties):
    """Values as torch.topk's, indices distinct; with many ties too."""
    k = max(1, round(kept**4 * n))
    scores = torch.randn(rows, n, generator=torch.Generator().manual_seed(n))
    if ties:
        scores = scores.round()
    indices = largest(scores, k)
    assert torch.equal(scores.gather(1, indices).sort().values, scores.topk(k).values.sort().values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_not_a_number_is_kept_where_torch_keeps_it():
    scores = torch.zeros(2, 640)
    scores[1, 600] = torch.nan
    assert 600 in largest(scores, 4)[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [20, 400])
def test_products_are_the_dense_ones(dtype, n):
    """By index (n 400) and dense (n 20); a latent twice in a row counts twice."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(n, (300, 5), generator=generator)
    indices[0] = 3
    weights, other = torch.randn(300, 5, generator=generator), torch.randn(300, 7, generator=generator)
    rows = torch.randn(n, 7, generator=generator)
    dense = torch.zeros(300, n).scatter_add_(1, indices, weights)
    weights, other, rows = weights.to(dtype), other.to(dtype), rows.to(dtype)
    near: dict[str, Any] = {"atol": 0.3, "rtol": 0.03} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-5}
    pairs = [
        (weighted_rows(weights, indices, rows), dense.to(dtype) @ rows),
        (row_dots(indices, rows, other), (other @ rows.T).gather(1, indices)),
        (latent_sums(weights, indices, other, n), dense.to(dtype).T @ other),
    ]
    for got, wanted in pairs:
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted, **near)


@pytest.mark.parametrize("chunk", [1, 2**22])
@pytest.mark.parametrize("d_sae, k", [(12, 3), (150, 2)])
def test_gradients_by_finite_differences(monkeypatch, chunk, d_sae, k):
    monkeypatch.setattr(sparse_products, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    double: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    x, W_enc, b_enc = torch.randn(66, 4, **double), torch.randn(4, d_sae, **double), torch.randn(d_sae, **double)
    W_dec = torch.randn(d_sae, 5, **double)

    def reconstruct(x, W_enc, b_enc, W_dec):
        values, indices = encode_topk(x, W_enc, b_enc, k)
        return decode(values, indices, W_dec)

    assert torch.autograd.gradcheck(reconstruct, (x, W_enc, b_enc, W_dec), fast_mode=True)


def test_input_bias_gets_its_gradient():
    """The bias was subtracted outside; its gradient is that of (x - bias) W_enc."""
    torch.manual_seed(0)
    x, W_enc, b_enc = torch.randn(9, 4), torch.randn(4, 60), torch.randn(60)
    bias = torch.randn(4, requires_grad=True)
    encode_topk(x - bias, W_enc, b_enc, 3)[0].pow(2).sum().backward()
    wanted, bias.grad = bias.grad, None
    encode_topk(x - bias.detach(), W_enc, b_enc, 3, input_bias=bias)[0].pow(2).sum().backward()
    torch.testing.assert_close(bias.grad, wanted)


@pytest.mark.parametrize("k", [0, 61])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}; it must be from 1 to the number of latents, 60"):
        encode_topk(torch.randn(9, 4), torch.randn(4, 60), torch.randn(60), k)


# --- screening in bfloat16 ---------------------------------------------------------------------------------------------


def planted(n_tokens: int, d_in: int, n: int, spread: float, seed: int):
    """Tokens, encoder rows, biases and norms whose scores differ by `spread` of what chance would give."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d_in, generator=generator)
    rows = rows[:1] + spread * (rows - rows[:1])
    x = torch.randn(n_tokens, d_in, generator=generator)
    return x, rows, torch.randn(n, generator=generator), torch.rand(n, generator=generator) + 0.5


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("spread", [1.0, 0.02])
def test_screening_keeps_the_latents_of_the_plain_way(with_norm, spread):
    """Scores that bfloat16 tells apart, and scores that it does not: the second are ranked again in float32."""
    x, rows, bias, norm = planted(300, 64, 2000, spread, 0)
    bias *= spread
    workspace = Workspace()
    norm = norm if with_norm else None
    values, indices = screened_topk(x, rows, bias, 8, norm, torch.float32, workspace)
    plain_values, plain_indices = select_topk(x, rows, bias, 8, norm, torch.float32)
    ranked, plain_ranked = indices.sort(dim=1), plain_indices.sort(dim=1)
    same = (ranked.values == plain_ranked.values).all(1)
    assert same.float().mean() > 0.99  # the others: scores equal within float32's rounding
    torch.testing.assert_close(values.sort(1).values, plain_values.sort(1).values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        values.gather(1, ranked.indices)[same], plain_values.gather(1, plain_ranked.indices)[same], rtol=1e-4, atol=1e-4
    )
    assert workspace.screened == 300
    assert workspace.unproved < 300 if spread == 1 else workspace.unproved > 200


def test_screening_proves_what_it_keeps(monkeypatch):
    """Without the proof, close scores come out wrong: the bound is what keeps them right."""
    from sae_italian.saes import sparse_screen

    x, rows, bias, _ = planted(300, 64, 2000, 0.02, 1)
    plain = select_topk(x, rows, 0 * bias, 8, None, torch.float32)[1].sort(1).values

    def agreement() -> float:
        found = screened_topk(x, rows, 0 * bias, 8, None, torch.float32, Workspace())[1].sort(1).values
        return float((found == plain).all(1).float().mean())

    assert agreement() > 0.99
    monkeypatch.setattr(sparse_screen, "_proved", lambda worst, *_: torch.ones_like(worst, dtype=torch.bool))
    assert agreement() < 0.9


def test_screening_meets_not_a_number():
    x, rows, bias, _ = planted(20, 16, 400, 1.0, 2)
    x[3, 2] = torch.nan
    values, _ = screened_topk(x, rows, bias, 4, None, torch.float32, Workspace())
    assert values[3].isnan().all() and not values[4].isnan().any()
