"""The decompositions that an SAE is compared with, each as a SAELens SAE: PCA, ICA, NMF, random directions, neurons."""

from sae_italian.saes.baselines.fit import DEFAULT_KINDS, KINDS, TOPK, fit_baselines, mean_l0, rescaled
from sae_italian.saes.baselines.linear import with_top_k

__all__ = ["DEFAULT_KINDS", "KINDS", "TOPK", "fit_baselines", "mean_l0", "rescaled", "with_top_k"]
