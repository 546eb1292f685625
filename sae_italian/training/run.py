"""The folder of one training run: refused or claimed, trained into, resumed, finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import RUN_FILE, claim_folder, read_json, write_json
from sae_italian.corpora import CorpusStream, Reader, iter_documents, pack
from sae_italian.corpora.documents import check_corpus
from sae_italian.corpora.packing import special_mask
from sae_italian.corpora.pretokenize import PretokenizedCorpus, is_pretokenized
from sae_italian.models import load_model
from sae_italian.training.checkpoint import Checkpoints
from sae_italian.training.config import RunSpec
from sae_italian.training.logging import open_logger
from sae_italian.training.loop import Loop
from sae_italian.training.stream import ActivationStream, kept_positions
from sae_italian.training.transcoder_run import open_run

KIND = "train"
SAE_FOLDER = "sae"  # of a checkpoint that holds one SAE
CHARACTERS_PER_TOKEN = 8  # more than any tokenizer packs into one on average
# Settings that decide nothing of what was trained so far: a run may be resumed with others.
CHANGEABLE = (
    "repeat_corpus",
    "wandb",
    "wandb_project",
    "wandb_checkpoints",
    "checkpoint_every_tokens",
    "checkpoint_every_minutes",
    "evaluate_every_tokens",
    "evaluate_tokens",
    "evaluate_corpus",
)


def train(spec: RunSpec, out: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train the SAE of `spec` into the folder `out` and return it.

    `out` then loads with `SAE.load_from_disk(out)`; beside the weights lie `run.json` (the spec), `metrics.jsonl` and
    `runner_cfg.json`. While training, `checkpoints/` holds the last full state; a run that was interrupted or killed
    continues from it with `resume=True` and ends with the weights of an uninterrupted run (CPU, same threads).

    Raises: UsageError for a setting that cannot work, before anything is written, for a folder that holds another
    run, and as `Loop.fit`; KeyboardInterrupt after a signal, once the state is saved.
    """
    out = Path(out)
    kept_positions(spec.seqpos_slice, spec.context_size)
    config = spec.to_saelens()
    check_run(spec)
    model = load_model(spec.model, dtype=spec.dtype, device=spec.device)
    check_length(spec, model.tokenizer)
    continuing = claim_run(out, spec, resume=resume, overwrite=overwrite)
    checkpoints = Checkpoints(out, identity(spec))
    if continuing and (out / "sae_weights.safetensors").is_file():
        checkpoints.clear()
        return out
    run = open_run(spec, model, out)
    loop = Loop({SAE_FOLDER: run}, open_stream(spec, model, run.hook_names), checkpoints)
    if continuing:
        loop.resume()
    with open_logger(spec, config, out) as log:
        run.log = log
        loop.fit()
        loop.finish()
        log.finish(out, model, loop.stream.windows.state())
    return out


def identity(spec: RunSpec) -> dict[str, Any]:
    """Return the settings that decide the result."""
    return {key: value for key, value in spec.model_dump(mode="json").items() if key not in CHANGEABLE}


def claim_run(out: Path, spec: RunSpec, *, resume: bool, overwrite: bool) -> bool:
    """Claim the folder as `claim_folder` does, but let a resumed run differ in what is CHANGEABLE."""
    earlier, given = read_run(out), spec.model_dump(mode="json")
    kept = {key: value for key, value in earlier.get("spec", {}).items() if key in CHANGEABLE}
    continuing = claim_folder(out, KIND, given | (kept if resume else {}), resume=resume, overwrite=overwrite)
    if continuing:
        write_json(out / RUN_FILE, earlier | {"spec": given})
    return continuing


def check_run(spec: RunSpec) -> None:
    """Raise UsageError for sizes and corpora that cannot work, before a model is loaded and anything is written."""
    check_corpus(spec.corpus, text_column=spec.text_column)
    if spec.training_tokens < spec.train_batch_size_tokens:
        raise UsageError(
            f"training_tokens is {spec.training_tokens}, less than one batch of {spec.train_batch_size_tokens}."
        )
    if spec.buffer_tokens < spec.train_batch_size_tokens:
        raise UsageError(
            f"buffer_tokens is {spec.buffer_tokens}, less than one batch of {spec.train_batch_size_tokens}. Raise it."
        )
    if spec.evaluate_every_tokens and is_pretokenized(spec.evaluate_corpus or spec.corpus):
        raise UsageError(
            "evaluate_every_tokens needs held-out text, and a pretokenised corpus holds none: set evaluate_corpus."
        )


def open_stream(spec: RunSpec, model: Any, hook_names: str | Sequence[str] | None = None) -> ActivationStream:
    """Return the stream of training activations that a spec describes, at its hook or at the given ones."""
    corpus = spec.corpus
    return ActivationStream(
        model,
        PretokenizedCorpus(corpus)
        if is_pretokenized(corpus)
        else lambda: CorpusStream(corpus, Reader(split="train", text_column=spec.text_column)),
        hook_names or spec.hook_name,
        context_size=spec.context_size,
        batch_size=spec.train_batch_size_tokens,
        forward_windows=spec.store_batch_size_prompts,
        buffer_tokens=spec.buffer_tokens,
        seed=spec.seed,
        repeat=spec.repeat_corpus,
        seqpos_slice=spec.seqpos_slice,
        exclude_special_tokens=spec.exclude_special_tokens,
    )


def check_length(spec: RunSpec, tokenizer: Any) -> None:
    """Refuse a local corpus with fewer training tokens than `training_tokens`, unless `repeat_corpus` is set.

    Only as much is read as decides it, and at most 200 M characters; hub corpora and mixtures are taken as long enough.
    Raises: UsageError, with the number of tokens there are.
    """
    if is_pretokenized(spec.corpus) and not spec.repeat_corpus:
        corpus = PretokenizedCorpus(spec.corpus)
        if len(corpus) * corpus.context_size < spec.training_tokens:
            raise _too_short(spec, len(corpus) * corpus.context_size)
    parts = [Path(part.strip()).expanduser() for part in spec.corpus.split(",")]
    if spec.repeat_corpus or is_pretokenized(spec.corpus) or not all(part.exists() for part in parts):
        return
    n_characters, enough = 0, min(CHARACTERS_PER_TOKEN * spec.training_tokens, 200_000_000)
    for document in iter_documents(spec.corpus, "train", text_column=spec.text_column):
        n_characters += len(document.text)
        if n_characters >= enough:
            return
    documents = iter_documents(spec.corpus, "train", text_column=spec.text_column)
    blocks = pack(documents, tokenizer, spec.context_size)
    n_tokens = sum(int((~special_mask(block.tokens, tokenizer)).sum()) for block in blocks)
    if n_tokens < spec.training_tokens:
        raise _too_short(spec, n_tokens)


def _too_short(spec: RunSpec, n_tokens: int) -> UsageError:
    return UsageError(
        f"corpus {spec.corpus!r} has {n_tokens:,} training tokens, fewer than the {spec.training_tokens:,} of training_tokens. "
        "Lower it, use more text, or set repeat_corpus=true to read the corpus more than once."
    )


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return `run.json` of a training folder, or an empty dict for an SAE that was not trained here."""
    file = Path(folder) / "run.json"
    return read_json(file) if file.is_file() else {}
