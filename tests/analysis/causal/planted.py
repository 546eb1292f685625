"""Dictionaries whose effect is known by construction."""

from __future__ import annotations

import copy

import torch

from sae_italian.models.activations import read_activations

ENTRY = "blocks.0.hook_resid_pre"


class Pca:
    """Principal components as an SAE-like object: dense codes of either sign, and nothing is lost."""

    def __init__(self, like, x):
        self.cfg = copy.copy(like.cfg)
        self.cfg.d_sae = x.shape[1]
        self.mean = x.mean(0)
        self.components = torch.linalg.svd(x - self.mean)[2]
        self.device, self.dtype = x.device, x.dtype

    def encode(self, x):
        return (x - self.mean) @ self.components.T

    def decode(self, z):
        return z @ self.components + self.mean


def name_carrier(mini, like, pair: tuple[str, str], latent: int, d_sae: int = 40):
    """Return an SAE at the model's entrance in which one latent alone carries the name that the two prompts differ in.

    It reads the direction from one name's embedding to the other's, and fires at exactly that distance for the new name
    and not at all for the old one. All other latents read and write noise.
    """
    from sae_lens import StandardSAE, StandardSAEConfig

    base, target = (mini.tokenizer(text, return_tensors="pt").input_ids for text in pair)
    at = int((base != target).nonzero()[0, 1])
    old, new = (read_activations(mini, tokens, ENTRY)[0, at] for tokens in (base, target))
    direction = (new - old) / (new - old).norm()
    generator = torch.Generator().manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=len(old), d_sae=d_sae, apply_b_dec_to_input=False))
    with torch.no_grad():
        for weights in (sae.W_enc, sae.W_dec):
            weights.copy_(torch.randn(weights.shape, generator=generator) / 20)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
        sae.W_enc[:, latent], sae.W_dec[latent] = direction, direction
        sae.b_enc[latent] = -(old @ direction)
    sae.cfg.metadata = copy.deepcopy(like.cfg.metadata)
    sae.cfg.metadata.hook_name = ENTRY
    return sae.eval()
