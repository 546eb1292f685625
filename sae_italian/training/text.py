"""The text of a training: opened, counted before anything is trained, cut into windows, and written out for SAELens' runner."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sae_italian.base.errors import UsageError
from sae_italian.base.pace import progress
from sae_italian.base.storage import atomic_path, fingerprint, path_of, room_on, write_text
from sae_italian.corpora import CorpusStream, Reader, pack
from sae_italian.corpora.packing import Packer, layout_of, special_mask, tokenised
from sae_italian.corpora.pretokenize import CachedActivations, MappedWindows, PretokenizedCorpus, is_pretokenized
from sae_italian.corpora.stream import WRITTEN_FROM, mixture
from sae_italian.models import load_model_config, load_tokenizer
from sae_italian.training.config import NORM_ESTIMATE_BATCHES, RunSpec, load_spec

CHARACTERS_PER_TOKEN = 8  # more than any tokenizer packs into one on average
COUNTED_CHARACTERS = 200_000_000  # of a corpus whose length is checked

Documents = Callable[[], CorpusStream] | MappedWindows  # called to start the corpus, or memory-mapped


def documents_of(corpus: str, text_column: str = "text") -> Documents:
    """Return the training documents of a corpus as `ActivationStream` takes them: packed on disk, or read when called."""
    if is_pretokenized(corpus):
        return PretokenizedCorpus(corpus)
    return lambda: CorpusStream(corpus, Reader(split="train", text_column=text_column))


def training_documents(spec: RunSpec) -> Documents:
    """Return what a spec trains on: `documents_of` its corpus, or the activations that SAELens cached."""
    if not spec.use_cached_activations:
        return documents_of(spec.corpus, spec.text_column)
    d_in = load_model_config(spec.model).hidden_size
    return CachedActivations(str(spec.cached_activations_path), spec.hook_names, d_in, spec.context_size)


def _count_tokens(spec: RunSpec, tokenizer: Any) -> int | None:
    """Return how many tokens there are to train on; None for a corpus that is not on this disk, or is too long to be read.

    Reading stops where the characters read must hold `training_tokens`; what is returned is then that number.
    """
    documents = training_documents(spec)
    if isinstance(documents, PretokenizedCorpus):
        check_pretokenized(documents, tokenizer, spec.context_size)
    if isinstance(documents, MappedWindows):
        return len(documents) * documents.context_size
    if not all(path_of(name).exists() for name in mixture(spec.corpus)[0]):
        return None
    n_characters, enough = 0, CHARACTERS_PER_TOKEN * spec.training_tokens
    for document in documents():
        n_characters += len(document.text)
        if n_characters >= min(enough, COUNTED_CHARACTERS):
            return spec.training_tokens if n_characters >= enough else None
    blocks = pack(documents(), tokenizer, spec.context_size)
    return sum(int((~special_mask(block.tokens, tokenizer)).sum()) for block in blocks)


def check_length(spec: RunSpec, tokenizer: Any) -> str:
    """Return how long the corpus is, in words.

    Raises: UsageError, with the number of tokens there are, for fewer than `training_tokens`, unless `repeat_corpus` is
    set. Corpora of the hub, mixtures with them and MicroItaliano are taken as long enough.
    """
    n_tokens, wanted = _count_tokens(spec, tokenizer), spec.training_tokens
    if n_tokens is None:
        return f"corpus {spec.corpus}: its tokens are not counted"
    if n_tokens < wanted and not spec.repeat_corpus:
        raise UsageError(
            f"corpus {spec.corpus!r} has {n_tokens:,} training tokens, fewer than the {wanted:,} of "
            "training_tokens. Lower it, use more text, or set repeat_corpus=true to read the corpus more than once."
        )
    if n_tokens < wanted:
        return f"corpus {spec.corpus}: {n_tokens:,} training tokens, {wanted / max(n_tokens, 1):.1f} epochs"
    return f"corpus {spec.corpus}: {n_tokens:,} training tokens or more, at most one epoch"


# --- windows ------------------------------------------------------------------------------------------------------------

# Where a block of windows starts: a CorpusStream's state, or the number of a memory-mapped corpus' block; and the packer with
# what is left of the documents read before. Both are None at the start of the corpus.
Place = tuple[Any, Packer | None]
START: Place = (None, None)


class WindowBlocks:
    """Yields blocks of windows [up to windows_per_block, context]; the next one is packed in a thread meanwhile.

    The corpus is started again when it ends, unless `repeat` is False.
    Raises: UsageError for a corpus without one full window, or pretokenised for something else.
    """

    def __init__(
        self, documents: Documents, tokenizer: Any, context_size: int, windows_per_block: int, *, repeat: bool = True
    ):
        if isinstance(documents, PretokenizedCorpus):
            check_pretokenized(documents, tokenizer, context_size)
        self.documents, self.tokenizer, self.context_size = documents, tokenizer, context_size
        self.windows_per_block, self.repeat = windows_per_block, repeat
        self.pool = ThreadPoolExecutor(1, "windows")
        self._start(0, START)

    def _start(self, n_blocks: int, place: Place) -> None:
        self.n_blocks, self.place = n_blocks, place  # blocks taken, over all epochs
        self.blocks, self.coming = self._blocks(place), None

    def __iter__(self) -> WindowBlocks:
        return self

    def __next__(self) -> Int[np.ndarray, "windows context"]:
        if (found := (self.coming or self.pool.submit(next, self.blocks, None)).result()) is None:
            raise StopIteration
        self.coming = self.pool.submit(next, self.blocks, None)
        tokens, self.place = found
        self.n_blocks += 1
        return tokens

    def _blocks(self, place: Place) -> Iterator[tuple[np.ndarray, Place]]:
        """Yield each block with the place of the one after it."""
        while True:
            blocks = self._epoch(place)
            first = next(blocks, None)
            if first is not None:
                yield first
                yield from blocks
            elif place == START:
                raise UsageError(
                    f"the corpus is too short: not one window of {self.context_size} tokens. Use a longer one."
                )
            if not self.repeat:
                return
            place = START

    def _epoch(self, place: Place) -> Iterator[tuple[np.ndarray, Place]]:
        """Yield the blocks from a place to the end of the corpus."""
        corpus, packer = place
        if isinstance(self.documents, MappedWindows):
            first = corpus or 0
            for number, tokens in enumerate(self.documents.blocks(self.windows_per_block, first), first + 1):
                yield tokens, (number, None)
            return
        stream, packer = self.documents(), copy(packer) if packer else self._packer()
        if corpus is not None:
            stream.load_state(corpus)
        for block in packer.blocks(tokenised(stream, self.tokenizer), self.windows_per_block):
            yield block.tokens, (stream.state(), copy(packer))

    def _packer(self) -> Packer:
        return Packer(self.context_size, layout_of(self.tokenizer))

    def state(self) -> dict[str, Any]:
        """Return where the next block starts, as JSON."""
        corpus, packer = self.place
        return {"n_blocks": self.n_blocks, "corpus": corpus, "packer": packer and packer.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, whatever was read before."""
        if packer := state["packer"] and self._packer():
            packer.load(state["packer"])
        self._start(state["n_blocks"], (state["corpus"], packer))


