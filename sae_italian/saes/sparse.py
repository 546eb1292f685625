"""TopK by index: the same values and gradients as the dense layer, from one dense matrix product.

Shapes: x [batch, d_in]; the encoder as rows W_enc.T [d_sae, d_in], so that a latent is one run of memory;
W_dec [d_sae, d_out]; values and indices [batch, k]. A step goes

1. pre-activations of a few rows of x at a time, the k largest of each kept; the [batch, d_sae] matrix never exists whole;
2. decoding: a weighted embedding bag over the k rows of W_dec;
3. gradients of the values: k dot products per token; of the weights: each latent's row is a weighted sum of the few
   rows of x (or of the output's gradient) where it was kept.

Where k is a large part of the dictionary (K-annealing, the auxiliary loss), dense products of a few rows at a time are
faster than indices and give the same numbers; `DENSE_ABOVE` says from where on.
Source: Gao et al. 2024, appendix D, arXiv:2406.04093 (sparse kernels); SAELens' `topk_sae.py` for the maths.
"""

import math
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

DENSE_ABOVE = 1 / 32  # k / n from which dense products win, measured on CPU at d 1152
BLOCKS_FROM = 16  # d_sae / k from which two small top-k are faster than one
CHUNK_ELEMENTS = 2**24  # of a scratch matrix [some rows, n]: 64 MiB in float32; fewer rows slow the product


