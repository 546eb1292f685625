"""One SAE or transcoder in training: SAELens' trainer, and what is written about it into a folder of its own."""

import contextlib
import copy
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAE
from safetensors.torch import save_file
from torch import Tensor

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import atomic_path, read_json, remove, write_json
from sae_italian.cache import FeatureCache, build_cache
from sae_italian.evaluation import EvaluationCard, evaluate
from sae_italian.models import parse_hook_name
from sae_italian.saes import load_sae
from sae_italian.saes.architectures import PairScaler
from sae_italian.saes.loading import check_hooks, vocabulary_hash
from sae_italian.saes.sparse import tune
from sae_italian.training.config import RunSpec
from sae_italian.training.logging import SAE_FILES, RunLog, latent_rows
from sae_italian.training.pretrained import Origin
from sae_italian.training.processes import ALONE, Processes
from sae_italian.training.shards import assembled, load_part, sharded
from sae_italian.training.stream import ActivationStream

DIVERGED = 10.0  # times the loss at the start, and times the variance of the activations
# The reconstruction's own loss where it is told apart: the sparsity term grows by plan while its coefficient warms up.
LOSS_KEYS = ("losses/mse_loss", "losses/overall_loss")
# What SAELens' own runner writes from its config into the metadata.
METADATA = (
    *("model_name", "model_class_name", "hook_name", "hook_head_index", "dataset_path", "context_size", "seqpos_slice"),
    *("prepend_bos", "exclude_special_tokens", "sequence_separator_token", "disable_concat_sequences"),
)


class Diverged(UsageError):
    """A training whose state is not worth keeping."""


