"""From a YAML to a trained SAE: SAELens' configs and trainer, our activation stream, suites, publishing."""

from sae_italian.base.storage import record_in as read_run
from sae_italian.training.config import RunSpec, load_spec, read_values, recipes, spec_from_dict
from sae_italian.training.run import train, train_suite
from sae_italian.training.shards import sharded, whole
from sae_italian.training.stream import ActivationStream
from sae_italian.training.suite import SuiteSpec, load_suite, suite_from_dict
from sae_italian.training.text import load_config

__all__ = [
    "ActivationStream",
    "RunSpec",
    "SuiteSpec",
    "load_config",
    "load_spec",
    "load_suite",
    "read_run",
    "read_values",
    "recipes",
    "sharded",
    "spec_from_dict",
    "suite_from_dict",
    "train",
    "train_suite",
    "whole",
]
