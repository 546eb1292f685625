"""Scorers: what a judge's verdicts, or the subject model itself, say about an explanation."""

from sae_italian.autointerp.scorers.binary import compare, detection, fuzzing
from sae_italian.autointerp.scorers.embedding import Encoder, embedding
from sae_italian.autointerp.scorers.simulation import simulation
from sae_italian.autointerp.scorers.subject import intervention, surprisal

__all__ = ["Encoder", "compare", "detection", "embedding", "fuzzing", "intervention", "simulation", "surprisal"]
