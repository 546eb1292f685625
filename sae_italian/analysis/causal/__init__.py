"""Causal analyses of single latents and of whole dictionaries: ablation, steering, patching, causal trees."""

from sae_italian.analysis.causal.ablation import Ablated, AblatedPosition, TokenMove, ablate
from sae_italian.analysis.causal.steer import Continuation, Steered, steer

__all__ = ["Ablated", "AblatedPosition", "Continuation", "Steered", "TokenMove", "ablate", "steer"]
