"""The geometry of decoder directions, within an SAE and between SAEs (Llama Scope, section 5)."""

from sae_italian.analysis.geometry.compare import Comparison, Set, compare
from sae_italian.analysis.geometry.directions import nearest_directions, threshold
from sae_italian.analysis.geometry.map import latent_map
from sae_italian.analysis.geometry.report import Geometry, geometry

__all__ = ["Comparison", "Geometry", "Set", "compare", "geometry", "latent_map", "nearest_directions", "threshold"]
