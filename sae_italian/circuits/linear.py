"""A model on one prompt with everything frozen that is not linear, so that a gradient is an exact share of a sum.

Attention patterns, the scale of every norm and all MLPs are constants of the prompt; between MLPs the model is then linear in
what the blocks' input, the transcoders' latents and their errors write (Ameisen et al. 2025, "Circuit Tracing"). It is the
Hugging Face model with hooks: any family that TransformerLens' adapters know and transformers' attention interface serves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sae_italian.base.errors import UsageError
from sae_italian.models.activations import replaced, resolve_hook
from sae_italian.models.hooks import adapter_of

FROZEN = "sae_italian_frozen"  # the name under which transformers knows the attention that is frozen
Writes = Float[Tensor, "batch pos d_model"]


class Target(NamedTuple):
    """What is attributed: `vector` times the read of a layer at a position; layer n_layers is the unembedding's input."""

    layer: int
    position: int
    vector: Float[Tensor, " d"]


@dataclass
class Constants:
    """What a pass found and another of the same prompt may use in its place: queries and keys, scales, MLP outputs."""

    attention: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    scales: dict[str, Tensor] = field(default_factory=dict)
    written: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Linear:
    """A prompt repeated `batch` times; leaves and reads share one graph of gradients."""

    leaves: tuple[Writes, ...]  # the first block's input, then zeros added to each layer's MLP output
    reads: Mapping[
        int, Float[Tensor, "batch pos d_in"]
    ]  # by layer, what its transcoder reads; n_layers: the unembedding's
    constants: Constants

    def gradients(self, targets: Sequence[Target]) -> list[Writes | None]:
        """Return the gradient of each target, a row each, at every leaf; None where no target looks back so far.

        At most `batch` targets at a time.
        """
        layers = sorted({target.layer for target in targets})
        outputs = [self.reads[layer] for layer in layers]
        given = [torch.zeros_like(output) for output in outputs]
        for row, target in enumerate(targets):
            given[layers.index(target.layer)][row, target.position] = target.vector.to(outputs[0])
        found = torch.autograd.grad(outputs, self.leaves, given, retain_graph=True, allow_unused=True)
        return [None if gradient is None else gradient[: len(targets)] for gradient in found]


class _AllRead(Exception):
    """Raised inside the forward pass when the unembedding's input is known: of its output nothing is needed."""


