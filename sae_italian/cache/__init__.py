"""The feature cache: build, on-disk layout, reading one latent, its passages, statistics."""

from sae_italian.cache.build import build_cache, build_caches
from sae_italian.cache.layout import Manifest, verify
from sae_italian.cache.passages import LatentActivations
from sae_italian.cache.read import FeatureCache, Segments

__all__ = ["FeatureCache", "LatentActivations", "Manifest", "Segments", "build_cache", "build_caches", "verify"]
