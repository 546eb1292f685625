"""Activations of a Hugging Face model at one or several hooks, shuffled in a buffer, as an iterator of batches.

One forward pass, stopped after the last needed module, serves all hooks; row i of every hook's batch is the same token.
With one hook a batch is a plain tensor, so any SAELens trainer takes the stream as its data provider. The state (place in
the corpus, buffer, random generator) can be saved and restored, so a resumed run sees the very batches an uninterrupted
one would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import read_json, write_json
from sae_italian.corpora.packing import special_mask
from sae_italian.models.activations import read_many
from sae_italian.training.windows import BLOCKS_AHEAD, Documents, Windows

Rows = dict[str, Float[Tensor, "tokens d_in"]]  # by hook name, the same tokens at every hook


class ActivationStream:
    """Yields shuffled batches [batch_size, d_in] of the activations at `hook_name`; for a list of hooks, a dict of them.

    The buffer holds exactly `buffer_tokens` rows a hook, of the model's dtype, and is allocated once. Batches are drawn
    from it by a random permutation of its slots, half of them before the next permutation; what was served is
    replaced by the next tokens. `seqpos_slice` (start, stop, step) keeps those positions of a window only, and special
    tokens are left out unless `exclude_special_tokens` is False; a list of ids leaves out those.

    `documents` is called to start the corpus, or is a pretokenised one, which is memory-mapped and so neither tokenised
    again nor read again when a run resumes; it is started again when it ends before the training does, unless
    `repeat` is False: then what the buffer holds is served to the last row, the last batch being smaller, and
    UsageError says how many tokens there were.

    Raises: UsageError for a hook or position the model does not have, a buffer below one batch, and activations that
    are not finite, naming hook, window and position.
    """

    def __init__(
        self,
        model: nn.Module,
        documents: Documents,
        hook_name: str | Sequence[str],
        *,
        context_size: int,
        batch_size: int,
        forward_windows: int = 32,
        buffer_tokens: int = 65_536,
        seed: int = 0,
        repeat: bool = True,
        seqpos_slice: Sequence[int | None] = (None,),
        exclude_special_tokens: bool | Sequence[int] = True,
        device: str | torch.device | None = None,
        ahead: int = BLOCKS_AHEAD,
    ):
        self.model: Any = model
        self.tokenizer: Any = model.tokenizer
        self.single = isinstance(hook_name, str)
        self.hook_names = (hook_name,) if isinstance(hook_name, str) else tuple(dict.fromkeys(hook_name))
        self.context_size, self.batch_size = context_size, batch_size
        if buffer_tokens < batch_size:
            raise UsageError(f"buffer_tokens is {buffer_tokens}, less than one batch of {batch_size}. Raise it.")
        self.positions = kept_positions(seqpos_slice, context_size)
        self.exclude_special_tokens = exclude_special_tokens
        self.windows = Windows(documents, self.tokenizer, context_size, forward_windows, repeat=repeat, ahead=ahead)
        self.device = torch.device(device or self.model.device)
        self.generator = torch.Generator().manual_seed(seed)
        d_in: int = self.model.config.hidden_size  # the width of every hook in models/hooks.py
        self.buffer: Rows = {
            name: torch.empty(buffer_tokens, d_in, dtype=self.model.dtype, device=self.device)
            for name in self.hook_names
        }
        self.rest: Rows = {name: rows[:0].clone() for name, rows in self.buffer.items()}  # read, not in the buffer yet
        self.holes: Int[Tensor, " holes"] = torch.arange(buffer_tokens)  # slots to be filled before the next batch
        self.order: Int[Tensor, " slots"] = self.holes[:0]  # slots still to be served before the next permutation
        self.n_tokens = 0  # rows read from the model
        self.ended = False  # the corpus is, and `order` holds all that is left

    @property
    def capacity(self) -> int:
        """Rows of the buffer, for each hook."""
        return len(self.buffer[self.hook_names[0]])

    def _read(self) -> Rows | None:
        """Return the kept rows of the next forward pass, or None at the end of the corpus."""
        windows = next(self.windows, None)
        if windows is None:
            return None
        keep = torch.from_numpy(self._kept(windows)).to(self.model.device)
        tokens = torch.from_numpy(windows).to(self.model.device)
        acts = read_many(self.model, tokens, self.hook_names)
        rows = {name: acts[name][keep] for name in self.hook_names}
        for name in self.hook_names:
            if not torch.isfinite(rows[name].sum(dtype=torch.float32)):
                self._refuse_not_finite(name, acts[name], keep, windows)
        self.n_tokens += len(rows[self.hook_names[0]])
        return {name: found.to(self.device) for name, found in rows.items()}

    def _kept(self, windows: Int[np.ndarray, "windows context"]) -> Bool[np.ndarray, "windows context"]:
        keep = np.broadcast_to(self.positions, windows.shape)
        if self.exclude_special_tokens is True:
            return keep & ~special_mask(windows, self.tokenizer)
        if self.exclude_special_tokens:
            return keep & ~np.isin(windows, list(self.exclude_special_tokens))
        return keep.copy()

    def _refuse_not_finite(self, name: str, acts: Tensor, keep: Tensor, windows: np.ndarray) -> None:
        bad = ((~torch.isfinite(acts)).any(-1) & keep).nonzero()
        if len(bad) == 0:
            return  # the sum alone was too large
        window, position = bad[0].tolist()
        number = (self.windows.n_blocks - 1) * self.windows.windows_per_block + window
        raise UsageError(
            f"the model's activations at {name!r} are not finite: window {number:,} of the corpus, position {position}, "
            f"token {self.tokenizer.decode([int(windows[window, position])])!r}, dtype {acts.dtype}. "
            "Use dtype float32 or bfloat16, or check the model's weights."
        )

    def _fill(self) -> None:
        """Put new rows into the holes of the buffer."""
        while len(self.holes):
            if len(self.rest[self.hook_names[0]]) == 0:
                found = self._read()
                if found is None:
                    self._end()
                    return
                self.rest = found
            n = min(len(self.holes), len(self.rest[self.hook_names[0]]))
            slots = self.holes[:n].to(self.device)
            for name, rows in self.rest.items():
                self.buffer[name].index_copy_(0, slots, rows[:n])
            self.rest = {name: rows[n:] for name, rows in self.rest.items()}
            self.holes = self.holes[n:]

    def _end(self) -> None:
        """Keep for serving the slots that hold rows, in a new random order."""
        full = torch.ones(self.capacity, dtype=torch.bool)
        full[self.holes] = False
        slots = full.nonzero().squeeze(1)
        self.order = slots[torch.randperm(len(slots), generator=self.generator)]
        self.holes, self.ended = self.holes[:0], True

    def __iter__(self) -> ActivationStream:
        return self

    def __next__(self) -> Any:
        """Return the next batch: a tensor for one hook given as a string, else {hook name: tensor}."""
        if not self.ended:
            self._fill()
        if not self.ended and len(self.order) == 0:
            n_batches = max(1, self.capacity // 2 // self.batch_size)
            self.order = torch.randperm(self.capacity, generator=self.generator)[: n_batches * self.batch_size]
        taken, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        if len(taken) == 0:
            raise UsageError(
                f"the corpus ended after {self.n_tokens:,} tokens. Ask for fewer, use more text, or repeat the corpus."
            )
        slots = taken.to(self.device)
        batch = {name: rows.index_select(0, slots) for name, rows in self.buffer.items()}
        if not self.ended:
            self.holes = taken
        return batch[self.hook_names[0]] if self.single else batch

    def sample(self, hook_name: str) -> Float[Tensor, "tokens d_in"]:
        """Return the rows the buffer holds now, to estimate scales from or to start weights at; nothing is taken."""
        if not self.ended:
            self._fill()
        if self.ended:
            return self.buffer[hook_name][self.order.to(self.device)]
        return self.buffer[hook_name]

    def save(self, folder: Path) -> None:
        """Write the state into an existing folder."""
        tensors = {"order": self.order, "holes": self.holes, "generator": self.generator.get_state()}
        for name in self.hook_names:
            tensors |= {f"buffer.{name}": self.buffer[name], f"rest.{name}": self.rest[name]}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "stream.safetensors")
        counts = {"n_tokens": self.n_tokens, "ended": self.ended}
        write_json(folder / "stream.json", {**counts, "windows": self.windows.state()})

    def load(self, folder: Path) -> None:
        """Continue from a saved state, without running the model on what was read before."""
        tensors = load_file(folder / "stream.safetensors")
        for name in self.hook_names:
            self.buffer[name].copy_(tensors[f"buffer.{name}"])
            self.rest[name] = tensors[f"rest.{name}"].to(self.device)
        self.order, self.holes = tensors["order"], tensors["holes"]
        self.generator.set_state(tensors["generator"])
        counts = read_json(folder / "stream.json")
        self.n_tokens, self.ended = counts["n_tokens"], counts["ended"]
        self.windows.load(counts["windows"])
        if self.ended and self.windows.repeat:  # resumed with the corpus to be read again
            empty = torch.ones(self.capacity, dtype=torch.bool)
            empty[self.order] = False
            self.holes, self.order, self.ended = empty.nonzero().squeeze(1), self.order[:0], False


def kept_positions(seqpos_slice: Sequence[int | None], context_size: int) -> Bool[np.ndarray, " context"]:
    """Return which positions of a window are kept. Raises: UsageError when none is."""
    kept = np.zeros(context_size, dtype=bool)
    try:
        kept[slice(*seqpos_slice)] = True
    except (TypeError, ValueError) as error:
        raise UsageError(f"seqpos_slice is {list(seqpos_slice)}; it must be [stop] or [start, stop, step].") from error
    if not kept.any():
        raise UsageError(f"seqpos_slice {list(seqpos_slice)} keeps no position of a window of {context_size} tokens.")
    return kept