def encode_rows(
    x: Float[Tensor, "batch d_in"],
    rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    norm: Float[Tensor, " d_sae"] | None = None,
    input_bias: Float[Tensor, " d_in"] | None = None,
    relu: bool = True,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return ReLU of the k largest pre-activations x W_enc + b_enc of each row, and their latents, in no order.

    The encoder is given as rows (W_enc.T). Differentiable in x, rows, b_enc and `input_bias`.
    norm: the latents are ranked by pre-activation times this positive number; the values returned are not multiplied.
    input_bias: a bias that the caller has already subtracted from x; named here, its gradient costs one matrix-vector
    product. relu=False keeps negative values.

    Raises: ValueError unless 1 <= k <= the number of latents.
    """
    if not 1 <= k <= len(rows):
        raise ValueError(f"k is {k}; it must be from 1 to the number of latents, {len(rows)}")
    device = x.device.type
    matmul_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with exact(x):
        return _Encode.apply(x, rows, b_enc, input_bias, k, norm, relu, matmul_dtype)


def decode(
    values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"], W_dec: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "batch d_out"]:
    """Return the sum over the k latents of value times row of W_dec; differentiable in values and W_dec."""
    with exact(values):
        return _Decode.apply(values, indices, W_dec)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, b_enc, input_bias, k, norm, relu, matmul_dtype):  # pyright: ignore
        values, indices = select_topk(x, rows, b_enc, k, norm, matmul_dtype)
        if relu:
            values = values.relu_()
        ctx.save_for_backward(x, rows, values, indices)
        ctx.relu = relu
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, rows, values, indices = ctx.saved_tensors
        grad = gradients[0] * (values > 0) if ctx.relu else gradients[0]
        need_x, need_rows, _, need_bias = ctx.needs_input_grad[:4]
        with exact(x):
            grad_b = grad.new_zeros(len(rows)).index_add_(0, indices.flatten(), grad.flatten())
            grad_x = weighted_rows(grad, indices, rows) if need_x else None
            grad_rows = latent_sums(grad, indices, x, len(rows)) if need_rows else None
            grad_bias = -torch.mv(rows.T, grad_b) if need_bias else None
        return grad_x, grad_rows, grad_b, grad_bias, *[None] * 4


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, W_dec):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(values, indices, W_dec)
        return weighted_rows(values, indices, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        values, indices, W_dec = ctx.saved_tensors
        grad = gradients[0].contiguous()
        need_values, _, need_W = ctx.needs_input_grad
        with exact(grad):
            grad_values = row_dots(indices, W_dec, grad) if need_values else None
            grad_W = latent_sums(values, indices, grad, len(W_dec)) if need_W else None
        return grad_values, None, grad_W


class SelectRows(torch.autograd.Function):
    """Some rows [n, d] of a matrix. Its gradient is sparse in them, so that adding it to a dense one touches only these."""

    @staticmethod
    def forward(ctx, rows, chosen):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(chosen)
        ctx.shape = rows.shape
        return rows[chosen]

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        (chosen,) = ctx.saved_tensors
        sparse: dict[str, Any] = {"size": ctx.shape, "is_coalesced": True, "check_invariants": False}
        return torch.sparse_coo_tensor(chosen[None], gradients[0], **sparse), None


def annealed_k(step: int, cfg: Any) -> float:
    """Return how many latents may fire in a step: linear from min(d_in, d_sae) at step 0 to k at `k_anneal_steps`.

    K-annealing: many may fire at first, so that none is left dead. Source: Llama Scope, arXiv 2410.20526, section 2.4.
    """
    start = min(cfg.d_in, cfg.d_sae)
    if step >= cfg.k_anneal_steps or start <= cfg.k:
        return cfg.k
    return max(cfg.k, round(start + (cfg.k - start) * step / cfg.k_anneal_steps))


def set_k(sae: Any, step_input: Any) -> None:
    """Let as many latents of an SAE in training fire as the step says; its config, and so what is saved, keeps the last k."""
    if sae.cfg.k_anneal_steps:
        sae.activation_fn.k = annealed_k(step_input.n_training_steps, sae.cfg)


def tune(trainer: Any) -> Any:
    """Let a SAELens `SAETrainer` use PyTorch's fused Adam, and return it: the same update, read and written once.

    It is what is left of a step once the SAE itself is fast. For any SAE, on CPU and CUDA; call it before the first step;
    a checkpoint keeps the setting.
    """
    for group in trainer.optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    return trainer


# --- the k largest, and the three products over k latents per token ----------------------------------------------------
# A product goes by index where that is faster, dense a few rows at a time elsewhere, with the same result; indices may
# repeat within a row. Shapes: weights and indices [batch, k], rows [n, d], other [batch, d].


def exact(tensor: Tensor) -> Any:
    """Return a context without autocast: what follows runs in its tensors' own precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def chunks(n_rows: int, width: int) -> list[slice]:
    """Return slices over `n_rows` rows so that a matrix of that many rows and `width` columns stays small."""
    size = min(512, max(64, CHUNK_ELEMENTS // max(width, 1)))  # 512 rows are enough for the product
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def select_topk(
    x: Tensor, rows: Tensor, bias: Tensor, k: int, norm: Tensor | None, matmul_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return values and indices [batch, k] of the k largest (x rows.T + bias) * norm; the values are without the norm.

    The product runs in `matmul_dtype` (autocast), all else in x's own. Ties go to any of the equal latents.
    """
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.long, device=x.device)
    x, columns = x.to(matmul_dtype), rows.to(matmul_dtype).T
    scaled_bias = bias if norm is None else bias * norm
    parts = chunks(len(x), len(rows))
    # one scratch for all: fresh memory costs as much as the sums
    scratch = x.new_empty(parts[0].stop if parts else 0, len(rows))
    for part in parts:
        raw = torch.mm(x[part], columns, out=scratch[: part.stop - part.start])
        scores = raw if raw.dtype == values.dtype else raw.to(values.dtype)
        scores = scores.add_(bias) if norm is None else torch.addcmul(scaled_bias, scores, norm, out=scores)
        top = largest(scores, k)
        indices[part] = top
        values[part] = scores.gather(1, top)
    return (values if norm is None else values / norm[indices]), indices


def largest(scores: Float[Tensor, "rows n"], k: int) -> Int[Tensor, "rows k"]:
    """Return the indices of the k largest of each row, in no order; of equal values any may be taken.

    The columns are cut into blocks (column j is in block j modulo their number). The k blocks of largest maximum hold
    the k largest values: a value outside them is at most k block maxima. So a top-k over the maxima and one over these
    blocks do it, which reads the matrix once.
    """
    n_rows, n = scores.shape
    if n < BLOCKS_FROM * k:
        return scores.topk(k, dim=-1, sorted=False).indices
    depth = math.isqrt(n // k)
    n_blocks = n // depth
    whole = n_blocks * depth
    table = scores[:, :whole].unflatten(1, (depth, n_blocks))
    blocks = table.amax(1).topk(k, dim=-1, sorted=False).indices
    candidates = table.gather(2, blocks[:, None].expand(-1, depth, -1)).flatten(1)
    columns = (torch.arange(0, whole, n_blocks, device=scores.device)[:, None] + blocks[:, None]).flatten(1)
    if whole < n:
        candidates = torch.cat([candidates, scores[:, whole:]], dim=1)
        tail = torch.arange(whole, n, device=scores.device).expand(n_rows, -1)
        columns = torch.cat([columns, tail], dim=1)
    return columns.gather(1, candidates.topk(k, dim=-1, sorted=False).indices)


def top_positive(
    pre: Float[Tensor, "tokens d_sae"], k: int, mute: Bool[np.ndarray, " tokens"]
) -> tuple[Float[np.ndarray, " nnz"], Int[np.ndarray, " nnz"], Int[np.ndarray, " tokens+1"]]:
    """Return the positive ones of the k largest values of every token that is not mute: the parts of a CSR matrix.

    They are values, columns, and where each token's begin; columns ascend within a token. The values are those that
    `torch.topk` takes, also where equal ones compete for the last place. NaN and infinity count as positive, for the
    caller to refuse.
    """
    values, columns = pre.topk(k, dim=-1, sorted=False)
    columns, order = columns.sort(dim=-1)
    value, column = values.gather(-1, order).float().cpu().numpy(), columns.cpu().numpy()
    keep = ~(value <= 0)
    keep[mute] = False
    return value[keep], column[keep], np.append(0, np.cumsum(keep.sum(axis=1)))


def weighted_rows(weights: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Return [batch, d]: the sum over k of weight times row."""
    if indices.shape[1] <= DENSE_ABOVE * len(rows):
        return F.embedding_bag(indices, rows, mode="sum", per_sample_weights=weights.to(rows.dtype))
    out = rows.new_empty(len(indices), rows.shape[1])
    for part in chunks(len(indices), len(rows)):
        torch.mm(_scattered(weights[part], indices[part], rows), rows, out=out[part])
    return out


def row_dots(indices: Tensor, rows: Tensor, other: Tensor) -> Tensor:
    """Return [batch, k]: the dot products of each row of `other` with the k rows of its indices."""
    batch, k = indices.shape
    other = other.to(rows.dtype)
    if indices.shape[1] > DENSE_ABOVE * len(rows):
        parts = chunks(batch, len(rows))
        return torch.cat([(other[part] @ rows.T).gather(1, indices[part]) for part in parts])
    if has_csr(rows):
        starts = torch.arange(0, batch * k + 1, k, device=rows.device)
        pattern = _csr(starts, indices.flatten(), rows.new_zeros(batch * k), (batch, len(rows)))
        return torch.sparse.sampled_addmm(pattern, other, rows.T, beta=0.0).values().view(batch, k)
    offsets = torch.arange(0, batch * k, k, device=rows.device)
    bag_of = torch.arange(batch, device=rows.device).repeat_interleave(k)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        other, rows, indices.flatten(), offsets, bag_of, 0, -1
    ).view(batch, k)


def latent_sums(weights: Tensor, indices: Tensor, other: Tensor, n: int) -> Tensor:
    """Return [n, d]: for each latent the sum, over the tokens that kept it, of weight times row of `other`."""
    k, out = indices.shape[1], other.new_zeros(n, other.shape[1])
    if k > DENSE_ABOVE * n:
        for part in chunks(len(indices), n):
            out.addmm_(_scattered(weights[part], indices[part], out).T, other[part])
        return out
    latents, order = indices.flatten().sort(stable=True)
    tokens = order.div(k, rounding_mode="floor")
    weights = weights.to(other.dtype).flatten()[order]
    starts = torch.searchsorted(latents, torch.arange(n + 1, device=latents.device))
    if has_csr(other):
        return torch.addmm(out, _csr(starts, tokens, weights, (n, len(other))), other, beta=0.0, out=out)
    return F.embedding_bag(tokens, other, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _scattered(weights: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    return like.new_zeros(len(indices), len(like)).scatter_add_(1, indices, weights.to(like.dtype))


def has_csr(tensor: Tensor) -> bool:
    """Whether PyTorch has sparse matrix products for this tensor that are faster than its embedding bags, as a GPU has not."""
    return tensor.device.type == "cpu" and tensor.dtype.itemsize >= 4 and torch.backends.mkl.is_available()


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():  # PyTorch's one warning per process that these are in beta
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
