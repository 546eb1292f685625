"""SAELens' own TopK architectures with K-annealing: `annealed_topk` and so on, each saved as what it is a twin of.

A twin has one field more, `k_anneal_steps`: the first steps, in which k falls to the config's (`sparse.annealed_k`). The
number of a step comes with every step, so any SAELens trainer anneals.
"""

from __future__ import annotations

from dataclasses import make_dataclass
from typing import Any

from sae_lens import register_sae_training_class
from sae_lens.saes.abstopk_sae import AbsTopKSAEConfig, AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

from sae_italian.saes.sparse import set_k

PREFIX = "annealed_"
_BASES = (
    (TopKTrainingSAE, TopKTrainingSAEConfig, TopKSAEConfig),
    (AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig, AbsTopKSAEConfig),
    (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, JumpReLUSAEConfig),
    (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig, JumpReLUSAEConfig),
)


class _Anneals:
    """A training SAE whose activation function has a k."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        set_k(self, step_input)
        return super().training_forward_pass(step_input)  # pyright: ignore[reportAttributeAccessIssue]


def _twin(sae_class: type, config_class: Any, saved_as: type) -> tuple[type, Any]:
    """Return SAE and config class of the annealed twin of one of SAELens' training architectures."""
    name = PREFIX + config_class.architecture()
    methods = {
        "architecture": classmethod(lambda _cls: name),
        "get_inference_config_class": lambda _self: saved_as,
        "__doc__": f"The fields of SAELens' `{config_class.architecture()}`, and the steps in which k falls to its value.",
    }
    fields = [("k_anneal_steps", int, 0)]
    config = make_dataclass(f"Annealed{config_class.__name__}", fields, bases=(config_class,), namespace=methods)
    return type(f"Annealed{sae_class.__name__}", (_Anneals, sae_class), {"__doc__": _Anneals.__doc__}), config


for _sae, _config, _saved_as in _BASES:
    register_sae_training_class(PREFIX + _config.architecture(), *_twin(_sae, _config, _saved_as))
