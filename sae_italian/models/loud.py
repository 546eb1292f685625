"""TransformerLens models with SAELens' SAEs, in which every hook name works or is refused, and no hook is skipped.

SAELens' `SAETransformerBridge` overrides `hook_dict` without the legacy names, so that hooks named `blocks.N.hook_...`
are dropped without a word (reference/transformerlens.md section 4); here they are merged back. In both classes, a name
the model does not have, and a hook that was asked for and never fired, raise UsageError; and text is text.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from sae_lens import HookedSAETransformer
from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformer_lens.hook_points import HookPoint

from sae_italian.base.errors import UsageError, nearest


def text_as_tokens(
    self: Any,
    input: str | list[str],
    prepend_bos: bool | None = None,
    padding_side: Any = None,
    move_to_device: bool = True,
    truncate: bool = True,
) -> torch.Tensor:
    """Return the tokens of texts, [batch, pos], in which a typed `<s>` is characters; the BOS is put first by its id.

    TransformerLens types it before the text, which only works where typed control tokens are read as such.
    """
    tokenizer, first = self.tokenizer, self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
    bos = [tokenizer.bos_token_id] if first and tokenizer.bos_token_id is not None else []
    texts = tokenizer([input] if isinstance(input, str) else input, add_special_tokens=False).input_ids
    rows = [torch.tensor([*bos, *ids][: self.cfg.n_ctx if truncate else None], dtype=torch.int64) for ids in texts]
    side, fill = padding_side or tokenizer.padding_side, tokenizer.pad_token_id or 0
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)
    return tokens.to(self.cfg.device) if move_to_device else tokens


class _LoudHooks:
    """Mixin: the ways of hooking, with names checked before and, where a way is one forward pass, firing checked after it."""

    hook_dict: Any
    cfg: Any
    to_tokens = text_as_tokens

    def run_with_cache(self, *args: Any, names_filter: Any = None, **kwargs: Any) -> Any:
        names = [names_filter] if isinstance(names_filter, str) else names_filter
        names = list(names) if isinstance(names, list | tuple | set) else None
        self._check_names(names or ())
        output, cache = super().run_with_cache(*args, names_filter=names or names_filter, **kwargs)  # pyright: ignore
        self._check_fired([name for name in names or () if name not in cache])
        return output, cache

    def hooks(self, fwd_hooks: Any = (), bwd_hooks: Any = (), *args: Any, **kwargs: Any) -> Any:
        return super().hooks(*self._listed(fwd_hooks, bwd_hooks), *args, **kwargs)  # pyright: ignore

    def run_with_hooks(self, *args: Any, fwd_hooks: Any = (), bwd_hooks: Any = (), **kwargs: Any) -> Any:
        fwd_hooks, bwd_hooks = self._listed(fwd_hooks, bwd_hooks)
        fired: set[int] = set()

        def counted(index: int, function: Callable[..., Any], *values: Any, **named: Any) -> Any:
            fired.add(index)
            return function(*values, **named)

        wrapped = [(name, partial(counted, index, function)) for index, (name, function) in enumerate(fwd_hooks)]
        output = super().run_with_hooks(*args, fwd_hooks=wrapped, bwd_hooks=bwd_hooks, **kwargs)  # pyright: ignore
        self._check_fired([str(name) for index, (name, _) in enumerate(fwd_hooks) if index not in fired])
        return output

    def add_sae(self, sae: Any, *args: Any, **kwargs: Any) -> None:
        metadata = sae.cfg.metadata
        named = [name for name in (metadata.hook_name, metadata.hook_name_out) if name]
        if not named:
            raise UsageError("the SAE's metadata holds no hook_name; write it into its cfg.json.")
        self._check_names([name for name in named if name not in self._acts_to_saes])  # pyright: ignore
        super().add_sae(sae, *args, **kwargs)  # pyright: ignore
        if metadata.hook_name not in self._acts_to_saes:  # pyright: ignore
            raise UsageError(f"the SAE could not be attached at {metadata.hook_name!r}.")

    def _listed(self, *hooks: Iterable[Any]) -> list[list[Any]]:
        """Return hooks as lists, whatever they came in, their names checked."""
        lists = [list(some) for some in hooks]
        self._check_names([name for some in lists for name, _ in some if isinstance(name, str)])
        return lists

    def _check_names(self, names: Iterable[str]) -> None:
        known = self.hook_dict
        for name in names:
            if name not in known:
                raise UsageError(f"hook {name!r} is not in this model. {nearest(name, known)}")
            gated = getattr(self, "_gated_hook_reason", lambda _: None)(name)
            if gated is not None:
                raise UsageError(f"hook {name!r} is switched off and would never fire: {gated}.")

    def _check_fired(self, names: list[str]) -> None:
        if names:
            raise UsageError(
                f"hook {', '.join(map(repr, names))} never fired; is it after stop_at_layer, or in an unused module?"
            )


class LoudBridge(_LoudHooks, SAETransformerBridge):
    """SAELens' SAETransformerBridge, with TransformerLens' legacy hook names beside the Bridge's own."""

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Return every hook under its Bridge name and its legacy name, those inside attached SAEs included."""
        hooks = super().hook_dict
        aliases: dict[str, Any] = {}
        self._add_aliases_to_hooks(aliases)
        for name, hook in aliases.items():
            if isinstance(hook, HookPoint):
                hooks.setdefault(name, hook)
            elif isinstance(hook, _SAEWrapper):
                for inner, point in hook.named_modules():
                    if inner and isinstance(point, HookPoint):
                        hooks.setdefault(f"{name}.{inner}", point)
        return hooks

    def _reset_sae(self, act_name: str, prev_wrapper: Any = None) -> None:
        """Take an SAE off; the new hook point gets its whole name back, by which TransformerLens looks it up."""
        place = self._transcoder_output_hooks.get(act_name, self._resolve_hook_name(act_name))
        super()._reset_sae(act_name, prev_wrapper)
        if prev_wrapper is None and place in self._hook_registry:
            self._hook_registry[place].name = place


class LoudHooked(_LoudHooks, HookedSAETransformer):
    """SAELens' HookedSAETransformer with the same checks."""
