"""What a paper's evaluation is run on: a model, a text, and where activations of it come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.base.errors import UsageError
from sae_italian.corpora import CorpusStream, Reader
from sae_italian.corpora.documents import MICRO_ITALIANO
from sae_italian.corpora.pretokenize import PretokenizedCorpus, is_pretokenized
from sae_italian.models import load_model, resolve
from sae_italian.models.activations import check_context
from sae_italian.training import ActivationStream

MINI = "sae-italian-mini"
FORWARD_TOKENS = 4096


class Subject(NamedTuple):
    """A loaded model (backend `hf`) with the text it is studied on."""

    model: Any
    name: str
    corpus: str
    text_column: str
    context_size: int  # tokens

    @property
    def n_layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def d_in(self) -> int:
        return self.model.config.hidden_size


def open_subject(
    name: str,
    *,
    sae: Any = None,
    corpus: str | None = None,
    text_column: str = "text",
    context_size: int | None = None,
) -> Subject:
    """Load a model and settle its text: the given one, else the one its SAE was trained on, else the mini model's.

    Raises: UsageError when no text is known, or the context exceeds the model's.
    """
    metadata = sae.cfg.metadata if sae is not None else None
    corpus = corpus or (str(metadata.dataset_path) if metadata is not None and metadata.dataset_path else None)
    model = load_model(name)
    saved = resolve(name).saved_name
    if corpus is None and saved == MINI:
        corpus = MICRO_ITALIANO
    if corpus is None:
        raise UsageError(f"which text should {name} read? Give --corpus, a local file or a name of `corpora list`.")
    context = int(context_size or (metadata.context_size if metadata is not None else None) or 128)
    return Subject(model, saved, corpus, text_column, check_context(context, model.config))


def training_stream(subject: Subject, hook_name: str, *, batch_size: int = 2048, seed: int = 0) -> ActivationStream:
    """Return shuffled batches [batch_size, d_in] of the training text's activations, for ever."""
    corpus, column = subject.corpus, subject.text_column
    return ActivationStream(
        subject.model,
        PretokenizedCorpus(corpus)
        if is_pretokenized(corpus)
        else lambda: CorpusStream(corpus, Reader(split="train", text_column=column)),
        hook_name,
        context_size=subject.context_size,
        batch_size=batch_size,
        forward_windows=max(1, FORWARD_TOKENS // subject.context_size),
        buffer_tokens=8 * batch_size,
        seed=seed,
    )


def layer_of(sae: Any) -> int:
    """Return the layer an SAE reads at."""
    from sae_italian.models import parse_hook_name

    return parse_hook_name(sae.cfg.metadata.hook_name).layer


def folder_name(name: str | Path) -> str:
    """Return a name of a model or SAE that is fit for a folder."""
    return str(name).rstrip("/").split("/")[-1].replace(":", "-")
