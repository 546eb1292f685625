"""The causal tree of a latent through the SAEs of earlier layers (Cunningham et al. 2023, section 5.3 and figure 5).

With M the latent's largest activation, draw contexts in which it is active between M/2 and M; ablate each latent of the
layer before, at every token of the context where it is active, and rank them by how far the target's activation falls;
go on with those that matter most. Reconstruction errors stay in place, so the tree shows what the latents carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_italian.analysis.latent import codes, edit_hooks, special, token_text, written_directions
from sae_italian.analysis.shift import corpus_windows
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import one_of, paced
from sae_italian.base.report import OURS, REFERENCE, shown, svg
from sae_italian.base.statistics import Estimate, mean_interval
from sae_italian.models import activations
from sae_italian.models.activations import entry_and_edit, read_many, replaced

ROWS = 128  # prompts of a batch
CHUNK = 1024  # tokens encoded at once
LEAST_DROP = 1e-3  # of the target's activation; less is rounding
EXAMPLE_TOKENS, EXAMPLE = 9, 34  # tokens of an example, and its letters in the picture
# Tokens up to the one on which a latent is active, and its activation there.
Context = tuple[Int[Tensor, " pos"], float]


class Node(NamedTuple):
    """A latent of the tree, and by which share of its parent's activation its ablation lowers that; 1 silences it."""

    sae: str
    hook_name: str
    latent: int
    maximum: float  # its largest activation in the text that was looked at
    n_contexts: int
    drop: Estimate | None  # mean over contexts that did not choose it; None for the root
    examples: tuple[str, ...]  # the ends of a few contexts, the token it is active on marked «so»
    children: tuple[Node, ...]

    def leaves(self) -> int:
        return sum(child.leaves() for child in self.children) or 1

    def depth(self) -> int:
        return 1 + max((child.depth() for child in self.children), default=0)

    def text(self, indent: int = 0) -> str:
        """Return the tree as indented lines."""
        drop = "" if self.drop is None else f"  -{shown(self.drop, '.0%')}"
        example = self.examples[0] if self.examples else "never active"
        line = f"{'  ' * indent}{self.sae} {self.latent}{drop}  {example}"
        return "\n".join([line, *(child.text(indent + 1) for child in self.children)])

    def svg(self) -> str:
        """Return a picture: a column per layer, the target on the right, lines as thick as the effect."""
        leaves, depth = self.leaves(), self.depth()

        def draw(axes: Any) -> None:
            axes[0].set_axis_off()
            axes[0].set(xlim=(-0.1, depth - 0.1), ylim=(leaves - 0.3, -0.7))
            _draw(axes[0], self, depth - 1, 0)

        return svg(draw, 1, (4.2 * depth, max(2.0, 0.7 * leaves)))


def _draw(axis: Any, node: Node, x: int, row: int) -> float:
    """Draw a node with its children, the first of which stands in that row; return its height."""
    heights = []
    for child in node.children:
        heights.append(_draw(axis, child, x - 1, row))
        row += child.leaves()
    y = sum(heights) / len(heights) if heights else float(row)
    for child, height in zip(node.children, heights, strict=True):
        share = 0.0 if child.drop is None else max(0.0, min(1.0, child.drop.value))
        axis.plot((x - 0.28, x), (height, y), color=OURS, linewidth=0.5 + 4 * share, alpha=0.5, zorder=0)
        axis.text(x - 0.2, 0.7 * height + 0.3 * y - 0.08, f"−{share:.0%}", fontsize=7, color=REFERENCE)
    axis.text(x, y - 0.12, f"{node.sae} {node.latent}", fontsize=9, fontweight="bold", va="center")
    axis.text(x, y + 0.16, node.examples[0][-EXAMPLE:] if node.examples else "", fontsize=7, va="center")
    return y


@torch.no_grad()
def causal_tree(
    model: Any,
    saes: Sequence[tuple[str, Any]],
    latent: int,
    corpus: str,
    *,
    branches: int = 3,
    n_contexts: int = 20,
    n_tokens: int = 20_000,
    context_size: int = 64,
    seed: int = 0,
) -> Node:
    """Return the tree of `latent` of the last SAE; the SAEs (name and object) are in the order of their layers.

    Each node has up to `branches` children: those latents of the SAE before whose ablation lowers it most.
    Raises: UsageError for fewer than two SAEs, SAEs not in the order of their layers, an unknown latent, and a latent
    that is never active in the text that is looked at.
    """
    if len(saes) < 2:
        raise UsageError(f"a tree needs the SAEs of at least two layers, in order; {len(saes)} given.")
    hooks = [edit_hooks(sae, model)[0] for _, sae in saes]
    layers = [activations.resolve_hook(model, hook)[0].layer for hook in hooks]
    if any(later <= earlier for earlier, later in pairwise(layers)):
        raise UsageError(f"the SAEs read at {', '.join(hooks)}; give them in the order of layers, the target last.")
    written_directions(saes[-1][1], [latent])  # refuses a latent that there is not, before any text is read
    context = activations.check_context(context_size, model.config)
    tokens = torch.cat([own.tokens for own in corpus_windows(model, corpus, context, n_tokens, "heldout")])
    reads = [read_many(model, some.to(model.device), hooks) for some in tokens.split(ROWS)]
    acts = {hook: torch.cat([read[hook].cpu() for read in reads]) for hook in hooks}
    root = _Growth(model, saes, hooks, tokens, acts, branches, n_contexts, seed).node(len(saes) - 1, latent, None)
    if not root.n_contexts:
        raise UsageError(
            f"latent {latent} of {saes[-1][0]} is never active in {tokens.numel():,} tokens of {corpus}. "
            "Give another latent, or more tokens."
        )
    return root


