"""The causal tree as a picture: a column per layer, the target on the right, lines as thick as the effect."""

from __future__ import annotations

from typing import Any

from sae_italian.analysis.causal.tree import Node
from sae_italian.base import pictures

SHOWN = 34  # letters of an example


def tree_svg(root: Node) -> str:
    """Return the tree as SVG text."""
    leaves, depth = _leaves(root), _depth(root)
    return pictures.svg(lambda axes: _draw(axes[0], root, depth), 1, (4.2 * depth, max(2.0, 0.7 * leaves)))


def _leaves(node: Node) -> int:
    return sum(map(_leaves, node.children)) or 1


def _depth(node: Node) -> int:
    return 1 + max(map(_depth, node.children), default=0)


def _draw(axis: Any, root: Node, depth: int) -> None:
    axis.set_axis_off()
    axis.set(xlim=(-0.1, depth - 0.1), ylim=(_leaves(root) - 0.3, -0.7))

    def place(node: Node, x: int, first: int) -> float:
        """Draw a node with its children; return its height."""
        heights, row = [], first
        for child in node.children:
            heights.append(place(child, x - 1, row))
            row += _leaves(child)
        y = sum(heights) / len(heights) if heights else float(first)
        for child, height in zip(node.children, heights, strict=True):
            share = 0.0 if child.drop is None else min(1.0, child.drop.value)
            axis.plot((x - 0.28, x), (height, y), color=pictures.OURS, linewidth=0.5 + 4 * share, alpha=0.5, zorder=0)
            axis.text(x - 0.2, (0.7 * height + 0.3 * y) - 0.08, f"−{share:.0%}", fontsize=7, color=pictures.REFERENCE)
        example = node.examples[0] if node.examples else ""
        axis.text(x, y - 0.12, f"{node.sae} {node.latent}", fontsize=9, fontweight="bold", va="center")
        axis.text(x, y + 0.16, example[-SHOWN:], fontsize=7, va="center")
        return y

    place(root, depth - 1, 0)
