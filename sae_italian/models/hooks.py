"""The one table of hook names: TransformerLens' legacy name, the Bridge's name and the Hugging Face module.

Sites are named as in Llama Scope: R the residual stream after the block, A what the attention adds to it, M what the MLP
adds, TC the input of a transcoder, whose target is M. Our own transcoders read the MLP's true input (`mlp.hook_in`);
Llama Scope's read the normalised residual before the norm's gain (`ln2.hook_normalized`).

Which module of a model a hook means is asked of TransformerLens' architecture adapter, so every family that it knows
works, and none by a guess. Where a block has a norm behind the attention or the MLP (a sandwich norm, as in Gemma 2 and
3), A and M are the output of that norm: what is added to the residual stream.
"""

import re
from typing import Any, Literal, NamedTuple

from sae_italian.base.errors import UsageError, nearest

Site = Literal["R", "A", "M", "TC"]

SITES: dict[Site, str] = {"R": "hook_resid_post", "A": "hook_attn_out", "M": "hook_mlp_out", "TC": "mlp.hook_in"}
# Of each legacy name: the Bridge's name (before its last dot stands the block's part, nothing for the block itself), the
# site, and whether the activation is the Hugging Face module's first input, not its output.
_HOOKS: dict[str, tuple[str, Site | None, bool]] = {
    "hook_resid_pre": ("hook_in", None, True),
    "hook_resid_post": ("hook_out", "R", False),
    "hook_attn_out": ("attn.hook_out", "A", False),
    "hook_mlp_out": ("mlp.hook_out", "M", False),
    "mlp.hook_in": ("mlp.hook_in", "TC", True),
    "ln2.hook_normalized": ("ln2.hook_normalized", "TC", True),
}
# What Hugging Face models call a block's container and its parts: how sparsify, Delphi and people name a module's output.
_PATH = re.compile(r"(?:(?:model|transformer|gpt_neox)\.)?(?:layers|h)\.(\d{1,9})(?:\.(self_attn|attn|attention|mlp))?")
_OUTPUTS = {None: "hook_resid_post", "mlp": "hook_mlp_out"}  # by the part in a path; else the attention's
_LLAMA = {"": "", "attn": ".self_attn", "mlp": ".mlp", "ln2": ".post_attention_layernorm"}
_adapters: dict[str, Any] = {}  # by what a config says, which is read anew for each SAE


class Hook(NamedTuple):
    """One place in the model where activations of shape [batch, pos, d_model] are read."""

    layer: int
    legacy: str  # without the blocks.N. prefix
    bridge: str  # likewise
    site: Site | None
    reads_input: bool

    @property
    def name(self) -> str:
        """The legacy TransformerLens name, which goes into SAE metadata."""
        return f"blocks.{self.layer}.{self.legacy}"

    @property
    def llama_path(self) -> str:
        """The module's name in a model of Llama's family, as sparsify and Delphi write it: `layers.14.mlp`."""
        return f"layers.{self.layer}{_LLAMA[self.bridge.rpartition('.')[0]]}"

    @property
    def normalised(self) -> bool:
        """True when it is the norm's input after normalisation, before the gain: computed, in no module's hands."""
        return self.legacy == "ln2.hook_normalized"

    def module_path(self, config: Any) -> str:
        """Return the path of the Hugging Face module of a model with this config, e.g. `model.layers.14.mlp`.

        Raises: UsageError for a family that TransformerLens does not know, or that has no single module there.
        """
        adapter = adapter_of(config)
        aliases = adapter.component_mapping["blocks"].hook_aliases
        # The attention's and the MLP's output are where the family's block says, which may be a norm behind them.
        where = aliases.get(self.legacy, "") if self.site in ("R", "A", "M") else self.bridge
        part = where.rpartition(".")[0]
        try:
            if not where:
                raise ValueError(f"its blocks have no {self.legacy}")
            return adapter.translate_transformer_lens_path(f"blocks.{self.layer}" + (f".{part}" if part else ""))
        except ValueError as error:
            raise UsageError(
                f"hook {self.name!r} is no single module of {config.model_type!r} models ({error}). Use another site."
            ) from error


def adapter_of(config: Any) -> Any:
    """Return TransformerLens' architecture adapter for a model's config. Raises: UsageError for an unknown family."""
    if (said := f"{config.model_type} {vars(config)}") not in _adapters:
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
        from transformer_lens.model_bridge.sources import transformers as source

        try:
            architecture = source.determine_architecture_from_hf_config(config)
        except ValueError as error:
            raise UsageError(
                f"model type {config.model_type!r} ({', '.join(config.architectures or ['no architecture named'])}) is "
                "none that TransformerLens knows, so its hooks cannot be placed. Use one that it knows."
            ) from error
        bridge = TransformerBridgeConfig.from_dict(vars(source.map_default_transformer_lens_config(config)))
        bridge.architecture = architecture
        _adapters[said] = ArchitectureAdapterFactory.select_architecture_adapter(bridge)
    return _adapters[said]


def parse_hook_name(name: str, n_layers: int | None = None) -> Hook:
    """Return the Hook of a legacy name, a Bridge name, or the Hugging Face path of a block, its attention or its MLP.

    A path means the module's output (`model.layers.3` is `blocks.3.hook_resid_post`), as in sparsify and Delphi.
    Raises: UsageError for an unknown name or a layer the model does not have.
    """
    legacy = None
    if match := re.fullmatch(r"blocks\.([0-9]{1,9})\.(.+)", name):
        legacy = next((legacy for legacy, (bridge, *_) in _HOOKS.items() if match[2] in (legacy, bridge)), None)
    elif match := _PATH.fullmatch(name):
        legacy = _OUTPUTS.get(match[2], "hook_attn_out")
    if match is None or legacy is None:
        examples = [f"blocks.{int(match[1]) if match else 0}.{legacy}" for legacy in _HOOKS]
        raise UsageError(f"hook_name {name!r:.80} is unknown. {nearest(name, examples)}")
    hook = Hook(int(match[1]), legacy, *_HOOKS[legacy])
    if n_layers is not None and hook.layer >= n_layers:
        raise UsageError(f"hook_name {name!r}: the model has layers 0 to {n_layers - 1}. Use one of these.")
    return hook
