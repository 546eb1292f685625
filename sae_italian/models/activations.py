"""Read and replace activations of a Hugging Face model at hooks named as in TransformerLens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_italian.errors import UsageError
from sae_italian.models.hooks import Hook, parse_hook_name


class _StopForward(Exception):
    """Raised inside a forward pass once the last wanted activation has been read."""


def resolve_hook(model: nn.Module, hook_name: str) -> tuple[Hook, nn.Module]:
    """Return the Hook and its Hugging Face module. Raises UsageError for a name or layer the model does not have."""
    config: Any = model.config
    hook = parse_hook_name(hook_name, config.num_hidden_layers)
    return hook, model.get_submodule(hook.module_path(config.model_type))


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


@contextmanager
def _hooked(module: nn.Module, hook: Hook, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `function` on the hook's activation in every forward pass; what it returns replaces the activation."""

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = function(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    def on_output(_module: nn.Module, _args: Any, output: Any):
        new = function(_first(output))
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if hook.reads_input:
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def read_activations(
    model: nn.Module, tokens: Int[Tensor, "batch pos"], hook_name: str
) -> Float[Tensor, "batch pos d_in"]:
    """Return the activations at one hook; the forward pass stops right after it.

    Raises: UsageError for an unknown hook, and when the hook did not fire.
    """
    hook, module = resolve_hook(model, hook_name)
    caught: list[Tensor] = []

    def catch(activation: Tensor) -> None:
        caught.append(activation)
        raise _StopForward

    with _hooked(module, hook, catch):
        try:
            model(tokens, use_cache=False)
        except _StopForward:
            return caught[0]
    raise UsageError(
        f"hook {hook_name!r} never fired in {type(model).__name__}; its module is not used in the forward."
    )


@torch.no_grad()
def logits_with_replacement(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    hook_name: str,
    replace: Callable[[Float[Tensor, "batch pos d_in"]], Float[Tensor, "batch pos d_in"]],
) -> Float[Tensor, "batch pos vocab"]:
    """Return the logits of a forward pass in which the activation x at the hook is replaced by `replace(x)`."""
    hook, module = resolve_hook(model, hook_name)
    fired: list[bool] = []

    def swap(activation: Tensor) -> Tensor:
        fired.append(True)
        return replace(activation).to(activation.dtype)

    with _hooked(module, hook, swap):
        logits = model(tokens, use_cache=False).logits
    if not fired:
        raise UsageError(f"hook {hook_name!r} never fired in {type(model).__name__}.")
    return logits
