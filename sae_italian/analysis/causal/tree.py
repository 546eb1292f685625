"""The causal tree of a latent through the SAEs of earlier layers (Cunningham et al. 2023, section 5.3 and figure 5).

With M the latent's largest activation, draw contexts in which it is active between M/2 and M; ablate each latent of the
layer before, at every token of the context where it is active, and rank them by how far the target's activation falls;
go on with those that matter most. Reconstruction errors stay in place, so the tree shows what the latents carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sae_italian.analysis.causal.splice import check_latent, codes, directions, hooks_of, special, token_text
from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import Estimate, mean_interval
from sae_italian.corpora import iter_documents, pack
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.models.activations import (
    begun_at,
    check_context,
    entry_and_edit,
    read_activations,
    read_many,
    replaced,
    resolve_hook,
)

N_CONTEXTS = 20
ROWS = 128  # prompts of a batch
CHUNK = 1024  # tokens encoded at once
LEAST_DROP = 1e-3  # of the target's activation; less is rounding


@dataclass(frozen=True)
class Node:
    """A latent of the tree, and by which share of its parent's activation its ablation lowers that; 1 silences it."""

    sae: str
    hook_name: str
    latent: int
    maximum: float  # its largest activation in the text that was looked at
    n_contexts: int
    drop: Estimate | None  # mean over the parent's contexts; None for the root
    examples: tuple[str, ...]  # the ends of a few contexts, the token it is active on marked «so»
    children: tuple[Node, ...]

    def as_dict(self) -> dict[str, Any]:
        children = [child.as_dict() for child in self.children]
        drop = None if self.drop is None else self.drop.as_dict()
        return {**asdict(self), "drop": drop, "examples": list(self.examples), "children": children}

    def text(self, indent: int = 0) -> str:
        """Return the tree as indented lines."""
        drop = "" if self.drop is None else f"  -{self.drop.value:.0%} ({self.drop.lo:.0%} to {self.drop.hi:.0%})"
        shown = self.examples[0] if self.examples else "never active"
        line = f"{'  ' * indent}{self.sae} {self.latent}{drop}  {shown}"
        return "\n".join([line, *(child.text(indent + 1) for child in self.children)])


class _Context(NamedTuple):
    tokens: Int[Tensor, " pos"]  # up to the token on which the latent is active
    activation: float


