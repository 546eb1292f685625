"""What an SAE keeps away from where it was trained: longer contexts, other texts, other languages, tuned models."""

from sae_italian.analysis.shift.measure import BY, Condition, context_shift, shift
from sae_italian.analysis.shift.report import Bucket, Shift

__all__ = ["BY", "Bucket", "Condition", "Shift", "context_shift", "shift"]