class SAERun:
    """An SAE, its trainer and its folder `out`. Who drives it hands it batches of its hooks and says when to log.

    A transcoder is an SAE that reads at two hooks: its trainer takes input and target side by side, [tokens, d_in + d_out].
    """

    def __init__(self, spec: RunSpec, model: Any, out: Path, processes: Processes = ALONE):
        self.spec, self.out, self.config = spec, out, spec.to_saelens()
        self.processes = processes
        torch.manual_seed(spec.seed)
        place = {"device": "cpu"} if spec.shard_latents else {}  # no device need hold all of it
        self.sae: Any = TrainingSAE.from_dict(self.config.get_training_sae_cfg_dict() | place)
        self._describe(model)
        if spec.shard_latents:
            self.sae = sharded(self.sae, spec.device)
        self.sae.to(spec.device)
        processes.adopt(self.sae)
        config = self.config.to_sae_trainer_config()
        # W&B is told by our log, else SAELens uploads every checkpoint to whatever run is open
        config.logger = replace(config.logger, log_to_wandb=False)
        self.trainer: Any = tune(SAETrainer(cfg=config, sae=self.sae, data_provider=iter(())))
        if spec.hook_name_out is not None:
            self.trainer.activation_scaler = PairScaler(self.sae.cfg.d_in)
        self.whole = self.trainer  # that of the whole SAE, while rank 0 writes (`gather`)
        self.origin = None if spec.from_pretrained_path is None else Origin(spec)
        if self.origin is not None:
            check_hooks(self.origin.sae, model)
        self.log = RunLog(spec, out if processes.first else None)  # to W&B too, once it is opened
        self.output: Any = None  # of the last step
        self.start_loss = math.nan

    @property
    def n_tokens(self) -> int:
        return self.trainer.n_training_samples

    @property
    def n_steps(self) -> int:
        """Steps done."""
        return self.trainer.n_training_steps

    def _describe(self, model: Any) -> None:
        """Write the metadata that SAELens' own runner writes, truthfully for a Hugging Face model."""
        metadata, spec = self.sae.cfg.metadata, self.spec
        for field in METADATA:
            setattr(metadata, field, getattr(self.config, field))
        metadata.model_from_pretrained_kwargs = {}
        metadata.harvested_from = "hf"
        metadata.vocabulary = vocabulary_hash(model.tokenizer)  # read by saes.loading.check_hooks
        metadata.model_revision = getattr(model, "loaded_from", {}).get("revision")
        metadata.hf_hook_name = parse_hook_name(spec.hook_name).module_path(model.config)
        if spec.hook_name_out is not None:
            metadata.hook_name_out = spec.hook_name_out

    def _beside(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the trainer takes, of the activations [tokens, d_in] by hook name."""
        rows = [batch[name] for name in self.spec.hook_names]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)

    def prepare(self, stream: ActivationStream) -> None:
        """Estimate the input scale from the stream's first buffer, which costs neither a token nor a forward pass; then take
        the weights of the SAE that the training starts from, if there is one."""
        self._estimate_scale(stream)
        if self.origin is not None and self.n_steps == 0:
            x, y = (stream.sample(self.spec.hook_names[place]) for place in (0, -1))
            self.origin.start(self.sae, x, y, self.trainer.activation_scaler.scaling_factor)

    def _estimate_scale(self, stream: ActivationStream) -> None:
        scaler, cfg = self.trainer.activation_scaler, self.sae.cfg
        estimates = {"expected_average_only_in": "scaling_factor", "covariance_whitening": "whitening"}
        what = estimates.get(cfg.normalize_activations)
        if what is None or getattr(scaler, what) is not None:
            return
        rows = iter([self._beside({name: stream.sample(name) for name in self.spec.hook_names})])
        with contextlib.redirect_stderr(io.StringIO()):  # SAELens shows a bar of one step
            getattr(scaler, f"estimate_{what}")(cfg.d_in, rows, 1)

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """Take one training step. It counts as done at once: log it as step `n_steps` - 1."""
        self.trainer.maybe_reset_sparsity()
        self.output = self.processes.step(self.trainer, self._beside(batch))
        self.trainer.n_training_steps += 1

    def row(self) -> dict[str, Any]:
        """Return the last step's metrics, in SAELens' names. Raises: Diverged."""
        row = self.processes.row(self.trainer, self.output)
        losses = [row[key] for key in LOSS_KEYS if key in row]
        if math.isnan(self.start_loss):
            self.start_loss = losses[0]
        if not all(map(math.isfinite, losses)):
            raise self._diverged(f"the loss became {row['losses/overall_loss']}")
        if losses[0] > DIVERGED * self.start_loss and 1 - row["metrics/explained_variance"] > DIVERGED:
            raise self._diverged(f"the loss grew from {self.start_loss:.3g} to {losses[0]:.3g}")
        return row

    def record(self) -> dict[str, Any]:
        """Log the last step's metrics and return them. Raises: Diverged."""
        row = self.row()
        self.log(row, self.n_steps - 1)
        return row

    def check(self) -> None:
        """Raise Diverged when the loss has exploded, or a weight is not finite."""
        if self.output is not None:  # None where a run is resumed whose last step was done
            self.row()
        wrong = [name for name, weight in self.sae.named_parameters() if not torch.isfinite(weight).all()]
        if self.processes.any_of(bool(wrong))[0]:
            raise self._diverged(f"{wrong[0] if wrong else 'a weight elsewhere'} is no longer finite")

    def _diverged(self, what: str) -> Diverged:
        return Diverged(f"{what} at step {self.n_steps - 1}: the training has diverged. Lower lr (now {self.spec.lr}).")

    def evaluate(self, model: Any) -> None:
        """Judge the SAE as it would be saved now, and log the card's means as `eval/...`."""
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            self._folded().save_inference_model(folder)
            means = {f"eval/{key}": x.value for key, x in self._judge(folder, model).estimates().items()}
        self.log({key: value for key, value in means.items() if math.isfinite(value)}, self.n_steps - 1)

    def _judge(self, folder: str | Path, model: Any) -> EvaluationCard:
        """Return the evaluation card of the SAE in a folder on the run's held-out text."""
        spec, sae = self.spec, load_sae(folder, device=self.spec.device)
        text = {"context_size": spec.context_size, "text_column": spec.text_column}
        corpus = spec.evaluate_corpus or spec.corpus
        return evaluate(sae, model, corpus, n_tokens=spec.evaluate_tokens, name=self.out.name, **text)

    def tell_finished(self, model: Any, cursor: Mapping[str, Any]) -> None:
        """Tell W&B, if it listens, of the finished SAE, with its card, which is kept in the folder too."""
        if not self.log.wandb_run:
            return
        card, latents = None, []
        try:
            card = self._judge(self.out, model)
            card.save(self.out)
            latents = self._latents(model)
        except UsageError as error:
            sys.stderr.write(f"no evaluation card for W&B: {' '.join(str(error).split())}\n")
        self.log.finish(card, latents, cursor)

    def _latents(self, model: Any) -> list[list[Any]]:
        """Return what W&B shows of the latents, on the text that the card is of."""
        spec, sae = self.spec, load_sae(self.out, device=self.spec.device)
        text: Any = {"split": "heldout", "context_size": spec.context_size, "text_column": spec.text_column}
        text |= {"corpus": spec.evaluate_corpus or spec.corpus, "n_tokens": spec.evaluate_tokens}
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            built = build_cache(sae, model, out=Path(folder) / "cache", **text)
            return latent_rows(FeatureCache.open(built), model.tokenizer)

    def _folded(self) -> Any:
        """Return a copy of the SAE in training with the input scale put into its weights: it takes raw activations."""
        sae, scaler = copy.deepcopy(self.whole.sae), self.trainer.activation_scaler
        if scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        if (white := scaler.whitening) is not None:
            mean, matrix, inverse = (each.to(sae.device) for each in (white.mean, white.matrix, white.inverse_matrix))
            sae.fold_activation_whitening(mean=mean, whitening_matrix=matrix, unwhitening_matrix=inverse)
        return sae

    def gather(self, whole: bool) -> None:
        """Hold at rank 0 the whole of an SAE with sharded latents, to be written, or no longer."""
        self.whole = assembled(self.trainer) if whole else self.trainer

    def save(self, folder: Path) -> None:
        """Write the whole state of this SAE's training into a new folder."""
        self.whole.save_checkpoint(checkpoint_name=folder.name, base_path=folder.parent)
        origin = self.origin and self.origin.record
        write_json(folder / "run_state.json", {"start_loss": self.start_loss, "origin": origin})

    def load(self, folder: Path) -> None:
        """Continue from a saved state."""
        if self.spec.shard_latents:
            load_part(self.trainer, folder)
        else:
            self.sae.load_weights_from_checkpoint(folder)
            self.trainer.load_trainer_state(folder)
        state = read_json(folder / "run_state.json")
        self.start_loss = state["start_loss"]
        if self.origin is not None:
            self.origin.resume(state["origin"])

    def finish(self) -> None:
        """Fold the input scale and write the SAE in SAELens' format, the weights last."""
        self.whole.set_final_sae_metadata()
        if self.origin is not None:
            self.sae.cfg.metadata.started_from = self.origin.finish(self.sae.W_dec, self.out)
        with atomic_path(self.out / "sparsity.safetensors") as temporary:
            save_file({"sparsity": self.whole.log_feature_sparsity}, temporary)
        write_json(self.out / "runner_cfg.json", json.loads(json.dumps(self.config.to_dict(), default=str)))
        staging = self.out / ".final"
        self._folded().save_inference_model(staging)
        for name in SAE_FILES:
            os.replace(staging / name, self.out / name)
        remove(staging)
