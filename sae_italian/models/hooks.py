"""The one table of hook names: TransformerLens' legacy name, the Bridge's name and the Hugging Face module path.

Sites are named as in Llama Scope: R the residual stream after the block, A the attention's output, M the MLP's output,
TC the pair that a transcoder reads (the MLP's true input) and writes (the MLP's output).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sae_italian.errors import UsageError, nearest

Site = Literal["R", "A", "M", "TC"]

# Where the blocks live in the Hugging Face model, and what attention and MLP are called inside one, by model_type.
_FAMILIES = {
    "mistral": ("model.layers", "self_attn", "mlp"),
    "llama": ("model.layers", "self_attn", "mlp"),
    "gpt2": ("transformer.h", "attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
}
# legacy name -> (site, Bridge name, reads the module's input?, which part of the block)
_LEGACY = {
    "hook_resid_pre": (None, "hook_in", True, ""),
    "hook_resid_post": ("R", "hook_out", False, ""),
    "hook_attn_out": ("A", "attn.hook_out", False, "attn"),
    "hook_mlp_out": ("M", "mlp.hook_out", False, "mlp"),
    "mlp.hook_in": ("TC", "mlp.hook_in", True, "mlp"),
}


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
        return f"blocks.{self.layer}.{_LEGACY[self.legacy][1]}"

    @property
    def site(self) -> Site | None:
        return _LEGACY[self.legacy][0]

    @property
    def reads_input(self) -> bool:
        """True when the activation is the Hugging Face module's first input, not its output."""
        return _LEGACY[self.legacy][2]

    def module_path(self, model_type: str) -> str:
        """Return the Hugging Face module's path, e.g. `model.layers.14.mlp`."""
        if model_type not in _FAMILIES:
            raise UsageError(
                f"model type {model_type!r} has no row in the table of hooks. {nearest(model_type, _FAMILIES)}"
            )
        blocks, attn, mlp = _FAMILIES[model_type]
        part = {"": "", "attn": f".{attn}", "mlp": f".{mlp}"}[_LEGACY[self.legacy][3]]
        return f"{blocks}.{self.layer}{part}"


def parse_hook_name(name: str, n_layers: int | None = None) -> Hook:
    """Return the Hook of a legacy name, a Bridge name or a Hugging Face path of a block (`model.layers.N`).

    Raises: UsageError for an unknown name or a layer the model does not have.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    block_path = re.fullmatch(r"(?:model\.layers|layers|transformer\.h|gpt_neox\.layers)\.(\d+)", name)
    if match:
        layer, rest = int(match[1]), match[2]
        by_bridge = {row[1]: legacy for legacy, row in _LEGACY.items()}
        legacy = rest if rest in _LEGACY else by_bridge.get(rest)
    elif block_path:
        layer, legacy = int(block_path[1]), "hook_resid_post"
    else:
        layer, legacy = 0, None
    if legacy is None:
        examples = [f"blocks.{layer}.{option}" for option in _LEGACY]
        raise UsageError(f"hook_name {name!r} is unknown. {nearest(name, examples)}")
    if n_layers is not None and layer >= n_layers:
        raise UsageError(f"hook_name {name!r}: the model has layers 0 to {n_layers - 1}. Use a layer in that range.")
    return Hook(layer, legacy)