@dataclass
class _Growth:
    """What a tree grows from."""

    model: Any
    saes: Sequence[tuple[str, Any]]
    hooks: Sequence[str]
    tokens: Int[Tensor, "windows pos"]
    acts: dict[str, Float[Tensor, "windows pos d_in"]]  # what each SAE reads there, in memory
    branches: int
    n_contexts: int
    seed: int

    def node(self, level: int, latent: int, drop: Estimate | None) -> Node:
        name, sae = self.saes[level]
        x = self.acts[self.hooks[level]].flatten(0, 1)
        found = torch.cat([codes(sae, part)[:, latent].cpu() for part in x.split(CHUNK)]).reshape(self.tokens.shape)
        activation = found.float() * ~special(self.tokens, self.model.tokenizer)
        contexts = self._contexts(activation)
        # the time is that of one ablation per context of every node that has an SAE before it
        with one_of(sum(self.branches**depth for depth in range(level)) or 1):
            causes = self._causes(level, latent, contexts) if level and contexts else []
        children = []
        for number, (other, fall) in enumerate(causes):
            with one_of(len(causes) - number):
                children.append(self.node(level - 1, other, fall))
        examples = []
        for ids, _ in contexts[:3]:
            *before, last = token_text(self.model.tokenizer, ids[-EXAMPLE_TOKENS:].tolist())
            examples.append("".join(before).strip() + f" «{last.strip()}»")
        maximum = float(activation.max())
        return Node(name, self.hooks[level], latent, maximum, len(contexts), drop, tuple(examples), tuple(children))

    def _contexts(self, activation: Float[Tensor, "windows pos"]) -> list[Context]:
        """Return contexts, of different windows, in which the latent is active between M/2 and M."""
        window, position = ((activation >= activation.max() / 2) & (activation > 0)).nonzero(as_tuple=True)
        chosen: dict[int, int] = {}
        for index in np.random.default_rng(self.seed).permutation(len(window)).tolist():
            if len(chosen) < self.n_contexts:
                chosen.setdefault(int(window[index]), int(position[index]))
        return [(self.tokens[w, : p + 1], float(activation[w, p])) for w, p in sorted(chosen.items())]

    def _causes(self, level: int, latent: int, contexts: list[Context]) -> list[tuple[int, Estimate]]:
        """Return the earlier latents that lower this one most in half of the contexts, with the drop in the rest."""
        what = f"{self.saes[level][0]} {latent}"
        parts = [self._falls(level, latent, *context) for context in paced(contexts, what, len(contexts), "context")]
        falls: Any = pd.concat(parts, axis=1).fillna(0.0).sort_index()  # [latents, contexts]
        half = len(contexts) // 2  # the largest of many is smaller where it was not chosen
        means = falls.iloc[:, : half or 1].mean(axis=1).nlargest(self.branches)
        causes = means.index[means > LEAST_DROP]
        return [(int(other), mean_interval(falls.loc[other].to_numpy()[half:])) for other in causes]

    @torch.no_grad()
    def _falls(self, level: int, latent: int, tokens: Int[Tensor, " pos"], activation: float) -> pd.Series:
        """Return for each latent of the level before that is active in the context the share by which the target falls."""
        model, earlier, rows = self.model, self.saes[level - 1][1], tokens[None].to(self.model.device)
        hook_in, hook_out = edit_hooks(earlier, model)
        entry, edit = entry_and_edit(model, hook_out)
        read = read_many(model, rows, [hook_in, entry])
        z = codes(earlier, read[hook_in])[0] * ~special(rows, model.tokenizer)[0][:, None]
        active, after = (z != 0).any(0).nonzero()[:, 0], []
        for some in active.split(ROWS):
            removed = torch.einsum("pr,rd->rpd", z[:, some], written_directions(earlier, some).to(z))
            begun = activations.begun_at(model, entry, read[entry].expand(len(some), -1, -1))
            with begun, replaced(model, edit, lambda x, r=removed: x - r.to(x)):
                x = activations.read_activations(model, rows.expand(len(some), -1), self.hooks[level])
            after += codes(self.saes[level][1], x[:, -1])[:, latent].tolist()
        return 1 - pd.Series(after, active.tolist(), dtype=np.float64) / activation
