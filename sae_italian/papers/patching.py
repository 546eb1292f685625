"""The causal part of Cunningham et al. 2023 (section 4) as a step: IOI patching of the SAE's latents and of PCA's."""

from __future__ import annotations

from sae_italian.papers.job import Step

PATCHING: tuple[Step, ...] = ()
