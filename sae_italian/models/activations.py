"""Read and replace activations of a Hugging Face model at hooks named as in TransformerLens; run it from one block on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_italian.base.errors import UsageError
from sae_italian.models.hooks import Hook, adapter_of, parse_hook_name

Acts = Float[Tensor, "batch pos d_in"]
_in_one_place: WeakSet[nn.Module] = WeakSet()  # hooked modules that a model uses under one name
_takes_mean: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # of the norms met so far


class _StopForward(Exception):
    """Raised inside a forward pass once the last wanted activation has been read."""


def check_context(context_size: int, config: Any) -> int:
    """Return the context if the model has that many positions. Raises: UsageError when it has fewer."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and context_size > limit:
        raise UsageError(f"context_size is {context_size}, but the model has {limit} positions. Use at most {limit}.")
    return context_size


def check_model(model: Any) -> Any:
    """Return a model of transformers, or its bridge, that has its tokenizer and is as it was loaded. Raises: UsageError."""
    if not (hasattr(model, "config") and hasattr(model, "tokenizer")):
        raise UsageError(
            f"the model is a {type(model).__name__}; give one of transformers, or its bridge, as load_model(name) does."
        )
    if attached := getattr(model, "acts_to_saes", None):
        raise UsageError(f"the model has SAEs in it, at {', '.join(attached)}. Take them out: reset_saes().")
    drops = [name for name in vars(model.config) if "drop" in name and getattr(model.config, name)]
    if drops and getattr(model, "original_model", model).training:
        raise UsageError(f"the model is in training, its dropout is on ({', '.join(drops)}). Call model.eval() first.")
    return model