def linearise(
    model: Any,
    tokens: Int[Tensor, "1 pos"],
    hooks: Mapping[int, str],
    *,
    batch: int = 1,
    skips: Mapping[int, Tensor] | None = None,
    constants: Constants | None = None,
    added: Mapping[int, Float[Tensor, "pos d_model"]] | None = None,
) -> Linear:
    """Run the model on the prompt with all that is not linear frozen.

    `hooks` names by layer where its transcoder reads, `skips` its W_skip [d_out, d_in] where it has one. With `constants` of
    an earlier pass these are used in the place of what this one finds, and `added` is written into the residual stream at
    the layers' MLPs (at -1: at the first block's input): reads then move by exactly what the gradients say.
    Raises: UsageError for a model in half precision, and for a hook that the model does not have.
    """
    if model.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"the model is in {model.dtype}; attribution needs float32. Load it with dtype=float32.")
    n_layers, found = model.config.num_hidden_layers, Constants()
    leaves: list[Tensor] = []
    reads: dict[int, Tensor] = {}

    def embedded(x: Tensor) -> Tensor:
        more = (added or {}).get(-1)
        leaves.append((x if more is None else x + more.to(x)).detach().requires_grad_())
        return leaves[0]

    def write(layer: int, out: Tensor) -> Tensor:
        found.written[layer] = out.detach() if constants is None else constants.written[layer]
        more = (added or {}).get(layer)
        leaf = torch.zeros_like(leaves[0]) if more is None else more.to(out).expand_as(leaves[0]).clone()
        leaves.append(leaf.requires_grad_())
        skip = 0.0
        if skips and layer in skips:
            passed = reads[layer] @ skips[layer].T.to(out)
            skip = passed - passed.detach()
        return found.written[layer] + leaf + skip

    with ExitStack() as stack:
        stack.enter_context(_attention(model, found.attention, constants))
        for path in _norms(model):
            stack.enter_context(_hooked(model.get_submodule(path), partial(_linear_norm, path, found, constants)))
        stack.enter_context(replaced(model, "blocks.0.hook_resid_pre", embedded))
        for layer in range(n_layers):
            if layer in hooks:
                stack.enter_context(_read(model, hooks[layer], constants, partial(reads.__setitem__, layer)))
            # every row of the batch is the same prompt: one is enough for the MLP, and no gradient goes through it
            stack.enter_context(replaced(model, f"blocks.{layer}.mlp.hook_in", lambda x: x[:1].detach()))
            stack.enter_context(replaced(model, f"blocks.{layer}.hook_mlp_out", partial(write, layer)))

        def last(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            reads[n_layers] = args[0]
            raise _AllRead

        stack.callback(model.get_output_embeddings().register_forward_pre_hook(last).remove)
        with torch.enable_grad(), suppress(_AllRead):
            model(tokens.expand(batch, -1), use_cache=False)
    return Linear(tuple(leaves), reads, found)


# --- what is frozen ------------------------------------------------------------------------------------------------------


@contextmanager
def _attention(model: Any, found: list[tuple[Tensor, Tensor]], constants: Constants | None) -> Iterator[None]:
    """Detach queries and keys in every attention of the model: its patterns are constants, only values carry gradients."""
    name = model.config._attn_implementation
    known = iter(constants.attention) if constants else None

    def frozen(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        original = ALL_ATTENTION_FUNCTIONS.get(name) or sys.modules[type(module).__module__].eager_attention_forward
        found.append((query.detach(), key.detach()))
        return original(module, *(next(known) if known else found[-1]), value, *args, **kwargs)

    AttentionInterface.register(FROZEN, frozen)
    AttentionMaskInterface.register(FROZEN, ALL_MASK_ATTENTION_FUNCTIONS[name])
    model.set_attn_implementation(FROZEN)
    try:
        yield
    finally:
        model.set_attn_implementation(name)


def _norms(model: Any) -> list[str]:
    """Return the paths of all norms of the residual stream: before and behind attention and MLP, and the last one."""
    adapter = adapter_of(model.config)
    parts = [name for name in adapter.component_mapping["blocks"].submodules if name.startswith("ln")]
    paths = [f"blocks.{layer}.{part}" for layer in range(model.config.num_hidden_layers) for part in parts]
    return [adapter.translate_transformer_lens_path(path) for path in (*paths, "ln_final")]


@contextmanager
def _hooked(module: nn.Module, function: Callable[[nn.Module, Any, Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()


def _centred(x: Tensor, norm: nn.Module) -> Tensor:
    """LayerNorm takes the mean away, which is linear; a root-mean-square norm does not."""
    return x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x


def _scale(x: Tensor, norm: Any) -> Float[Tensor, "batch pos 1"]:
    """Return what the norm divides by, as a factor, without a gradient."""
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 0.0)
    return torch.rsqrt(_centred(x, norm).detach().pow(2).mean(-1, keepdim=True) + eps)


@torch.no_grad()
def _gain_and_bias(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return gain and bias of any norm (Gemma's gain is 1 + w) from what it makes of a vector of mean 0 and size 1."""
    unit = torch.ones(like.shape[-1], dtype=like.dtype, device=like.device)
    unit[1::2] = -1
    plus, minus = norm.forward(unit), norm.forward(-unit)
    return (plus - minus) / (2 * unit * _scale(unit, norm)), (plus + minus) / 2


def _linear_norm(
    path: str, found: Constants, constants: Constants | None, norm: nn.Module, args: tuple[Tensor, ...], _: Tensor
) -> Tensor:
    """Return the norm of its input with the scale a constant."""
    (x,) = args
    found.scales[path] = _scale(x, norm) if constants is None else constants.scales[path]
    gain, bias = _gain_and_bias(norm, x)
    return _centred(x, norm) * found.scales[path] * gain + bias


@contextmanager
def _read(model: Any, hook_name: str, constants: Constants | None, keep: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand over what a transcoder reads: the MLP's input, or the norm's input at its frozen scale without the gain."""
    hook, module = resolve_hook(model, hook_name)
    if not hook.normalised:
        with replaced(model, hook_name, keep):  # None leaves the activation as it is
            yield
        return

    def before(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        path = hook.module_path(model.config)
        keep(_centred(args[0], norm) * (_scale(args[0], norm) if constants is None else constants.scales[path]))

    handle = module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
