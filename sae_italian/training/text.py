"""The text of a training: opened, counted before anything is trained, and written out for SAELens' own runner."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import atomic_path, fingerprint
from sae_italian.corpora import CorpusStream, Reader, pack
from sae_italian.corpora.packing import special_mask
from sae_italian.corpora.pretokenize import PretokenizedCorpus, is_pretokenized
from sae_italian.models import load_model_config, load_tokenizer
from sae_italian.models.cached import CachedActivations
from sae_italian.training.config import NORM_ESTIMATE_BATCHES, RunSpec
from sae_italian.training.stream import Documents, Mapped

CHARACTERS_PER_TOKEN = 8  # more than any tokenizer packs into one on average
COUNTED_CHARACTERS = 200_000_000  # of a corpus whose length is checked
WRITTEN_CHARACTERS = 4_000_000_000  # at most, for SAELens' runner


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


def count_tokens(spec: RunSpec, tokenizer: Any) -> int | None:
    """Return how many tokens there are to train on; None for a corpus that is not on this disk.

    Reading stops where the characters read must hold `training_tokens`; what is returned is then that number.
    """
    documents = training_documents(spec)
    if isinstance(documents, Mapped):
        return len(documents) * documents.context_size
    if not all(Path(part.strip()).expanduser().exists() for part in spec.corpus.split(",")):
        return None
    n_characters, enough = 0, min(CHARACTERS_PER_TOKEN * spec.training_tokens, COUNTED_CHARACTERS)
    for document in documents():
        n_characters += len(document.text)
        if n_characters >= enough:
            return spec.training_tokens
    blocks = pack(documents(), tokenizer, spec.context_size)
    return sum(int((~special_mask(block.tokens, tokenizer)).sum()) for block in blocks)


def check_length(spec: RunSpec, tokenizer: Any) -> str:
    """Return how long the corpus is, in words.

    Raises: UsageError, with the number of tokens there are, for fewer than `training_tokens`, unless `repeat_corpus` is
    set. Corpora of the hub, mixtures with them and MicroItaliano are taken as long enough.
    """
    n_tokens, wanted = count_tokens(spec, tokenizer), spec.training_tokens
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


def written_for_saelens(spec: RunSpec) -> Path:
    """Return a folder of the training documents, as far as a training reads, that `datasets` loads as its split "train".

    It lies in the user's cache and is written once. Raises: UsageError as `check_length`, and for what is not written.
    """
    from sae_italian import __version__

    if is_pretokenized(spec.corpus):
        raise UsageError(
            f"corpus {spec.corpus!r} is pretokenised, which SAELens' runner takes as override_dataset alone. "
            "Name the text itself, or use `sae-italian train`."
        )
    n_tokens = spec.training_tokens + 2 * spec.buffer_tokens + NORM_ESTIMATE_BATCHES * spec.train_batch_size_tokens
    wanted = CHARACTERS_PER_TOKEN * n_tokens
    stream = CorpusStream(spec.corpus, Reader(split="train", text_column=spec.text_column))
    if wanted > WRITTEN_CHARACTERS:
        raise UsageError(
            f"training_tokens is {spec.training_tokens:,}: SAELens' runner needs the training text of "
            f"{spec.corpus!r} as files, here up to {wanted / 1e9:.0f} GB. Lower it, or use `sae-italian train`."
        )
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "sae_italian" / f"train-{fingerprint([__version__, stream.spec(), wanted])}"
    if not (folder / "train.jsonl").is_file():
        check_length(spec, load_tokenizer(spec.model))
        with atomic_path(folder / "train.jsonl") as temporary, temporary.open("w", encoding="utf-8") as handle:
            for document in stream:
                handle.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")
                if stream.counts.characters >= wanted:
                    break
    return folder
