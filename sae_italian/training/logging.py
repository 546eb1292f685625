"""Where the rows of a run go besides its own metrics.jsonl."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sae_italian.training.config import RunSpec


@contextlib.contextmanager
def open_logger(spec: RunSpec, config: Any) -> Iterator[Any]:
    """Yield `log(row, step)`: W&B with SAELens' metric names when asked for, else nothing."""
    if spec.wandb == "off":
        yield lambda row, step: None
        return
    import wandb

    run = wandb.init(project=spec.wandb_project, config=config.to_dict(), name=config.logger.run_name, mode=spec.wandb)
    try:
        yield lambda row, step: run.log(row, step=step)
    finally:
        run.finish()
