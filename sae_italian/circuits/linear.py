"""A model on one prompt with everything frozen that is not linear, so that a gradient is an exact share of a sum.

Attention patterns, the scale of every norm and all MLPs are constants of the prompt; between MLPs the model is then linear in
what the blocks' input, the transcoders' latents and their errors write (Ameisen et al. 2025, "Circuit Tracing"). It is the
Hugging Face model with hooks: any family that TransformerLens' adapters know and transformers' attention interface serves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sae_italian.base.errors import UsageError
from sae_italian.models.activations import centred, gain_and_bias, replaced, resolve_hook, scale_of
from sae_italian.models.hooks import adapter_of

FROZEN = "sae_italian_frozen"  # the name under which transformers knows the attention that is frozen
Writes = Float[Tensor, "1 pos d_model"]


class Targets(NamedTuple):
    """What is attributed: each vector times the read of a layer at a position; layer n_layers is the unembedding's input."""

    layer: int
    positions: Int[Tensor, " n"]
    vectors: Float[Tensor, "n d"]

    def of(self, reads: Mapping[int, Float[Tensor, "1 pos d"]]) -> Float[Tensor, " n"]:
        """Return the targets' values on what is read."""
        return (reads[self.layer][0, self.positions] * self.vectors).sum(-1)


class Linear:
    """A prompt run with all that is not linear frozen; leaves and reads share one graph of gradients."""

    def __init__(
        self,
        model: Any,
        tokens: Int[Tensor, "1 pos"],
        hooks: Mapping[int, str],
        *,
        skips: Mapping[int, Tensor] | None = None,
        before: Linear | None = None,
        added: Mapping[int, Float[Tensor, "pos d_model"]] | None = None,
    ):
        """Run the model on the prompt.

        `hooks` names by layer where its transcoder reads, `skips` its W_skip [d_out, d_in] where it has one. With an earlier
        pass `before`, its constants are used in the place of what this one finds, and `added` is written into the residual
        stream at the layers' MLPs (at -1: at the first block's input): reads then move by exactly what the gradients say.
        Raises: UsageError for a bridge, for a model in half precision, and for a hook that the model does not have.
        """
        if hasattr(model, "original_model"):
            raise UsageError("the model is TransformerLens' bridge; a graph needs the model itself.")
        if model.dtype not in (torch.float32, torch.float64):
            raise UsageError(f"the model is in {model.dtype}; attribution needs float32. Load it with dtype=float32.")
        self.skips, self.added = skips or {}, added or {}
        self.leaves: list[Writes] = []  # the first block's input, then zeros added to each MLP's output
        self.reads: dict[int, Writes] = {}  # what each transcoder reads; n_layers: the unembedding
        # The constants: what this pass finds, unless an earlier one of the same prompt has found it.
        self.patterns: dict[nn.Module, Float[Tensor, "pos heads pos"]] = before.patterns if before else {}
        self.scales: dict[str, Float[Tensor, "1 pos 1"]] = before.scales if before else {}
        self.written: dict[int, Tensor] = before.written if before else {}
        self.passed: dict[int, Tensor] = before.passed if before else {}  # by the skip connections
        resolved = {layer: resolve_hook(model, name)[0] for layer, name in hooks.items()}
        normalised = {hook.module_path(model.config): layer for layer, hook in resolved.items() if hook.normalised}
        n_layers, reading = model.config.num_hidden_layers, resolved.keys() - normalised.values()
        with ExitStack() as stack:
            stack.enter_context(_attending(model, self._attend))
            for path in _norms(model):
                norm = partial(self._norm, path, normalised.get(path))
                stack.callback(model.get_submodule(path).register_forward_hook(norm).remove)
            stack.enter_context(replaced(model, "blocks.0.hook_resid_pre", self._first))
            for layer in range(n_layers):
                read = partial(self._read, layer if layer in reading else None)
                stack.enter_context(replaced(model, f"blocks.{layer}.mlp.hook_in", read))
                stack.enter_context(replaced(model, f"blocks.{layer}.hook_mlp_out", partial(self._write, layer)))
            with torch.enable_grad():  # all but the unembedding, of which nothing is needed
                final = model.base_model(tokens, use_cache=False).last_hidden_state
        self.reads[n_layers] = final

    def gradients(self, targets: Sequence[Targets]) -> list[Float[Tensor, "targets pos d_model"] | None]:
        """Return the gradient of each target, a row each, at every leaf; None where no target looks back so far.

        All go back in one pass (`is_grads_batched`); those of a layer stand together.
        """
        outputs = [self.reads[each.layer] for each in targets]
        n, row, given = sum(len(each.positions) for each in targets), 0, []
        for output, each in zip(outputs, targets, strict=True):
            given.append(output.new_zeros(n, *output.shape))
            given[-1][torch.arange(row, row := row + len(each.positions)), 0, each.positions] = each.vectors
        how = {"retain_graph": True, "allow_unused": True, "is_grads_batched": True}
        found = torch.autograd.grad(outputs, self.leaves, given, **how)
        return [None if gradient is None else gradient[:, 0] for gradient in found]

    def _first(self, x: Tensor) -> Tensor:
        self.leaves.append((x + self.added.get(-1, 0.0)).detach().requires_grad_())
        return self.leaves[0]

    def _norm(self, path: str, layer: int | None, module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
        """Return the norm of its input with the scale a constant; the transcoder of `layer` reads it before the gain."""
        (x,), middle = args, centred(args[0], module)
        if path not in self.scales:
            self.scales[path] = scale_of(x.detach(), module)
        if layer is not None:
            self.reads[layer] = middle * self.scales[path]
        gain, bias = gain_and_bias(module, x)
        return middle * (self.scales[path] * gain) + bias

    def _read(self, layer: int | None, x: Tensor) -> Tensor:
        if layer is not None:
            self.reads[layer] = x
        return x.detach()  # the MLP itself passes no gradient

    def _write(self, layer: int, out: Tensor) -> Tensor:
        written, skip = self.written.setdefault(layer, out.detach()), 0.0
        self.leaves.append((torch.zeros_like(out) + self.added.get(layer, 0.0)).detach().requires_grad_())
        if layer in self.skips:
            passed = self.reads[layer] @ self.skips[layer].T.to(out)
            skip = passed - self.passed.setdefault(layer, passed.detach())
        return written + self.leaves[-1] + skip

    def _attend(self, original: Callable[..., Any], module: Any, *given: Any, **more: Any) -> tuple[Tensor, None]:
        """Return what attention makes of the values with its pattern a constant, so that going back is one product.

        What it makes of values that say each position's own name is the pattern, in any implementation of it.
        """
        query, key, value, mask, *args = given
        if module not in self.patterns:
            names = torch.eye(value.shape[2]).to(value).expand(1, value.shape[1], -1, -1)
            with torch.no_grad():
                self.patterns[module] = original(module, query, key, names, mask, *args, **more)[0][0]
        pattern = self.patterns[module].unflatten(1, (value.shape[1], -1))  # heads may share values
        return torch.einsum("qgrk,bgkd->bqgrd", pattern, value).flatten(2, 3), None


@contextmanager
def _attending(model: Any, attend: Callable[..., Any]) -> Iterator[None]:
    """Put `attend(original, module, query, key, value, mask, ...)` in the place of every attention; no weight gets a gradient."""
    name = model.config._attn_implementation

    def frozen(module: Any, *args: Any, **kwargs: Any) -> Any:
        original = ALL_ATTENTION_FUNCTIONS.get(name) or sys.modules[type(module).__module__].eager_attention_forward
        return attend(original, module, *args, **kwargs)

    AttentionInterface.register(FROZEN, frozen)
    AttentionMaskInterface.register(FROZEN, ALL_MASK_ATTENTION_FUNCTIONS[name])
    model.set_attn_implementation(FROZEN)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)  # else every input of a weight would be kept for its gradient
        yield
    finally:
        model.set_attn_implementation(name)
        AttentionInterface.register(FROZEN, lambda *_: None)  # of this pass nothing is held on to
        for weight in weights:
            weight.requires_grad_()


def _norms(model: Any) -> list[str]:
    """Return the paths of all norms of the residual stream: before and behind attention and MLP, and the last one."""
    adapter = adapter_of(model.config)
    parts = [name for name in adapter.component_mapping["blocks"].submodules if name.startswith("ln")]
    paths = [f"blocks.{layer}.{part}" for layer in range(model.config.num_hidden_layers) for part in parts]
    return [adapter.translate_transformer_lens_path(path) for path in (*paths, "ln_final")]
