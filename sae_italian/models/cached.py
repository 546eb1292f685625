"""Activations that SAELens' CacheActivationsRunner kept on disk, read in place of a model's forward pass.

A cache is a saved `datasets` folder: a row for each window, with a column named after the hook, [context, d_in], and
`token_ids`, [context]. It knows no documents, and has no held-out split of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import read_json

TOKENS = "token_ids"


def holds_activations(folder: str | Path) -> bool:
    """Return whether a path is a folder that CacheActivationsRunner wrote."""
    file = Path(folder).expanduser() / "dataset_info.json"
    return file.is_file() and TOKENS in (read_json(file).get("features") or {})


class CachedActivations:
    """The windows of a cache and their activations, memory-mapped.

    Raises: UsageError for a folder that holds none, or those of other hooks, windows (of `context_size` tokens, where it is
    given) or widths.
    """

    def __init__(self, folder: str | Path, hook_names: Sequence[str], d_in: int, context_size: int | None = None):
        from datasets import load_from_disk

        where, made = f"cached_activations_path {str(folder)!r}", "SAELens' CacheActivationsRunner makes them."
        try:
            rows: Any = load_from_disk(Path(folder).expanduser().resolve())  # a worker may be elsewhere
        except Exception as error:  # of datasets, Arrow, JSON and the system
            why = " ".join(str(error).split())
            raise UsageError(f"{where} holds no activations ({why:.200}). {made}") from error
        for name in (TOKENS, *hook_names):
            if name not in rows.column_names:
                found = ", ".join(map(str, rows.column_names))
                raise UsageError(f"{where} has no {name!r}, only {found}. {made}")
        self.context_size: int = context_size or rows.features[hook_names[0]].shape[0]
        for name in hook_names:
            context, width = rows.features[name].shape
            if (context, width) != (self.context_size, d_in):
                raise UsageError(
                    f"{where} has windows of {context} tokens and {width} dimensions at {name}; context_size is "
                    f"{self.context_size}, the model has {d_in}. Set context_size to that, or take its model."
                )
        self.rows: Any = rows.with_format("numpy")
        self.identity = rows._fingerprint  # of datasets: it changes with every change of the rows

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, windows_per_block: int, first_block: int = 0) -> Iterator[Int[np.ndarray, "windows context"]]:
        """Yield blocks of tokens from a block on, the last one shorter."""
        for start in range(first_block * windows_per_block, len(self), windows_per_block):
            yield np.asarray(self.rows[start : start + windows_per_block][TOKENS], np.int64)

    def read(self, hook_name: str, start: int, n_windows: int) -> Float[Tensor, "windows context d_in"]:
        """Return the activations of some windows."""
        return torch.from_numpy(np.array(self.rows[start : start + n_windows][hook_name]))
