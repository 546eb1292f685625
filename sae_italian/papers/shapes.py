"""Distribution shift and geometry of Llama Scope (sections 4 and 5) as steps."""

from __future__ import annotations

from sae_italian.papers.job import Step

SHAPES: tuple[Step, ...] = ()
