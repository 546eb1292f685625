"""One training run: SAELens' trainer and SAE classes, our activation stream, a folder that survives being killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sae_italian.corpora import iter_documents, pack
from sae_italian.corpora.documents import check_corpus
from sae_italian.corpora.packing import special_mask
from sae_italian.corpora.pretokenize import PretokenizedCorpus, is_pretokenized
from sae_italian.errors import DataError, UsageError
from sae_italian.models import load_model, parse_hook_name
from sae_italian.storage import atomic_path, claim_folder, read_json, write_json
from sae_italian.training.config import RunSpec
from sae_italian.training.logging import open_logger
from sae_italian.training.stream import ActivationStream

KIND = "train"
LOG_EVERY_STEPS = 10
NORM_ESTIMATE_BATCHES = 16
CHARACTERS_PER_TOKEN = 8  # more than any tokenizer packs into one on average


def train(spec: RunSpec, out: str | Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train the SAE of `spec` into the folder `out` and return it.

    `out` then loads with `SAE.load_from_disk(out)`; beside the weights lie `run.json` (the spec), `metrics.jsonl` and
    `runner_cfg.json`. While training, `checkpoints/` holds the last full state; a run that was interrupted or killed
    continues from it with `resume=True` and ends with the weights of an uninterrupted run (CPU, same threads).

    Raises: UsageError for a setting that cannot work, before anything is written, and for a folder that holds another
    run; KeyboardInterrupt after a signal, once the state is saved.
    """
    out = Path(out)
    config = spec.to_saelens()
    check_corpus(spec.corpus, text_column=spec.text_column)
    if spec.training_tokens < spec.train_batch_size_tokens:
        raise UsageError(
            f"training_tokens is {spec.training_tokens}, less than one batch of {spec.train_batch_size_tokens}."
        )
    model = load_model(spec.model, dtype=spec.dtype, device=spec.device)
    check_length(spec, model.tokenizer)
    continuing = claim_folder(out, KIND, spec.model_dump(), resume=resume, overwrite=overwrite)
    if continuing and (out / "sae_weights.safetensors").is_file():
        return out
    run = _Run(spec, config, model, out)
    if continuing:
        run.load_checkpoint()
    with open_logger(spec, config) as log:
        run.fit(log)
    run.finish()
    return out


def open_stream(spec: RunSpec, model: Any, *, seed: int | None = None) -> ActivationStream:
    """Return the stream of training activations that a spec describes."""
    corpus = spec.corpus
    return ActivationStream(
        model,
        PretokenizedCorpus(corpus)
        if is_pretokenized(corpus)
        else lambda: iter_documents(corpus, "train", text_column=spec.text_column),
        spec.hook_name,
        context_size=spec.context_size,
        batch_size=spec.train_batch_size_tokens,
        forward_windows=spec.store_batch_size_prompts,
        buffer_tokens=spec.buffer_tokens,
        seed=spec.seed if seed is None else seed,
    )


def check_length(spec: RunSpec, tokenizer: Any) -> None:
    """Refuse a local corpus with fewer training tokens than `training_tokens`, unless `repeat_corpus` is set.

    Only as much is read as decides it, and at most 200 M characters; hub corpora and mixtures are taken as long enough.
    Raises: UsageError, with the number of tokens there are.
    """
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
        raise UsageError(
            f"corpus {spec.corpus!r} has {n_tokens:,} training tokens, fewer than the {spec.training_tokens:,} of training_tokens. "
            "Lower it, use more text, or set repeat_corpus=true to read the corpus more than once."
        )


