"""Sparse autoencoders: loading by folder or release, and the one check that an SAE can be used on a model."""

from sae_italian.saes.loading import check_fits, full_name, hooks_of, load_sae, model_of, open_sae, weights_hash

__all__ = ["check_fits", "full_name", "hooks_of", "load_sae", "model_of", "open_sae", "weights_hash"]
