"""The Italian benchmark of SAEs: what their latents know of Italian beyond its form, and what two SAEs' numbers tell apart."""

from sae_italian.benchmark.board import compare, leaderboard, read_entries, saebench, send_to_wandb, write
from sae_italian.benchmark.material import gather, gather_hub
from sae_italian.benchmark.run import benchmark
from sae_italian.benchmark.tasks import all_tasks, chosen, hub_tasks

__all__ = [
    "all_tasks",
    "benchmark",
    "chosen",
    "compare",
    "gather",
    "gather_hub",
    "hub_tasks",
    "leaderboard",
    "read_entries",
    "saebench",
    "send_to_wandb",
    "write",
]
