"""Screening in bfloat16: the k largest pre-activations, found with a product in half precision and proved in full.

A bfloat16 product is two to three times faster than a float32 one where the CPU has instructions for it (AVX-512 BF16,
AMX) and on every recent GPU. It ranks well enough to name 2k candidates per token; these are scored again in the
input's own precision. Whether a latent outside them could belong to the k largest is decided by a bound on the error of
the first product; the tokens for which it could (`Workspace.unproved` of `Workspace.screened`) are done again in full.
So the latents kept are those of the plain way, always, up to latents whose scores are equal within the rounding of
float32.

The bound, with x = x' + dx and w = w' + dw (primes are the rounded vectors): |x w - x' w'| <= |dx| |w| + |x'| |dw| by
Cauchy-Schwarz, and the score as stored is rounded once more, by 2^-9 of itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_italian.saes.sparse_products import Workspace, chunks, row_dots
from sae_italian.saes.sparse_select import largest, select_topk

CANDIDATES = 2  # times k
ROWS_AT_ONCE = 4096
ROUNDING = 2.0**-9  # of bfloat16, relative
ACCUMULATION = 2.0**-14  # of float32 sums over up to some thousand products, relative to |x| |w|; generous


def can_screen(x: Tensor, n_latents: int, k: int, matmul_dtype: torch.dtype) -> bool:
    """Whether screening can save anything: float32 throughout, and candidates a small part of the latents."""
    return x.dtype == matmul_dtype == torch.float32 and 4 * CANDIDATES * k <= n_latents


@torch.no_grad()
def screened_topk(
    x: Tensor,
    rows: Tensor,
    bias: Tensor,
    k: int,
    norm: Tensor | None,
    matmul_dtype: torch.dtype,
    workspace: Workspace,
) -> tuple[Tensor, Tensor]:
    """Return what `select_topk` does: values [batch, k] without the norm, and their latents.

    x [batch, d_in], rows [d_sae, d_in], bias and norm [d_sae]; all float32, as `can_screen` asks.
    """
    scaled_bias = bias if norm is None else bias * norm
    rounded, widest, w_error = _rounded(rows, norm, workspace)
    x16, bias16 = x.bfloat16(), scaled_bias.bfloat16()
    x_norm, x_error = x.norm(dim=1), (x - x16.float()).norm(dim=1)
    slack = x_error * widest + (x_norm + x_error) * w_error + ACCUMULATION * x_norm * widest
    slack += (scaled_bias - bias16.float()).abs().max()

    values, indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.long, device=x.device)
    proved = torch.empty(len(x), dtype=torch.bool, device=x.device)
    scratch = None
    for part in chunks(len(x), len(rows)):
        if scratch is None:
            scratch = workspace.empty("bf16 scratch", (part.stop - part.start, len(rows)), x16)
        scores16 = torch.addmm(bias16, x16[part], rounded.T, out=scratch[: part.stop - part.start])
        candidates = largest(scores16, CANDIDATES * k)
        outside = scores16.gather(1, candidates).float().amin(1)  # no other latent was ranked above this
        scores = row_dots(candidates, rows, x[part])
        if norm is not None:
            scores *= norm[candidates]
        scores += scaled_bias[candidates]
        best = scores.topk(k, dim=-1, sorted=False)
        indices[part], values[part] = candidates.gather(1, best.indices), best.values
        proved[part] = _proved(best.values.amin(1), outside, slack[part])
    if norm is not None:
        values /= norm[indices]
    again = (~proved).nonzero().flatten()
    if len(again):
        values[again], indices[again] = select_topk(x[again], rows, bias, k, norm, matmul_dtype)
    workspace.screened += len(x)
    workspace.unproved += len(again)
    return values, indices


def _proved(worst: Tensor, outside: Tensor, slack: Tensor) -> Tensor:
    """Whether the worst score kept is above all that a latent with the bfloat16 score `outside` can have."""
    return worst > outside + 2 * ROUNDING * outside.abs() + slack


def _rounded(rows: Tensor, norm: Tensor | None, workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows times their norm in bfloat16, the largest norm of one, and of its rounding error."""
    rounded = workspace.empty("bf16 rows", tuple(rows.shape), rows.new_empty(0, dtype=torch.bfloat16))
    norms, errors = [], []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        scaled = rows[part] if norm is None else rows[part] * norm[part, None]
        rounded[part] = scaled
        norms.append(scaled.norm(dim=1).max())
        errors.append((scaled - rounded[part].float()).norm(dim=1).max())
    return rounded, torch.stack(norms).max(), torch.stack(errors).max()
