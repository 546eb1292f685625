"""The k largest of many rows without sorting them: a bound from group maxima first leaves little more than k candidates."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

GROUP = 32


def top_positive(
    pre: Float[Tensor, "tokens d_sae"], k: int, mute: Bool[np.ndarray, " tokens"]
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " nnz"], Float[np.ndarray, " nnz"]]:
    """Return, for every token that is not mute, how many of its k largest values are positive, which and what they are.

    Columns ascend within a token. The values are those `torch.topk` takes; where equal values compete for the last
    place it is asked itself. NaN counts as positive, for the caller to refuse.
    """
    if pre.device.type == "cpu" and pre.dtype == torch.float32 and _pays(pre.shape[1], k):
        found = _bounded(pre, k, mute)
        if found is not None:
            return found
    values, columns = pre.topk(k, dim=-1, sorted=False)
    columns, order = columns.sort(dim=-1)
    value, column = values.gather(-1, order).float().cpu().numpy(), columns.cpu().numpy()
    keep = ~(value <= 0)
    keep[mute] = False
    return keep.sum(axis=1), column[keep], value[keep]


def _pays(d_sae: int, k: int) -> bool:
    return d_sae % GROUP == 0 and d_sae // GROUP >= 2 * k


def _bounded(
    pre: Float[Tensor, "tokens d_sae"], k: int, mute: Bool[np.ndarray, " tokens"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return what `top_positive` does, or None where equal values or NaN make the answer depend on the order.

    The k-th largest maximum of disjoint groups is reached by at least k values, so no smaller one is among the k largest.
    """
    n, d_sae = pre.shape
    maxima = pre.view(n, GROUP, d_sae // GROUP).amax(dim=1)
    bound = maxima.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True).clamp_(min=0.0)
    if bound.isnan().any() or maxima.isnan().any():
        return None
    bound[torch.from_numpy(mute)] = torch.inf
    flat = np.flatnonzero((pre >= bound).numpy())
    row, value = flat // d_sae, pre.numpy().ravel()[flat]
    positive = (value > 0) & (value < np.inf)
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