class _Run:
    """SAELens' trainer with a stream, its checkpoints and its metrics."""

    def __init__(self, spec: RunSpec, config: Any, model: Any, out: Path):
        from sae_lens import SAETrainer, TrainingSAE

        self.spec, self.config, self.out = spec, config, out
        self.stream = open_stream(spec, model)
        torch.manual_seed(spec.seed)
        self.sae = TrainingSAE.from_dict(config.get_training_sae_cfg_dict())
        self._describe(self.sae.cfg.metadata)
        self.sae.to(spec.device)
        self.trainer = SAETrainer(cfg=config.to_sae_trainer_config(), sae=self.sae, data_provider=self.stream)
        self.interrupted = False

    def _describe(self, metadata: Any) -> None:
        """Write what SAELens' own runner writes, truthfully for a Hugging Face model."""
        config = self.config
        for field in (
            "model_name",
            "hook_name",
            "hook_head_index",
            "context_size",
            "seqpos_slice",
            "prepend_bos",
            "exclude_special_tokens",
            "sequence_separator_token",
            "disable_concat_sequences",
        ):
            setattr(metadata, field, getattr(config, field))
        metadata.model_class_name = "HookedTransformer"  # what SAELens' tools load to run this SAE on the hook name
        metadata.model_from_pretrained_kwargs = {}
        metadata.dataset_path = self.spec.corpus
        metadata.harvested_from = "hf"
        metadata.model_revision = getattr(self.stream.model, "loaded_from", {}).get("revision")
        metadata.hf_hook_name = parse_hook_name(config.hook_name).module_path(self.stream.model.config.model_type)

    def fit(self, log: Any) -> None:
        """Train to the end, or to the next signal, whatever comes first; a signal saves the state and raises."""
        trainer, spec = self.trainer, self.spec
        self._estimate_norm()
        next_checkpoint = trainer.n_training_samples + spec.checkpoint_every_tokens
        bar = tqdm(
            total=spec.training_tokens,
            initial=trainer.n_training_samples,
            unit="tok",
            unit_scale=True,
            desc="train SAE",
            disable=None,
        )
        self._truncate_metrics(trainer.n_training_steps)
        with _signals(self), (self.out / "metrics.jsonl").open("a", encoding="utf-8") as metrics, bar:
            while trainer.n_training_samples < spec.training_tokens:
                trainer.maybe_reset_sparsity()
                output = trainer.step(next(self.stream))
                if trainer.n_training_steps % LOG_EVERY_STEPS == 0:
                    row = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
                    self._check_finite(row)
                    metrics.write(json.dumps({"step": trainer.n_training_steps, **row}) + "\n")
                    log(row, trainer.n_training_steps)
                    bar.set_postfix(
                        ev=f"{row['metrics/explained_variance']:.3f}", dead=int(row["sparsity/dead_features"])
                    )
                trainer.n_training_steps += 1
                bar.update(spec.train_batch_size_tokens)
                if trainer.n_training_samples >= next_checkpoint or self.interrupted:
                    metrics.flush()
                    self.save_checkpoint()
                    next_checkpoint = trainer.n_training_samples + spec.checkpoint_every_tokens
                if self.interrupted:
                    raise KeyboardInterrupt(f"saved at {trainer.n_training_samples:,} tokens; --resume continues")

    def _check_finite(self, row: dict[str, Any]) -> None:
        loss = row["losses/overall_loss"]
        if not torch.isfinite(torch.tensor(loss)):
            raise UsageError(
                f"the loss became {loss} at step {self.trainer.n_training_steps}; lower lr (now {self.spec.lr}). "
                f"The last checkpoint in {self.out / 'checkpoints'} is from before."
            )

    def _truncate_metrics(self, n_steps: int) -> None:
        """Drop the lines logged after the checkpoint that is continued, and a half-written last line."""
        file = self.out / "metrics.jsonl"
        if file.is_file():
            kept = []
            for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
                with contextlib.suppress(json.JSONDecodeError):
                    if json.loads(line)["step"] < n_steps:
                        kept.append(line)
            with atomic_path(file) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")

    def _estimate_norm(self) -> None:
        """Estimate the input scale on a stream of its own, so that no training token is spent on it."""
        scaler = self.trainer.activation_scaler
        if self.sae.cfg.normalize_activations != "expected_average_only_in" or scaler.scaling_factor is not None:
            return
        stream = open_stream(self.spec, self.stream.model)
        scaler.estimate_scaling_factor(self.sae.cfg.d_in, stream, NORM_ESTIMATE_BATCHES)

    def save_checkpoint(self) -> None:
        """Write the whole state beside the last one, then make it the last one, then remove the old one."""
        folder = self.out / "checkpoints"
        target = folder / str(self.trainer.n_training_samples)
        if target.exists():
            return
        with atomic_path(target) as temporary:
            self.trainer.save_checkpoint(checkpoint_name=temporary.name, base_path=temporary.parent)
            self.stream.save(temporary)
        for old in folder.iterdir():
            if old != target:
                shutil.rmtree(old)

    def load_checkpoint(self) -> None:
        folder = self.out / "checkpoints"
        saved = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
        if not saved:
            return  # killed before the first checkpoint: start again, with the same seed
        last = max(saved, key=lambda path: int(path.name))
        try:
            self.sae.load_weights_from_checkpoint(last)
            self.trainer.load_trainer_state(last)
            self.stream.load(last)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise DataError(
                f"checkpoint {last} cannot be read ({error}). Remove it, or start over with --overwrite."
            ) from error

    def finish(self) -> None:
        """Fold the input scale, write the SAE in SAELens' format and drop the checkpoints. The weights come last."""
        from safetensors.torch import save_file

        scaler = self.trainer.activation_scaler
        if scaler.scaling_factor is not None:
            self.sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
            scaler.scaling_factor = None
        self.trainer.set_final_sae_metadata()
        with atomic_path(self.out / "sparsity.safetensors") as temporary:
            save_file({"sparsity": self.trainer.log_feature_sparsity}, temporary)
        write_json(self.out / "runner_cfg.json", json.loads(json.dumps(self.config.to_dict(), default=str)))
        staging = self.out / ".final"
        self.sae.save_inference_model(staging)
        os.replace(staging / "cfg.json", self.out / "cfg.json")
        os.replace(staging / "sae_weights.safetensors", self.out / "sae_weights.safetensors")
        shutil.rmtree(staging)
        shutil.rmtree(self.out / "checkpoints", ignore_errors=True)


@contextlib.contextmanager
def _signals(run: _Run) -> Iterator[None]:
    """Let SIGINT and SIGTERM finish the step and save, then stop; only in the main thread, and restored afterwards."""
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask_to_stop(_number: int, _frame: Any) -> None:
        run.interrupted = True

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return `run.json` of a training folder, or an empty dict for an SAE that was not trained here."""
    file = Path(folder) / "run.json"
    return read_json(file) if file.is_file() else {}
