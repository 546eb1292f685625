"""Explanations of latents and scores that come with their controls; by default without any LLM."""

from sae_italian.autointerp.run import random_sae_control, run_autointerp
from sae_italian.autointerp.summary import AutointerpSummary, summarise
from sae_italian.autointerp.work import AutointerpConfig, explain_latent

__all__ = [
    "AutointerpConfig",
    "AutointerpSummary",
    "explain_latent",
    "random_sae_control",
    "run_autointerp",
    "summarise",
]