def logits_of(model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
    """Return a model's logits, which TransformerLens' bridge gives as they are."""
    found = model(tokens, use_cache=False)
    return getattr(found, "logits", found)


def resolve_hook(model: nn.Module, hook_name: str) -> tuple[Hook, nn.Module]:
    """Return the Hook and its Hugging Face module.

    Raises: UsageError for a name or layer the model does not have, and for a module that several layers share: it fires
    once for each of them, and which time is meant no name says.
    """
    config: Any = model.config
    hook = parse_hook_name(hook_name, config.num_hidden_layers)
    module = model.get_submodule(hook.module_path(config))
    if module not in _in_one_place:
        # a bridge has each part of a block twice, once in the block that it wraps
        every = model.named_modules(remove_duplicate=False)
        places = [name for name, each in every if each is module and "_original_component" not in name]
        if len(places) > 1:
            raise UsageError(
                f"hook {hook.name!r}: this model uses one module as {', '.join(places[:4])}, so its layers cannot be told "
                "apart. Use a model whose layers are their own."
            )
        _in_one_place.add(module)
    return hook, module


def centred(x: Tensor, norm: nn.Module) -> Tensor:
    """A LayerNorm, whatever its class, takes the mean away, which is linear; a root-mean-square norm does not."""
    if norm not in _takes_mean:
        ones = next(norm.parameters(), x).new_ones(x.shape[-1])
        _takes_mean[norm] = torch.equal(norm.forward(ones), norm.forward(-ones))
    return x - x.mean(-1, keepdim=True) if _takes_mean[norm] else x


def scale_of(x: Tensor, norm: Any) -> Float[Tensor, "... 1"]:
    """Return what the norm multiplies the centred x by, before its gain."""
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 0.0
    return torch.rsqrt(centred(x, norm).pow(2).mean(-1, keepdim=True) + eps)


@torch.no_grad()
def gain_and_bias(norm: Any, like: Tensor) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Return gain and bias of any norm (Gemma's gain is 1 + w) from what it makes of a vector of mean 0 and size 1."""
    unit = torch.ones(like.shape[-1], dtype=like.dtype, device=like.device)
    unit[1::2] = -1
    plus, minus = norm.forward(unit), norm.forward(-unit)
    return (plus - minus) / (2 * unit * scale_of(unit, norm)), (plus + minus) / 2


@contextmanager
def replaced(model: nn.Module, hook_name: str, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Replace the activation x at the hook by `function(x)` in every forward pass in the block; None leaves it as it is.

    Gradients pass through. Activations read in the block, at this hook too, are those after the replacement.
    Raises: UsageError as `resolve_hook`, and in the forward pass for a hook that can only be read.
    """
    hook, module = resolve_hook(model, hook_name)

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        x = args[0] if args else kwargs["hidden_states"]
        if hook.normalised:
            x = (centred(x.float(), module) * scale_of(x.float(), module)).to(x.dtype)
        new = function(x)
        if new is None:
            return None
        if hook.normalised:
            raise UsageError(f"{hook.name} can be read but not replaced; replace the MLP's input or output instead.")
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def on_output(_module: nn.Module, _args: Any, output: Any):
        new = function(output[0] if isinstance(output, tuple) else output)
        return (new, *output[1:]) if isinstance(output, tuple) and new is not None else new

    if hook.reads_input:
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    with handle:
        yield


def logit_lens(model: nn.Module) -> Callable[[Float[Tensor, "n d_model"]], Float[Tensor, "n vocab"]]:
    """Return the function from directions d of the residual stream to what they add to every token's logit.

    It is W_U (gain * d), d centred where the last norm is a LayerNorm, as in TransformerLens' folded weights. The norm's
    division by the residual's scale is left out, so values compare within a direction, not with real logits.
    Raises: UsageError for a family that TransformerLens does not know, or whose last norm has no weight.
    """
    part = adapter_of(model.config).component_mapping.get("ln_final")
    norm: Any = None if part is None else model.get_submodule(part.name)
    if getattr(norm, "weight", None) is None:
        raise UsageError(f"{type(model).__name__} has no weight in its last norm, so its logits cannot be read off.")
    norm, unembed = deepcopy(norm).float(), cast(Any, model).get_output_embeddings().weight.detach().float()
    gain, _ = gain_and_bias(norm, unembed)
    return lambda d: (centred(d.to(unembed), norm) * gain) @ unembed.T


@torch.no_grad()
def read_many(model: Any, tokens: Int[Tensor, "batch pos"], hook_names: Sequence[str]) -> dict[str, Acts]:
    """Return the activations at several hooks of one forward pass, which stops after the last of them.

    Raises: UsageError for an unknown hook, when a hook did not fire, or is not as wide as the model.
    """
    caught: dict[str, Tensor] = {}
    wanted = list(dict.fromkeys(hook_names))

    def catch(name: str, activation: Tensor) -> None:
        if activation.shape[-1] != model.config.hidden_size:
            raise UsageError(
                f"hook {name!r} has {activation.shape[-1]} dimensions, but the model's config says {model.config.hidden_size}: "
                "a model whose width differs from layer to layer is not supported."
            )
        caught[name] = activation
        if len(caught) == len(wanted):
            raise _StopForward

    with ExitStack() as stack, suppress(_StopForward):
        for name in wanted:
            stack.enter_context(replaced(model, name, partial(catch, name)))
        model(tokens, use_cache=False)
        silent = next(name for name in wanted if name not in caught)
        raise UsageError(f"hook {silent!r} never fired: its module is not used by {type(model).__name__}.")
    return caught


def read_activations(model: nn.Module, tokens: Int[Tensor, "batch pos"], hook_name: str) -> Acts:
    """Return the activations at one hook; the forward pass stops right after it. Raises UsageError as `read_many`."""
    return read_many(model, tokens, [hook_name])[hook_name]


@torch.no_grad()
def logits_with_replacement(
    model: nn.Module, tokens: Int[Tensor, "batch pos"], hook_name: str, replace: Callable[[Acts], Acts]
) -> Float[Tensor, "batch pos vocab"]:
    """Return the logits of a forward pass in which the activation x at the hook is replaced by `replace(x)`."""
    with replaced(model, hook_name, lambda x: replace(x).to(x.dtype)):
        return logits_of(model, tokens)


def logits_at(
    model: Any, tokens: Int[Tensor, "batch pos"], wanted: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "wanted vocab"]:
    """Return the model's logits at the wanted positions, which are computed nowhere else; gradients pass.

    With a vocabulary of 262,144 the logits of all positions are two thirds of the work and nearly all of the memory.
    """
    head = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda _, args: (args[0][wanted.to(args[0].device)][None],)):
        return logits_of(model, tokens.to(model.device))[0]


@torch.no_grad()
def continuation_log_probs(
    forward: Callable[[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]], Float[Tensor, "wanted vocab"]],
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 64,
) -> Float[np.ndarray, " n"]:
    """Return log p(second part | first part) in nats for pairs of token ids, summed over the second part's tokens.

    `forward` returns the logits of tokens at the wanted positions. Pairs of one text are run once. Rows are padded on the
    right, where a causal model never looks back from; the first part must hold a token (the BOS) for every token of the
    second to have a probability.
    """
    totals: list[Any] = [np.zeros(0)]
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first : first + batch_size]
        fed = [(*before, *after)[:-1] for before, after in batch]
        row_of = {tokens: row for row, tokens in enumerate(dict.fromkeys(fed))}
        rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens or (0,)) for tokens in row_of], batch_first=True)
        asked = [
            (number, row_of[fed[number]], place, token)
            for number, (before, after) in enumerate(batch)
            for place, token in enumerate((*before, *after)[max(1, len(before)) :], max(1, len(before)) - 1)
        ]
        number, row, place, token = torch.tensor(asked, dtype=torch.int64).reshape(-1, 4).T
        wanted = torch.zeros(rows.shape, dtype=torch.bool)
        wanted[row, place] = True
        logits = forward(rows, wanted).float().cpu()
        found = (wanted.flatten().cumsum(0) - 1).reshape(rows.shape)[row, place]
        log_p = (logits[found, token] - logits.logsumexp(-1)[found]).double()
        totals.append(np.bincount(number.numpy(), log_p.numpy(), minlength=len(batch)))
    return np.concatenate(totals)


# --- a forward pass that begins in the middle ---------------------------------------------------------------------------


def entry_and_edit(model: Any, hook_name: str) -> tuple[str, str]:
    """Return where a run must begin for an edit at `hook_name` to be felt, and at which hook the edit is then made.

    A run begins at a block's input. The residual stream after a block is the next one's input; after the last there is
    none.
    """
    hook, _ = resolve_hook(model, hook_name)
    after = hook.legacy == "hook_resid_post" and hook.layer + 1 < model.config.num_hidden_layers
    entry = f"blocks.{hook.layer + after}.hook_resid_pre"
    return entry, entry if after else hook_name


@contextmanager
def begun_at(model: nn.Module, entry: str, residual: Float[Tensor, "batch pos d_model"]) -> Iterator[None]:
    """Begin every forward pass in the block with `residual` at the entry of `entry_and_edit`; earlier blocks are left out."""
    layers = range(resolve_hook(model, entry)[0].layer)
    earlier: list[Any] = [resolve_hook(model, f"blocks.{layer}.hook_resid_pre")[1] for layer in layers]
    for block in earlier:  # a bridge's block would hand the attribute on, and keep it
        vars(block)["forward"] = lambda hidden_states, *_, **__: hidden_states
    try:
        with replaced(model, entry, lambda _: residual):
            yield
    finally:
        for block in earlier:
            del vars(block)["forward"]
