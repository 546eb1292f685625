"""The kernels by themselves: selection against torch.topk, products against dense ones, gradients by finite differences."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_italian.saes import sparse
from sae_italian.saes.sparse import decode, encode_rows, largest, latent_sums, row_dots, weighted_rows


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
    monkeypatch.setattr(sparse, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    double: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    x, W_enc, b_enc = torch.randn(66, 4, **double), torch.randn(4, d_sae, **double), torch.randn(d_sae, **double)
    W_dec = torch.randn(d_sae, 5, **double)

    def reconstruct(x, W_enc, b_enc, W_dec):
        values, indices = encode_rows(x, W_enc.T, b_enc, k)
        return decode(values, indices, W_dec)

    assert torch.autograd.gradcheck(reconstruct, (x, W_enc, b_enc, W_dec), fast_mode=True)


def test_input_bias_gets_its_gradient():
    """The bias was subtracted outside; its gradient is that of (x - bias) W_enc."""
    torch.manual_seed(0)
    x, W_enc, b_enc = torch.randn(9, 4), torch.randn(4, 60), torch.randn(60)
    bias = torch.randn(4, requires_grad=True)
    encode_rows(x - bias, W_enc.T, b_enc, 3)[0].pow(2).sum().backward()
    wanted, bias.grad = bias.grad, None
    encode_rows(x - bias.detach(), W_enc.T, b_enc, 3, input_bias=bias)[0].pow(2).sum().backward()
    torch.testing.assert_close(bias.grad, wanted)


@pytest.mark.parametrize("k", [0, 61])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}; it must be from 1 to the number of latents, 60"):
        encode_rows(torch.randn(9, 4), torch.randn(60, 4), torch.randn(60), k)
