"""Sparse autoencoders: loading by folder or release, and the one check that an SAE can be used on a model."""

from sae_italian.saes.loading import check_fits, hooks_of, load_sae, weights_hash

__all__ = ["check_fits", "hooks_of", "load_sae", "weights_hash"]
