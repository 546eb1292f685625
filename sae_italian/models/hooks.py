"""The one table of hook names: TransformerLens' legacy name, the Bridge's name and the Hugging Face module path.

Sites are named as in Llama Scope: R the residual stream after the block, A the attention's output, M the MLP's output,
TC the input of a transcoder, whose target is M. Our own transcoders read the MLP's true input (`mlp.hook_in`);
Llama Scope's read the normalised residual before the norm's gain (`ln2.hook_normalized`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sae_italian.base.errors import UsageError, nearest

Site = Literal["R", "A", "M", "TC"]
Part = Literal["block", "attn", "mlp", "norm2"]


class _Family(NamedTuple):
    """Where one architecture keeps its blocks, and what it calls the parts of one."""

    blocks: str
    attn: str
    mlp: str
    norm2: str  # the norm in front of the MLP


class _Row(NamedTuple):
    """One hook: its site, the Bridge's name, the part of the block it belongs to, and what of that part it is."""

    site: Site | None
    bridge: str
    part: Part
    reads: Literal["input", "output", "normalised input"]


_FAMILIES = {
    "mistral": _Family("model.layers", "self_attn", "mlp", "post_attention_layernorm"),
    "llama": _Family("model.layers", "self_attn", "mlp", "post_attention_layernorm"),
    "gpt2": _Family("transformer.h", "attn", "mlp", "ln_2"),
    "gpt_neox": _Family("gpt_neox.layers", "attention", "mlp", "post_attention_layernorm"),
}
_LEGACY = {
    "hook_resid_pre": _Row(None, "hook_in", "block", "input"),
    "hook_resid_post": _Row("R", "hook_out", "block", "output"),
    "hook_attn_out": _Row("A", "attn.hook_out", "attn", "output"),
    "hook_mlp_out": _Row("M", "mlp.hook_out", "mlp", "output"),
    "mlp.hook_in": _Row("TC", "mlp.hook_in", "mlp", "input"),
    "ln2.hook_normalized": _Row("TC", "ln2.hook_normalized", "norm2", "normalised input"),
}
SITES: dict[Site, str] = {"R": "hook_resid_post", "A": "hook_attn_out", "M": "hook_mlp_out", "TC": "mlp.hook_in"}


@dataclass(frozen=True)
class Hook:
    """One place in the model where activations of shape [batch, pos, d_model] are read."""

    layer: int
    legacy: str  # without the blocks.N. prefix

    @property
    def name(self) -> str:
        """The legacy TransformerLens name, which goes into SAE metadata."""
        return f"blocks.{self.layer}.{self.legacy}"

    @property
    def bridge_name(self) -> str:
        return f"blocks.{self.layer}.{_LEGACY[self.legacy].bridge}"

    @property
    def site(self) -> Site | None:
        return _LEGACY[self.legacy].site

    @property
    def reads_input(self) -> bool:
        """True when the activation is the Hugging Face module's first input, not its output."""
        return _LEGACY[self.legacy].reads != "output"

    @property
    def normalised(self) -> bool:
        """True when it is the norm's input after normalisation, before the gain: computed, in no module's hands."""
        return _LEGACY[self.legacy].reads == "normalised input"

    def module_path(self, model_type: str) -> str:
        """Return the Hugging Face module's path, e.g. `model.layers.14.mlp`."""
        if model_type not in _FAMILIES:
            raise UsageError(
                f"model type {model_type!r} has no row in the table of hooks. {nearest(model_type, _FAMILIES)}"
            )
        family, part = _FAMILIES[model_type], _LEGACY[self.legacy].part
        block = f"{family.blocks}.{self.layer}"
        return block if part == "block" else f"{block}.{getattr(family, part)}"


def _by_path(name: str) -> Hook | None:
    """Return the Hook of a module's output named by its Hugging Face path, with or without the model's own prefix."""
    for family in _FAMILIES.values():
        for legacy in SITES.values():
            row = _LEGACY[legacy]
            if row.reads != "output":
                continue
            part = "" if row.part == "block" else rf"\.{re.escape(getattr(family, row.part))}"
            prefix, _, blocks = family.blocks.rpartition(".")
            match = re.fullmatch(rf"(?:{re.escape(prefix)}\.)?{blocks}\.(\d+){part}", name)
            if match:
                return Hook(int(match[1]), legacy)
    return None


def parse_hook_name(name: str, n_layers: int | None = None) -> Hook:
    """Return the Hook of a legacy name, a Bridge name, or the Hugging Face path of a block, its attention or its MLP.

    A path means the module's output (`model.layers.3` is `blocks.3.hook_resid_post`), as in sparsify and Delphi.
    Raises: UsageError for an unknown name or a layer the model does not have.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match:
        layer, rest = int(match[1]), match[2]
        by_bridge = {row.bridge: legacy for legacy, row in _LEGACY.items()}
        legacy = rest if rest in _LEGACY else by_bridge.get(rest)
        hook = Hook(layer, legacy) if legacy else None
    else:
        layer, hook = 0, _by_path(name)
    if hook is None:
        examples = [f"blocks.{layer}.{option}" for option in _LEGACY]
        raise UsageError(f"hook_name {name!r} is unknown. {nearest(name, examples)}")
    if n_layers is not None and hook.layer >= n_layers:
        raise UsageError(f"hook_name {name!r}: the model has layers 0 to {n_layers - 1}. Use a layer in that range.")
    return hook