def check_pretokenized(corpus: PretokenizedCorpus, tokenizer: Any, context_size: int) -> None:
    """Raise UsageError when a pretokenised corpus was made for another tokenizer, context or split."""
    wrong = ""
    if not corpus.is_made_for(tokenizer):
        wrong = "was made with another tokenizer than the model's. Pretokenise it for this model."
    elif corpus.context_size != context_size:
        wrong = f"has windows of {corpus.context_size} tokens, context_size is {context_size}. Set it to that."
    elif corpus.split != "train":
        wrong = f"holds the split {corpus.split!r}; training needs 'train', which leaves 5 % out."
    if wrong:
        raise UsageError(f"{corpus.folder} {wrong}")


# --- for SAELens' own runner ------------------------------------------------------------------------------------------


def load_config(path: str | Path | dict[str, Any], *overrides: str) -> Any:
    """Return the SAELens runner config of a YAML or dict: `LanguageModelSAETrainingRunner(load_config(path)).run()` trains it.

    The runner reads no held-out split, no column but `text` and no MicroItaliano: so the training documents are written,
    as far as the training reads, to the user's cache, in a folder that `dataset_path` names and `datasets` loads as its split
    "train". It has no seed: SAELens draws anew.
    Raises: UsageError as `load_spec`, for a model, hook, architecture or SAE field that does not exist, and for what
    cannot be carried: a transcoder, a pretokenised corpus, one that is too short or for which the disk has no room.
    """
    from sae_italian import __version__

    spec = load_spec(path, *overrides)
    config = spec.to_saelens()
    for key in ("hook_name_out", "from_pretrained_path"):
        if (given := getattr(spec, key)) is not None:
            raise UsageError(f"SAELens' runner knows no {key} ({given!r}); use `sae-italian train`.")
    if is_pretokenized(spec.corpus):
        raise UsageError(
            f"corpus {spec.corpus!r} is pretokenised, which SAELens' runner takes as override_dataset alone. "
            "Name the text itself, or use `sae-italian train`."
        )
    n_tokens = spec.training_tokens + 2 * spec.buffer_tokens + NORM_ESTIMATE_BATCHES * spec.train_batch_size_tokens
    wanted = CHARACTERS_PER_TOKEN * n_tokens
    stream = CorpusStream(spec.corpus, Reader(split="train", text_column=spec.text_column))
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = base / "sae_italian" / f"train-{fingerprint([__version__, stream.spec(), wanted])}" / "train.jsonl"
    if not file.is_file():
        if wanted > (free := room_on(base)) // 2:  # `datasets` keeps a copy of what it reads
            raise UsageError(
                f"training_tokens is {spec.training_tokens:,}: SAELens' runner needs the training text of "
                f"{spec.corpus!r} as files, up to twice {wanted / 1e9:.0f} GB; the disk of {base} has {free / 1e9:.0f} GB "
                "free. Lower it, let XDG_CACHE_HOME name a larger disk, or use `sae-italian train`."
            )
        check_length(spec, load_tokenizer(spec.model))
        bar = progress("text for SAELens", total=wanted, unit=" characters")
        with bar, atomic_path(file) as temporary, temporary.open("w", encoding="utf-8") as handle:
            for document in stream:
                handle.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")
                bar.update(len(document.text))
                if stream.counts.characters >= wanted:
                    break
    write_text(file.with_name(WRITTEN_FROM), spec.corpus)  # where the SAE's held-out text is
    config.dataset_path = str(file.parent)
    return config
