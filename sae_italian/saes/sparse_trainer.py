"""SAELens' trainer with Adam's one-pass kernel: what is left of a training step once the SAE itself is fast."""

from __future__ import annotations

from typing import Any


def tune(trainer: Any) -> Any:
    """Let a SAELens `SAETrainer` use PyTorch's fused Adam, and return it: the same update, read and written once.

    For any SAE; on CPU and CUDA. Call it before the first step; a checkpoint keeps the setting.
    """
    for group in trainer.optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    return trainer
