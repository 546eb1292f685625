"""Causal analyses: ablation and steering (`latent`), patching (`patching`, `compare`), causal trees (`tree`)."""
