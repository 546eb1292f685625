"""The geometry of decoder directions, within an SAE and between SAEs."""

from sae_italian.analysis.geometry.map import latent_map

__all__ = ["latent_map"]
