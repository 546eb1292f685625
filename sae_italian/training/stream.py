"""Activations of a Hugging Face model at one or several hooks, shuffled in a buffer, as an iterator of batches.

One forward pass, stopped after the last needed module, serves all hooks; row i of every hook's batch is the same token.
With one hook a batch is a plain tensor, so any SAELens trainer takes the stream as its data provider. The state (place in
the corpus, buffer, random generator) can be saved and restored, so a resumed run sees the very batches an uninterrupted
one would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
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
from sae_italian.corpora.pretokenize import CachedActivations
from sae_italian.models.activations import read_many
from sae_italian.training.processes import ALONE, Processes
from sae_italian.training.text import Documents, WindowBlocks

Windows = Int[np.ndarray, "windows context"]  # of one forward pass
Kept = Bool[np.ndarray, "windows context"]  # what of them is trained on
Rows = Float[Tensor, "hooks tokens d_in"]  # the same tokens at every hook


class ActivationStream:
    """Yields shuffled batches [batch_size, d_in] of the activations at `hook_name`; for a list of hooks, a dict of them.

    The buffer holds exactly `buffer_tokens` rows a hook, of the model's dtype, and is allocated once. Batches are drawn
    from it by a random permutation of its slots, half of them before the next permutation; what was served is
    replaced by the next tokens. `seqpos_slice` (start, stop, step) keeps those positions of a window only, and special
    tokens are left out unless `exclude_special_tokens` is False; a list of ids leaves out those.

    The corpus is started again when it ends before the training does, unless `repeat` is False: then what the buffer
    holds is served to the last row, the last batch being smaller, and UsageError says how many tokens there were.

    Each of several `processes` runs the model on every so many-th block of windows and gets the rows of all: the batches are
    the same in each of them, and whatever their number.

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
        processes: Processes = ALONE,
    ):
        self.model: Any = model
        self.processes = processes
        self.single = isinstance(hook_name, str)
        self.hook_names = (hook_name,) if isinstance(hook_name, str) else tuple(dict.fromkeys(hook_name))
        self.batch_size = batch_size
        if buffer_tokens < batch_size:
            raise UsageError(f"buffer_tokens is {buffer_tokens}, less than one batch of {batch_size}. Raise it.")
        self.positions = kept_positions(seqpos_slice, context_size)
        self.exclude_special_tokens = exclude_special_tokens
        self.cached = documents if isinstance(documents, CachedActivations) else None
        self.windows = WindowBlocks(documents, model.tokenizer, context_size, forward_windows, repeat=repeat)
        self.generator = torch.Generator().manual_seed(seed)
        size = (len(self.hook_names), buffer_tokens, self.model.config.hidden_size)  # of every hook we know
        self.buffer: Rows = torch.empty(size, dtype=self.model.dtype, device=self.model.device)
        self.rest: Rows = self.buffer[:, :0].clone()  # read, not in the buffer yet
        self.holes: Int[Tensor, " holes"] = torch.arange(buffer_tokens)  # slots to be filled before the next batch
        self.order: Int[Tensor, " slots"] = self.holes[:0]  # slots still to be served before the next permutation
        self.n_tokens = 0  # rows read from the model
        self.ended = False  # the corpus is, and `order` holds all that is left

    def _read(self) -> Rows | None:
        """Return the activations of the next blocks of windows, one for each process; None when the corpus has ended."""
        blocks = [
            (windows, self._kept(windows), self.windows.place[0])
            for windows in islice(self.windows, self.processes.world)
        ]
        if not blocks:
            return None
        sizes, mine = [int(keep.sum()) for _, keep, _ in blocks], self.processes.rank
        has_one = mine < len(blocks) and sizes[mine]
        rows = self._rows(*blocks[mine], back=len(blocks) - mine) if has_one else self.buffer[:, :0]
        self.n_tokens += sum(sizes)
        return self.processes.gathered(rows, sizes)

    def _rows(self, windows: Windows, keep: Kept, after: Any, back: int) -> Rows:
        """Return the activations of the block read as the so many-th last; `after`: where the next one starts."""
        tokens, kept = (torch.from_numpy(array).to(self.buffer.device) for array in (windows, keep))
        if self.cached is None:
            acts = read_many(self.model, tokens, self.hook_names)
        else:
            first = (after - 1) * self.windows.windows_per_block
            read = {name: self.cached.read(name, first, len(tokens)) for name in self.hook_names}
            acts = {name: each.to(self.buffer.device, self.model.dtype) for name, each in read.items()}
        rows = torch.stack([acts[name][kept] for name in self.hook_names])
        if not torch.isfinite(rows.sum(dtype=torch.float32)):
            self._refuse_not_finite(rows, kept, windows, self.windows.n_blocks - back)
        return rows

    def _kept(self, windows: Windows) -> Kept:
        keep = np.broadcast_to(self.positions, windows.shape)
        if self.exclude_special_tokens is True:
            return keep & ~special_mask(windows, self.model.tokenizer)
        return keep & ~np.isin(windows, list(self.exclude_special_tokens or ()))

    def _refuse_not_finite(self, rows: Rows, kept: Tensor, windows: Windows, n: int) -> None:
        hook, row = (~torch.isfinite(rows)).any(-1).nonzero()[0].tolist()
        window, position = divmod(int(kept.flatten().nonzero()[row]), kept.shape[1])
        number = n * self.windows.windows_per_block + window
        raise UsageError(
            f"the model's activations at {self.hook_names[hook]!r} are not finite: window {number:,} of the "
            f"corpus, position {position}, token "
            f"{self.model.tokenizer.decode([int(windows[window, position])])!r}, dtype {rows.dtype}. "
            "Use dtype float32 or bfloat16, or check the model's weights."
        )

    def fill(self, told: Callable[[int], object] = lambda n: None) -> None:
        """Put new rows into the holes of the buffer; `told` is called with the number of rows of each step."""
        while len(self.holes) and not self.ended:
            if self.rest.shape[1] == 0:
                if (found := self._read()) is None:  # the slots that hold rows are served, in a new random order
                    slots = self._other_slots(self.holes)
                    self.order = slots[torch.randperm(len(slots), generator=self.generator)]
                    self.holes, self.ended = self.holes[:0], True
                    return
                self.rest = found
            n = min(len(self.holes), self.rest.shape[1])
            self.buffer.index_copy_(1, self.holes[:n].to(self.buffer.device), self.rest[:, :n])
            self.rest, self.holes = self.rest[:, n:], self.holes[n:]
            told(n)

    def _other_slots(self, slots: Int[Tensor, " slots"]) -> Int[Tensor, " others"]:
        others = torch.ones(self.buffer.shape[1], dtype=torch.bool)
        others[slots] = False
        return others.nonzero().squeeze(1)

    def __iter__(self) -> ActivationStream:
        return self

    def __next__(self) -> Any:
        """Return the next batch: a tensor for one hook given as a string, else {hook name: tensor}."""
        self.fill()
        if not self.ended and len(self.order) == 0:
            n_slots = self.buffer.shape[1]
            n_batches = max(1, n_slots // 2 // self.batch_size)
            self.order = torch.randperm(n_slots, generator=self.generator)[: n_batches * self.batch_size]
        taken, left = self.order[: self.batch_size], self.order[self.batch_size :]
        if len(taken) < self.processes.world:
            raise UsageError(
                f"the corpus ended after {self.n_tokens:,} tokens. Ask for fewer, use more text, or repeat the corpus."
            )
        self.order, batch = left, self.buffer.index_select(1, taken.to(self.buffer.device))
        if not self.ended:
            self.holes = taken
        return batch[0] if self.single else dict(zip(self.hook_names, batch, strict=True))

    def sample(self, hook_name: str) -> Float[Tensor, "tokens d_in"]:
        """Return the rows the buffer holds now, to estimate scales from or to start weights at; nothing is taken."""
        self.fill()
        rows = self.buffer[self.hook_names.index(hook_name)]
        return rows[self.order.to(self.buffer.device)] if self.ended else rows

    def save(self, folder: Path) -> None:
        """Write the state into an existing folder."""
        tensors = {"order": self.order, "holes": self.holes, "generator": self.generator.get_state()}
        tensors |= {"buffer": self.buffer, "rest": self.rest.contiguous()}
        save_file(tensors, folder / "stream.safetensors")
        counts = {"n_tokens": self.n_tokens, "ended": self.ended}
        write_json(folder / "stream.json", {**counts, "windows": self.windows.state()})

    def load(self, folder: Path) -> None:
        """Continue from a saved state, without running the model on what was read before."""
        tensors = load_file(folder / "stream.safetensors")
        self.buffer.copy_(tensors["buffer"])
        self.rest = tensors["rest"].to(self.buffer.device)
        self.order, self.holes = tensors["order"], tensors["holes"]
        self.generator.set_state(tensors["generator"])
        counts = read_json(folder / "stream.json")
        self.n_tokens, self.ended = counts["n_tokens"], counts["ended"]
        self.windows.load(counts["windows"])
        if self.ended and self.windows.repeat:  # resumed with the corpus to be read again
            self.holes, self.order, self.ended = self._other_slots(self.order), self.order[:0], False


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
