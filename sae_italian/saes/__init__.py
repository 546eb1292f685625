"""Sparse autoencoders: loading by folder or release, and the checks that they fit a model."""

from sae_italian.saes.loading import check_fits, load_sae, random_twin, weights_hash

__all__ = ["check_fits", "load_sae", "random_twin", "weights_hash"]
