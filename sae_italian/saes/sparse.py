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

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_italian.saes.sparse_products import Workspace, exact, latent_sums, row_dots, select_topk, weighted_rows


def encode_rows(
    x: Float[Tensor, "batch d_in"],
    rows: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    norm: Float[Tensor, " d_sae"] | None = None,
    input_bias: Float[Tensor, " d_in"] | None = None,
    latents: Int[Tensor, " n"] | None = None,
    relu: bool = True,
    workspace: Workspace | None = None,
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return ReLU of the k largest pre-activations x W_enc + b_enc of each row, and their latents, in no order.

    The encoder is given as rows (W_enc.T). Differentiable in x, rows, b_enc and `input_bias`.
    norm: the latents are ranked by pre-activation times this positive number; the values returned are not multiplied.
    input_bias: a bias that the caller has already subtracted from x; named here, its gradient costs one matrix-vector
    product. latents: only these compete, and the indices returned count within them. relu=False keeps negative values.
    The gradient of `rows` is dense, or sparse in `latents` where they are given.

    Raises: ValueError unless 1 <= k <= the number of latents that compete.
    """
    n = len(rows) if latents is None else len(latents)
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; it must be from 1 to the number of latents, {n}")
    device = x.device.type
    matmul_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with exact(x):
        return _Encode.apply(x, rows, b_enc, input_bias, k, norm, latents, relu, matmul_dtype, workspace)


def decode(
    values: Float[Tensor, "batch k"],
    indices: Int[Tensor, "batch k"],
    W_dec: Float[Tensor, "d_sae d_out"],
    *,
    latents: Int[Tensor, " n"] | None = None,
    workspace: Workspace | None = None,
) -> Float[Tensor, "batch d_out"]:
    """Return the sum over the k latents of value times row of W_dec; differentiable in values and W_dec.

    latents: the indices count within these, as `encode_rows` returns them; the gradient of W_dec is then sparse in them.
    """
    with exact(values):
        return _Decode.apply(values, indices, W_dec, latents, workspace)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, b_enc, input_bias, k, norm, latents, relu, matmul_dtype, workspace):  # pyright: ignore
        some = rows if latents is None else rows[latents]
        bias = b_enc if latents is None else b_enc[latents]
        values, indices = select_topk(x, some, bias, k, norm, matmul_dtype, workspace)
        if relu:
            values = values.relu_()
        # the rows themselves are needed for the gradients of the input and of its bias only
        ctx.save_for_backward(x, some, values, indices, latents)
        ctx.relu, ctx.n_latents, ctx.workspace = relu, len(rows), workspace
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, some, values, indices, latents = ctx.saved_tensors
        grad = gradients[0] * (values > 0) if ctx.relu else gradients[0]
        need_x, need_rows, need_b, need_bias = ctx.needs_input_grad[:4]
        grad_x = grad_rows = grad_b = grad_bias = None
        with exact(x):
            sums = grad.new_zeros(len(some)).index_add_(0, indices.flatten(), grad.flatten())
            if need_x:
                grad_x = weighted_rows(grad, indices, some)
            if need_rows:
                grad_rows = latent_sums(grad, indices, x, len(some), ctx.workspace, "W_enc")
                grad_rows = _spread(grad_rows, latents, ctx.n_latents)
            if need_b:
                grad_b = sums if latents is None else sums.new_zeros(ctx.n_latents).index_copy_(0, latents, sums)
            if need_bias:
                grad_bias = -torch.mv(some.T, sums)
        return grad_x, grad_rows, grad_b, grad_bias, *[None] * 6


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, W_dec, latents, workspace):  # pyright: ignore[reportIncompatibleMethodOverride]
        some = W_dec if latents is None else W_dec[latents]
        ctx.save_for_backward(values, indices, some, latents)
        ctx.n_latents, ctx.workspace = len(W_dec), workspace
        return weighted_rows(values, indices, some)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        values, indices, some, latents = ctx.saved_tensors
        grad = gradients[0].contiguous()
        grad_values = grad_W = None
        with exact(grad):
            if ctx.needs_input_grad[0]:
                grad_values = row_dots(indices, some, grad)
            if ctx.needs_input_grad[2]:
                grad_W = latent_sums(values, indices, grad, len(some), ctx.workspace, "W_dec")
                grad_W = _spread(grad_W, latents, ctx.n_latents)
        return grad_values, None, grad_W, None, None


def _spread(some: Tensor, latents: Tensor | None, n_latents: int) -> Tensor:
    """Return the gradient of all rows: sparse in `latents`, so that adding it to a dense one touches only these."""
    if latents is None:
        return some
    return torch.sparse_coo_tensor(
        latents[None], some, (n_latents, *some.shape[1:]), is_coalesced=True, check_invariants=False
    )


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
