"""Causal analyses of single latents and of whole dictionaries: ablation, steering, patching, causal trees."""

from sae_italian.analysis.causal.ablation import Ablated, AblatedPosition, TokenMove, ablate
from sae_italian.analysis.causal.compare import Effect, Patching, PatchingCurve, patch_saes
from sae_italian.analysis.causal.draw_tree import tree_svg
from sae_italian.analysis.causal.elimination import Elimination, Point, eliminate
from sae_italian.analysis.causal.patching import Patcher, PatchInputs, patch_inputs
from sae_italian.analysis.causal.steer import Continuation, Steered, steer
from sae_italian.analysis.causal.tree import Node, causal_tree

__all__ = [
    "Ablated",
    "AblatedPosition",
    "Continuation",
    "Effect",
    "Elimination",
    "Node",
    "PatchInputs",
    "Patcher",
    "Patching",
    "PatchingCurve",
    "Point",
    "Steered",
    "TokenMove",
    "ablate",
    "causal_tree",
    "eliminate",
    "patch_inputs",
    "patch_saes",
    "steer",
    "tree_svg",
]
