"""Attribution graphs on transcoders: which latents lead from a prompt to the next token, and whether they really do."""

from sae_italian.circuits.check import Checked, check
from sae_italian.circuits.edges import attribute
from sae_italian.circuits.graph import Graph, influence, prune, scores
from sae_italian.circuits.show import sentence

__all__ = ["Checked", "Graph", "attribute", "check", "influence", "prune", "scores", "sentence"]
