"""The k largest pre-activations of each token, without the whole [batch, d_sae] matrix and without sorting it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sae_italian.saes.sparse_products import chunks

BLOCKS_FROM = 16  # d_sae / k from which two small top-k are faster than one


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
    scratch = None
    for part in chunks(len(x), len(rows)):
        n_rows = part.stop - part.start
        if scratch is None:
            scratch = torch.empty(n_rows, len(rows), dtype=matmul_dtype, device=x.device)
        raw = torch.mm(x[part], columns, out=scratch[:n_rows])
        scores = raw if raw.dtype == values.dtype else raw.to(values.dtype)
        scores = scores.add_(bias) if norm is None else torch.addcmul(scaled_bias, scores, norm, out=scores)
        top = largest(scores, k)
        indices[part] = top
        values[part] = scores.gather(1, top)
    return (values if norm is None else values / norm[indices]), indices


def largest(scores: Tensor, k: int) -> Tensor:
    """Return the indices [rows, k] of the k largest of each row, in no order.

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