class _Text:
    """Windows of a corpus, and the activations of every SAE's hook on them, in memory."""

    def __init__(self, model: Any, hooks: Sequence[str], corpus: str, n_tokens: int, context_size: int, split: Any):
        check_context(context_size, model.config)
        parts, seen = [], 0
        for block in pack(iter_documents(corpus, split), model.tokenizer, context_size, windows_per_block=32):
            parts.append(torch.from_numpy(block.tokens[(block.doc != NO_DOCUMENT).any(1)]))
            seen += parts[-1].numel()
            if seen >= n_tokens:
                break
        if not parts:
            raise UsageError(
                f"{corpus} has no text of {context_size} tokens; give another corpus or a shorter context."
            )
        self.tokens: Int[Tensor, "windows pos"] = torch.cat(parts)[: max(1, n_tokens // context_size)]
        self.keep = ~special(self.tokens, model.tokenizer)
        reads = [read_many(model, some.to(model.device), list(hooks)) for some in self.tokens.split(ROWS)]
        self.acts = {hook: torch.cat([read[hook].cpu() for read in reads]) for hook in hooks}

    def latent(self, sae: Any, hook: str, latent: int) -> Float[Tensor, "windows pos"]:
        """Return one latent's activations; 0 at special tokens."""
        x = self.acts[hook].flatten(0, 1)
        found = torch.cat([codes(sae, part)[:, latent].cpu() for part in x.split(CHUNK)])
        return found.reshape(self.tokens.shape).float() * self.keep

    def contexts(self, activation: Float[Tensor, "windows pos"], n: int, seed: int) -> list[_Context]:
        """Return up to n contexts, of different windows, in which the latent is active between M/2 and M."""
        rng = np.random.default_rng(seed)
        window, position = ((activation >= activation.max() / 2) & (activation > 0)).nonzero(as_tuple=True)
        chosen: dict[int, int] = {}
        for index in rng.permutation(len(window)).tolist():
            chosen.setdefault(int(window[index]), int(position[index]))
            if len(chosen) == n:
                break
        return [_Context(self.tokens[w, : p + 1], float(activation[w, p])) for w, p in sorted(chosen.items())]


@torch.no_grad()
def causal_tree(
    model: Any,
    saes: Sequence[tuple[str, Any]],
    latent: int,
    corpus: str,
    *,
    branches: int = 3,
    n_contexts: int = N_CONTEXTS,
    n_tokens: int = 20_000,
    context_size: int = 64,
    split: Any = "heldout",
    seed: int = 0,
) -> Node:
    """Return the tree of `latent` of the last SAE; the SAEs (name and object) are in the order of their layers.

    Each node has up to `branches` children: those latents of the SAE before whose ablation lowers it most.
    Raises: UsageError for fewer than two SAEs, SAEs not in the order of their layers, an unknown latent, and a latent
    that is never active in the text that is looked at.
    """
    if len(saes) < 2:
        raise UsageError(f"a tree needs the SAEs of at least two layers, in order; {len(saes)} given.")
    hooks = [hooks_of(sae, model)[0] for _, sae in saes]
    layers = [resolve_hook(model, hook)[0].layer for hook in hooks]
    if any(later <= earlier for earlier, later in zip(layers, layers[1:], strict=False)):
        raise UsageError(
            f"the SAEs read at {', '.join(hooks)}; give them in the order of their layers, the target last."
        )
    check_latent(saes[-1][1], latent)
    text = _Text(model, hooks, corpus, n_tokens, context_size, split)
    with tqdm(desc="ablations", unit="prompt", disable=None) as bar:
        grow = _Growth(model, saes, hooks, text, branches, n_contexts, seed, bar)
        root = grow.node(len(saes) - 1, latent, None)
    if not root.n_contexts:
        raise UsageError(
            f"latent {latent} of {saes[-1][0]} is never active in {text.tokens.numel():,} tokens of {corpus}. "
            "Give another latent, or more tokens."
        )
    return root


@dataclass
class _Growth:
    model: Any
    saes: Sequence[tuple[str, Any]]
    hooks: Sequence[str]
    text: _Text
    branches: int
    n_contexts: int
    seed: int
    bar: Any

    def node(self, level: int, latent: int, drop: Estimate | None) -> Node:
        name, sae = self.saes[level]
        activation = self.text.latent(sae, self.hooks[level], latent)
        contexts = self.text.contexts(activation, self.n_contexts, self.seed)
        children = [self.node(level - 1, other, fall) for other, fall in self._causes(level, latent, contexts)]
        examples = tuple(_shown(self.model.tokenizer, context.tokens) for context in contexts[:3])
        maximum = float(activation.max())
        return Node(name, self.hooks[level], latent, maximum, len(contexts), drop, examples, tuple(children))

    def _causes(self, level: int, latent: int, contexts: list[_Context]) -> list[tuple[int, Estimate]]:
        """Return the latents of the level before that lower this one most, and their mean drop over the contexts."""
        if level == 0 or not contexts:
            return []
        falls: dict[int, Float[np.ndarray, " contexts"]] = {}
        for index, context in enumerate(contexts):
            for other, fall in self._falls(level, latent, context):
                falls.setdefault(other, np.zeros(len(contexts)))[index] = fall
        ranked = sorted(falls, key=lambda other: (-falls[other].mean(), other))[: self.branches]
        return [(other, mean_interval(falls[other])) for other in ranked if falls[other].mean() > LEAST_DROP]

    def _falls(self, level: int, latent: int, context: _Context) -> list[tuple[int, float]]:
        """Return for each latent of the level before that is active in the context the share by which the target falls."""
        earlier = self.saes[level - 1][1]
        hook_in, hook_out = hooks_of(earlier, self.model)
        tokens = context.tokens[None].to(self.model.device)
        entry, edit = entry_and_edit(self.model, hook_out)
        read = read_many(self.model, tokens, [hook_in, entry])
        z = codes(earlier, read[hook_in])[0]
        z = z * ~special(tokens, self.model.tokenizer)[0][:, None]
        active = (z != 0).any(0).nonzero()[:, 0]
        written = directions(earlier, active).to(z)
        after: list[float] = []
        for some, rows in zip(active.split(ROWS), written.split(ROWS), strict=True):
            removed = torch.einsum("pr,rd->rpd", z[:, some], rows)
            begun = begun_at(self.model, entry, read[entry].expand(len(some), -1, -1))
            with begun, replaced(self.model, edit, lambda x, r=removed: x - r.to(x)):
                x = read_activations(self.model, tokens.expand(len(some), -1), self.hooks[level])
            after += codes(self.saes[level][1], x[:, -1])[:, latent].tolist()
            self.bar.update(len(some))
        return [(int(other), 1 - value / context.activation) for other, value in zip(active, after, strict=True)]


def _shown(tokenizer: Any, tokens: Int[Tensor, " pos"], before: int = 8) -> str:
    pieces = token_text(tokenizer, tokens[-before - 1 :].tolist())
    return "".join(pieces[:-1]).strip() + f" «{pieces[-1].strip()}»"
