"""Activations of a Hugging Face model, shuffled in a buffer, as an endless iterator that any SAELens trainer takes.

The state (tokens taken, buffer, random generator) can be saved and restored, so a resumed run sees the very batches an
uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sae_italian.corpora import TextDocument, pack
from sae_italian.corpora.packing import special_mask
from sae_italian.corpora.pretokenize import PretokenizedCorpus, tokenizer_fingerprint
from sae_italian.errors import UsageError
from sae_italian.models.activations import read_activations
from sae_italian.storage import read_json, write_json


class ActivationStream:
    """Yields shuffled batches [train_batch, d_in] of the activations at one hook, special tokens left out.

    `documents` is called to start the corpus, or is a pretokenised one, which is memory-mapped and so neither tokenised
    again nor read again when a run resumes; it is started again when it ends before the training does, unless
    `repeat` is False, in which case UsageError says how many tokens there were.
    """

    def __init__(
        self,
        model: nn.Module,
        documents: Callable[[], Iterator[TextDocument]] | PretokenizedCorpus,
        hook_name: str,
        *,
        context_size: int,
        batch_size: int,
        forward_windows: int = 32,
        buffer_tokens: int = 65_536,
        seed: int = 0,
        repeat: bool = True,
    ):
        self.model: Any = model
        self.documents, self.hook_name = documents, hook_name
        self.tokenizer: Any = model.tokenizer
        self.context_size, self.batch_size, self.forward_windows = context_size, batch_size, forward_windows
        self.repeat = repeat
        self.generator = torch.Generator().manual_seed(seed)
        self.n_blocks = 0  # forward passes done, over all epochs
        d_in: int = model.config.hidden_size  # pyright: ignore
        capacity = max(buffer_tokens, 2 * batch_size)
        self.buffer = torch.empty(capacity, d_in, dtype=model.dtype)  # pyright: ignore
        self.filled = 0  # rows of the buffer that hold activations not served yet
        self.left = torch.empty(0, d_in, dtype=model.dtype)  # pyright: ignore  # read, but not in the buffer yet
        if isinstance(documents, PretokenizedCorpus):
            check_pretokenized(documents, self.tokenizer, context_size)
        self.blocks = self._blocks()

    def _epoch(self, first_block: int = 0) -> Iterator[np.ndarray]:
        """Yield the windows [forward_windows, context] of the corpus once, from a block on."""
        if isinstance(self.documents, PretokenizedCorpus):
            yield from self.documents.blocks(self.forward_windows, first_block)
            return
        blocks = pack(self.documents(), self.tokenizer, self.context_size, windows_per_block=self.forward_windows)
        for block in islice(blocks, first_block, None):
            yield block.tokens

    def _blocks(self, first_block: int = 0) -> Iterator[np.ndarray]:
        if isinstance(self.documents, PretokenizedCorpus):
            first_block %= -(-len(self.documents) // self.forward_windows)
        while True:
            n = first_block
            for tokens in self._epoch(first_block):
                n += 1
                yield tokens
            first_block = 0
            if n == 0:
                raise UsageError(
                    f"the corpus is too short: not one window of {self.context_size} tokens. Use a longer one."
                )
            if not self.repeat:
                raise UsageError(
                    f"the corpus ended after about {n * self.forward_windows * self.context_size:,} tokens."
                )

    def _read(self) -> Float[Tensor, "tokens d_in"]:
        """Return the activations of the next forward pass, without BOS positions."""
        windows = next(self.blocks)
        self.n_blocks += 1
        tokens = torch.from_numpy(windows)
        activations = read_activations(self.model, tokens.to(self.model.device), self.hook_name).cpu()  # pyright: ignore
        return activations[torch.from_numpy(~special_mask(windows, self.tokenizer))]

    def _refill(self) -> None:
        """Fill the buffer, then put all of it in a new random order."""
        while self.filled < len(self.buffer):
            if len(self.left) == 0:
                self.left = self._read()
            n = min(len(self.left), len(self.buffer) - self.filled)
            self.buffer[self.filled : self.filled + n] = self.left[:n]
            self.left = self.left[n:]
            self.filled += n
        self.buffer = self.buffer[torch.randperm(len(self.buffer), generator=self.generator)]

    def __iter__(self) -> ActivationStream:
        return self

    def __next__(self) -> Float[Tensor, "batch d_in"]:
        if self.filled - self.batch_size < len(self.buffer) // 2:
            self._refill()
        self.filled -= self.batch_size
        return self.buffer[self.filled : self.filled + self.batch_size].clone()

    def save(self, folder: Path) -> None:
        """Write the state into an existing folder."""
        tensors = {"buffer": self.buffer[: self.filled], "left": self.left, "generator": self.generator.get_state()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "stream.safetensors")
        write_json(folder / "stream.json", {"n_blocks": self.n_blocks})

    def load(self, folder: Path) -> None:
        """Continue from a saved state: the corpus is read again up to there, without running the model; a
        pretokenised one is opened there."""
        tensors = load_file(folder / "stream.safetensors")
        self.filled = len(tensors["buffer"])
        self.buffer[: self.filled] = tensors["buffer"]
        self.left = tensors["left"]
        self.generator.set_state(tensors["generator"])
        self.n_blocks = read_json(folder / "stream.json")["n_blocks"]
        if isinstance(self.documents, PretokenizedCorpus):
            self.blocks = self._blocks(self.n_blocks)
        else:
            self.blocks = islice(self._blocks(), self.n_blocks, None)


def check_pretokenized(corpus: PretokenizedCorpus, tokenizer: Any, context_size: int) -> None:
    """Raise UsageError when a pretokenised corpus was made for another tokenizer, context or split."""
    if corpus.tokenizer != tokenizer_fingerprint(tokenizer):
        raise UsageError(
            f"{corpus.folder} was made with another tokenizer than the model's. Pretokenise it for this model."
        )
    if corpus.context_size != context_size:
        raise UsageError(
            f"{corpus.folder} has windows of {corpus.context_size} tokens, context_size is {context_size}. Set it to that."
        )
    if corpus.split != "train":
        raise UsageError(
            f"{corpus.folder} holds the split {corpus.split!r}; training needs 'train', which leaves 5 % out."
        )
