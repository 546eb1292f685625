"""A transcoder in training: an SAERun that reads at two hooks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_italian.training.config import RunSpec
from sae_italian.training.sae_run import SAERun


class TranscoderRun(SAERun):
    """The trainer takes input and target side by side, [tokens, d_in + d_out], each scaled by its own factor."""

    def __init__(self, spec: RunSpec, model: Any, out: Path):
        from sae_italian.saes.architectures import PairScaler

        super().__init__(spec, model, out)
        self.trainer.activation_scaler = PairScaler(self.sae.cfg.d_in)

    @property
    def hook_names(self) -> tuple[str, ...]:
        return (self.spec.hook_name, str(self.spec.hook_name_out))

    def training_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([batch[name] for name in self.hook_names], dim=-1)

    def _describe(self, metadata: Any, model: Any) -> None:
        super()._describe(metadata, model)
        metadata.hook_name_out = self.spec.hook_name_out


def open_run(spec: RunSpec, model: Any, out: Path) -> SAERun:
    """Return the run of a spec, an SAE's or a transcoder's."""
    return SAERun(spec, model, out) if spec.hook_name_out is None else TranscoderRun(spec, model, out)
