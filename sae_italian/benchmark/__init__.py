"""The Italian benchmark of SAEs: what their latents know of Italian beyond its form, and what two SAEs' numbers tell apart."""

from sae_italian.benchmark.board import compare, read_entries
from sae_italian.benchmark.material import gather
from sae_italian.benchmark.pages import saebench
from sae_italian.benchmark.run import benchmark
from sae_italian.benchmark.tasks import all_tasks

__all__ = ["all_tasks", "benchmark", "compare", "gather", "read_entries", "saebench"]
