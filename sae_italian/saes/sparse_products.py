"""The k largest of many rows without sorting them, and the three products over k latents per token.

A product goes by index where that is faster, dense a few rows at a time elsewhere, with the same result; indices may
repeat within a row. Shapes: weights and indices [batch, k], rows [n, d], other [batch, d].
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

DENSE_ABOVE = 1 / 32  # k / n from which dense products win, measured on CPU at d 1152
GROUP = 32  # values whose maximum is taken for a bound
BLOCKS_FROM = 16  # d_sae / k from which two small top-k are faster than one
CHUNK_ELEMENTS = 2**24  # of a scratch matrix [some rows, n]: 64 MiB in float32; fewer rows slow the product down


def exact(tensor: Tensor) -> Any:
    """Return a context without autocast: what follows runs in its tensors' own precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def chunks(n_rows: int, width: int) -> list[slice]:
    """Return slices over `n_rows` rows so that a matrix of that many rows and `width` columns stays small."""
    size = min(512, max(64, CHUNK_ELEMENTS // max(width, 1)))  # 512 rows are enough for the product
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


class Workspace:
    """The memory of the weight gradients and of scratch, kept between steps: fresh memory costs more than the sums on a CPU.

    A tensor is handed out over the kept memory only when nothing else refers to that memory: a gradient that somebody
    still holds, or that is being added to, is never overwritten. On CUDA PyTorch's own allocator does this.
    """

    def __init__(self):
        self._kept: dict[str, torch.UntypedStorage] = {}

    def empty(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return an uninitialised tensor of that shape, in `like`'s dtype and on its device."""
        use_count = getattr(torch._C, "_storage_Use_Count", None)
        if like.device.type != "cpu" or use_count is None:
            return like.new_empty(shape)
        kept = self._kept.get(name)
        n_bytes = like.element_size() * torch.Size(shape).numel()
        if kept is None or kept.nbytes() != n_bytes or use_count(kept._cdata) != 1:
            kept = self._kept[name] = like.new_empty(shape).untyped_storage()
        return like.new_empty(0).set_(kept, 0, shape)  # pyright: ignore[reportCallIssue]

    def __reduce__(self):
        return Workspace, ()  # a copy or a pickle of an SAE starts with memory of its own


def select_topk(
    x: Tensor,
    rows: Tensor,
    bias: Tensor,
    k: int,
    norm: Tensor | None,
    matmul_dtype: torch.dtype,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor]:
    """Return values and indices [batch, k] of the k largest (x rows.T + bias) * norm; the values are without the norm.

    The product runs in `matmul_dtype` (autocast), all else in x's own. Ties go to any of the equal latents.
    """
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.long, device=x.device)
    x, columns = x.to(matmul_dtype), rows.to(matmul_dtype).T
    scaled_bias = bias if norm is None else bias * norm
    scratch = None
    for part in chunks(len(x), len(rows)):
        n_rows = part.stop - part.start
        if scratch is None:
            shape = (n_rows, len(rows))
            scratch = x.new_empty(shape) if workspace is None else workspace.empty("scratch", shape, x)
        raw = torch.mm(x[part], columns, out=scratch[:n_rows])
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
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " nnz"], Float[np.ndarray, " nnz"]]:
    """Return, for every token that is not mute, how many of its k largest values are positive, which and what they are.

    Columns ascend within a token. The values are those `torch.topk` takes; where equal values compete for the last
    place it is asked itself. NaN and infinity count as positive, for the caller to refuse.
    """
    n_groups = pre.shape[1] // GROUP
    if pre.device.type == "cpu" and pre.dtype == torch.float32 and pre.shape[1] % GROUP == 0 and n_groups >= 2 * k:
        found = _bounded(pre, k, mute)
        if found is not None:
            return found
    values, columns = pre.topk(k, dim=-1, sorted=False)
    columns, order = columns.sort(dim=-1)
    value, column = values.gather(-1, order).float().cpu().numpy(), columns.cpu().numpy()
    keep = ~(value <= 0)
    keep[mute] = False
    return keep.sum(axis=1), column[keep], value[keep]


