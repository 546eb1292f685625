"""Run a Hugging Face model from one block on, with the residual stream that an earlier run had there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from sae_italian.models.activations import replaced, resolve_hook


def entry_hook(model: nn.Module, hook_name: str) -> str:
    """Return the hook of the block's input from which a run must begin for an edit at `hook_name` to be felt.

    The residual stream after a block is the next one's input; there is none after the last.
    """
    hook, _ = resolve_hook(model, hook_name)
    config: Any = model.config
    after = hook.legacy == "hook_resid_post" and hook.layer + 1 < config.num_hidden_layers
    return f"blocks.{hook.layer + after}.hook_resid_pre"


def edit_hook(model: nn.Module, hook_name: str) -> str:
    """Return the hook at which an edit of `hook_name` is made in a run begun at `entry_hook`."""
    entry = entry_hook(model, hook_name)
    return hook_name if resolve_hook(model, entry)[0].layer == resolve_hook(model, hook_name)[0].layer else entry


@contextmanager
def begun_at(model: nn.Module, entry: str, residual: Float[Tensor, "batch pos d_model"]) -> Iterator[None]:
    """Begin every forward pass in the block with `residual` at a hook of `entry_hook`; earlier blocks are left out."""
    hook, _ = resolve_hook(model, entry)
    path = hook.module_path(model.config.model_type)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    blocks: Any = model.get_submodule(path.rpartition(".")[0])
    earlier = [blocks[layer] for layer in range(hook.layer)]
    for block in earlier:
        block.forward = _unchanged
    try:
        with replaced(model, entry, lambda _: residual):
            yield
    finally:
        for block in earlier:
            del block.forward


def _unchanged(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
