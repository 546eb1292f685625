"""One SAE in training: SAELens' trainer, and what is written about it into a folder of its own."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import Estimate
from sae_italian.base.storage import atomic_path, read_json, write_json
from sae_italian.models import parse_hook_name
from sae_italian.saes.sparse import tune
from sae_italian.training.annealing import annealed_k, set_k
from sae_italian.training.checkpoint import Metrics
from sae_italian.training.config import RunSpec
from sae_italian.training.logging import RunLog
from sae_italian.training.stream import ActivationStream

DIVERGED = 10.0  # times the loss at the start, and times the variance of the activations
LOSS_KEYS = ("losses/mse_loss", "losses/overall_loss")

_FROM_CONFIG = (
    "model_name",
    "hook_name",
    "hook_head_index",
    "context_size",
    "seqpos_slice",
    "prepend_bos",
    "exclude_special_tokens",
    "sequence_separator_token",
    "disable_concat_sequences",
)


class SAERun:
    """An SAE, its trainer and its folder `out`. Who drives it hands it batches of its `hook_names` and says when to log.

    For another kind of SAE override `hook_names` and `training_batch` (a transcoder reads at two hooks).
    """

    def __init__(self, spec: RunSpec, model: Any, out: Path):
        from sae_lens import SAETrainer, TrainingSAE

        self.spec, self.out = spec, out
        self.config = spec.to_saelens()
        torch.manual_seed(spec.seed)
        self.sae: Any = TrainingSAE.from_dict(self.config.get_training_sae_cfg_dict())
        self._describe(self.sae.cfg.metadata, model)
        self.sae.to(spec.device)
        trainer = SAETrainer(cfg=_without_wandb(self.config), sae=self.sae, data_provider=iter(()))
        self.trainer: Any = tune(trainer)
        self.metrics = Metrics(out / "metrics.jsonl")
        self.log = RunLog()  # W&B, when asked for
        self.output: Any = None  # of the last step
        self.start_loss = math.nan

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The hooks whose activations `step` wants."""
        return (self.spec.hook_name,)

    @property
    def n_tokens(self) -> int:
        return self.trainer.n_training_samples

    @property
    def n_steps(self) -> int:
        """Steps done."""
        return self.trainer.n_training_steps

    def training_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the trainer takes, of the activations [tokens, d_in] by hook name."""
        return batch[self.spec.hook_name]

    def _describe(self, metadata: Any, model: Any) -> None:
        """Write what SAELens' own runner writes, truthfully for a Hugging Face model."""
        for field in _FROM_CONFIG:
            setattr(metadata, field, getattr(self.config, field))
        metadata.model_class_name = "HookedTransformer"  # what SAELens' tools load to run this SAE on the hook name
        metadata.model_from_pretrained_kwargs = {}
        metadata.dataset_path = self.spec.corpus
        metadata.harvested_from = "hf"
        metadata.model_revision = getattr(model, "loaded_from", {}).get("revision")
        metadata.hf_hook_name = parse_hook_name(self.config.hook_name).module_path(model.config)

    def prepare(self, stream: ActivationStream) -> None:
        """Estimate the input scale from the stream's first buffer, which costs neither a token nor a forward pass."""
        scaler, normalize = self.trainer.activation_scaler, self.sae.cfg.normalize_activations
        if scaler.scaling_factor is not None or scaler.whitening is not None:
            return
        rows = iter([self.training_batch({name: stream.sample(name) for name in self.hook_names})])
        if normalize == "expected_average_only_in":
            scaler.estimate_scaling_factor(self.sae.cfg.d_in, rows, 1)
        elif normalize == "covariance_whitening":
            scaler.estimate_whitening(self.sae.cfg.d_in, rows, 1)

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """Take one training step. It counts as done at once: log it as step `n_steps` - 1."""
        self.trainer.maybe_reset_sparsity()
        self.anneal()
        self.output = self.trainer.step(self.training_batch(batch))
        self.trainer.n_training_steps += 1

    def anneal(self) -> None:
        """Set how many latents may fire in the step to come."""
        spec, cfg = self.spec, self.sae.cfg
        if spec.k_anneal_share:
            n_steps = spec.training_tokens // spec.train_batch_size_tokens
            start = min(cfg.d_in, cfg.d_sae)
            set_k(self.sae, annealed_k(self.n_steps, n_steps, spec.k_anneal_share, start, cfg.k))

    def record(self) -> dict[str, Any]:
        """Write the last step's metrics and return them. Raises: UsageError when the training has diverged."""
        row = self.row()
        self.metrics.append(self.n_steps - 1, row)
        self.log(row, self.n_steps - 1)
        return row

    def row(self) -> dict[str, Any]:
        """Return the last step's metrics, in SAELens' names. Raises: UsageError when the training has diverged."""
        row = self.trainer.build_train_step_log_dict(self.output, self.n_tokens)
        loss = next(row[key] for key in LOSS_KEYS if key in row)
        if math.isnan(self.start_loss):
            self.start_loss = loss
        unexplained = 1 - row["metrics/explained_variance"]
        if not all(math.isfinite(row[key]) for key in LOSS_KEYS if key in row):
            raise self._diverged(f"the loss became {row['losses/overall_loss']}")
        if loss > DIVERGED * self.start_loss and unexplained > DIVERGED:
            raise self._diverged(f"the loss grew from {self.start_loss:.3g} to {loss:.3g}")
        return row

    def check(self) -> None:
        """Raise UsageError when the state is not worth keeping: the loss has exploded, or a weight is not finite."""
        self.row()
        for name, weight in self.sae.named_parameters():
            if not torch.isfinite(weight).all():
                raise self._diverged(f"{name} is no longer finite")

    def _diverged(self, what: str) -> UsageError:
        return UsageError(
            f"{what} at step {self.n_steps - 1}: the training has diverged. Lower lr (now {self.spec.lr})."
        )

    def evaluate(self, model: Any) -> None:
        """Judge the SAE as it would be saved now, on held-out text, and write the card's means as `eval/...`."""
        from sae_italian.evaluation.evaluate import evaluate

        spec = self.spec
        card = evaluate(
            self.inference_sae(),
            model,
            spec.evaluate_corpus or spec.corpus,
            n_tokens=spec.evaluate_tokens,
            context_size=spec.context_size,
            text_column=spec.text_column,
        )
        values = {name: value.value for name, value in vars(card).items() if isinstance(value, Estimate)}
        row = {f"eval/{name}": value for name, value in values.items() if math.isfinite(value)}  # the rest not measured
        self.metrics.append(self.n_steps - 1, row)
        self.log(row, self.n_steps - 1)

    def inference_sae(self) -> Any:
        """Return a copy of the SAE as `finish` would save it, input scale folded."""
        from sae_lens import SAE

        sae = SAE.from_dict(self.sae.cfg.get_inference_sae_cfg_dict())
        weights = {name: value.detach().clone() for name, value in self.sae.state_dict().items()}
        self.sae.process_state_dict_for_saving_inference(weights)
        sae.process_state_dict_for_loading(weights)
        sae.load_state_dict(weights)
        _fold(sae, self.trainer.activation_scaler)
        return sae.to(self.spec.device).eval()

    def save(self, folder: Path) -> None:
        """Write the whole state of this SAE's training into a new folder."""
        self.trainer.save_checkpoint(checkpoint_name=folder.name, base_path=folder.parent)
        write_json(folder / "run_state.json", {"start_loss": self.start_loss})

    def load(self, folder: Path) -> None:
        """Continue from a saved state."""
        self.sae.load_weights_from_checkpoint(folder)
        self.trainer.load_trainer_state(folder)
        self.start_loss = read_json(folder / "run_state.json")["start_loss"]

    def finish(self) -> None:
        """Fold the input scale and write the SAE in SAELens' format. The weights come last."""
        from safetensors.torch import save_file

        _fold(self.sae, self.trainer.activation_scaler)
        self.trainer.activation_scaler.scaling_factor = self.trainer.activation_scaler.whitening = None
        self.trainer.set_final_sae_metadata()
        with atomic_path(self.out / "sparsity.safetensors") as temporary:
            save_file({"sparsity": self.trainer.log_feature_sparsity}, temporary)
        write_json(self.out / "runner_cfg.json", json.loads(json.dumps(self.config.to_dict(), default=str)))
        staging = self.out / ".final"
        self.sae.save_inference_model(staging)
        os.replace(staging / "cfg.json", self.out / "cfg.json")
        os.replace(staging / "sae_weights.safetensors", self.out / "sae_weights.safetensors")
        shutil.rmtree(staging)


def _without_wandb(config: Any) -> Any:
    """Return the trainer's config; W&B is told by our log, else SAELens uploads every checkpoint to whatever run is open."""
    trainer_config = config.to_sae_trainer_config()
    trainer_config.logger = replace(trainer_config.logger, log_to_wandb=False)
    return trainer_config


def _fold(sae: Any, scaler: Any) -> None:
    """Put the input scale into the weights, so the SAE takes raw activations."""
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        whitening = scaler.whitening
        sae.fold_activation_whitening(
            mean=whitening.mean, whitening_matrix=whitening.matrix, unwhitening_matrix=whitening.inverse_matrix
        )