def _bounded(
    pre: Float[Tensor, "tokens d_sae"], k: int, mute: Bool[np.ndarray, " tokens"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return what `top_positive` does, or None where equal values or NaN make the answer depend on the order.

    The k-th largest maximum of disjoint groups is reached by at least k values, so no smaller one is among the k largest.
    What is left is ragged and little more than k a row, so this is several times faster than `largest`, which must give
    exactly k of each.
    """
    n, d_sae = pre.shape
    maxima = pre.view(n, GROUP, d_sae // GROUP).amax(dim=1)
    bound = maxima.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True).clamp_(min=0.0)
    if bound.isnan().any() or maxima.isnan().any():
        return None
    bound[torch.from_numpy(mute)] = torch.inf
    flat = np.flatnonzero((pre >= bound).numpy())
    row, value = flat // d_sae, pre.numpy().ravel()[flat]
    positive = (value > 0) & ~mute[row]  # +inf reaches every bound, and is for the caller to refuse
    if not positive.all():
        row, value, flat = row[positive], value[positive], flat[positive]
    count = np.bincount(row, minlength=n)
    widest = int(count.max(initial=0))
    if widest > k:
        table = np.zeros((n, widest), dtype=np.float32)
        table[row, np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)] = value
        least = np.partition(table, widest - k, axis=1)[:, widest - k]  # the k-th largest of each row, 0 if fewer
        keep = value >= least[row]
        row, value, flat = row[keep], value[keep], flat[keep]
        count = np.bincount(row, minlength=n)
        if (count > k).any():
            return None
    return count, flat - row * d_sae, value


def weighted_rows(weights: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Return [batch, d]: the sum over k of weight times row."""
    if not _is_dense(indices, rows):
        return F.embedding_bag(indices, rows, mode="sum", per_sample_weights=weights.to(rows.dtype))
    out = rows.new_empty(len(indices), rows.shape[1])
    for part in chunks(len(indices), len(rows)):
        torch.mm(_scattered(weights[part], indices[part], rows), rows, out=out[part])
    return out


def row_dots(indices: Tensor, rows: Tensor, other: Tensor) -> Tensor:
    """Return [batch, k]: the dot products of each row of `other` with the k rows of its indices."""
    batch, k = indices.shape
    other = other.to(rows.dtype)
    if _is_dense(indices, rows):
        parts = chunks(batch, len(rows))
        return torch.cat([(other[part] @ rows.T).gather(1, indices[part]) for part in parts])
    if _has_csr(rows):
        starts = torch.arange(0, batch * k + 1, k)
        pattern = _csr(starts, indices.flatten(), rows.new_zeros(batch * k), (batch, len(rows)))
        return torch.sparse.sampled_addmm(pattern, other, rows.T, beta=0.0).values().view(batch, k)
    if rows.device.type == "cuda":
        offsets = torch.arange(0, batch * k, k, device=rows.device)
        bag_of = torch.arange(batch, device=rows.device).repeat_interleave(k)
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            other, rows, indices.flatten(), offsets, bag_of, 0, -1
        ).view(batch, k)
    parts = chunks(batch, k * rows.shape[1])
    return torch.cat([torch.einsum("bkd,bd->bk", rows[indices[part]], other[part]) for part in parts])


def latent_sums(
    weights: Tensor, indices: Tensor, other: Tensor, n: int, workspace: Workspace | None = None, name: str = ""
) -> Tensor:
    """Return [n, d]: for each latent the sum, over the tokens that kept it, of weight times row of `other`."""
    k = indices.shape[1]
    shape = (n, other.shape[1])
    out = workspace.empty(name, shape, other) if workspace is not None else other.new_empty(shape)
    if k > DENSE_ABOVE * n:
        out.zero_()
        for part in chunks(len(indices), n):
            out.addmm_(_scattered(weights[part], indices[part], out).T, other[part])
        return out
    latents, order = indices.flatten().sort(stable=True)
    tokens = order.div(k, rounding_mode="floor")
    weights = weights.to(other.dtype).flatten()[order]
    starts = torch.searchsorted(latents, torch.arange(n + 1, device=latents.device))
    if _has_csr(other):
        return torch.addmm(out, _csr(starts, tokens, weights, (n, len(other))), other, beta=0.0, out=out)
    return F.embedding_bag(tokens, other, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _is_dense(indices: Tensor, rows: Tensor) -> bool:
    return indices.shape[1] > DENSE_ABOVE * len(rows)


def _scattered(weights: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    dense = like.new_zeros(len(indices), len(like))
    return dense.scatter_add_(1, indices, weights.to(like.dtype))


def _has_csr(tensor: Tensor) -> bool:
    """Whether PyTorch has sparse matrix products for this tensor that are faster than its embedding bags."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.float64)
        and torch.backends.mkl.is_available()
    )


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    _say_beta_once()
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


@cache
def _say_beta_once() -> None:
    """Let PyTorch give its one warning per process about compressed sparse tensors where nobody sees it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 0], [], torch.empty(0), (1, 1), check_invariants=False)
