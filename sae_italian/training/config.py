"""One run as a YAML of few keys, and the SAELens config object it stands for.

Keys are SAELens' own words wherever SAELens has the setting. An unknown key is refused with the nearest valid one, and
nothing is read from the environment.
"""

from __future__ import annotations

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from sae_italian.base.errors import UsageError, nearest
from sae_italian.corpora.documents import MICRO_ITALIANO

SITE_PACKAGE_CONFIGS = "configs"
SUITE_KEY = "layers"  # what only a suite's config has
NORM_ESTIMATE_BATCHES = 16  # of the stock runner; ours estimates from its buffer


class RunSpec(BaseModel):
    """Everything that decides the result of one training run. Sizes are in tokens unless said otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """A name of `sae-italian models list`, a hub id, or a local folder."""
    hook_name: str
    """Where activations are read, TransformerLens' name, e.g. `blocks.14.hook_resid_post`."""
    hook_name_out: str | None = None
    """Where a transcoder's target is read, e.g. `blocks.14.hook_mlp_out`; None for an SAE."""
    corpus: str = MICRO_ITALIANO
    """`micro-italiano`, or a local file or folder (txt, jsonl, parquet, csv)."""
    text_column: str = "text"
    repeat_corpus: bool = False
    """Read a corpus again when it has fewer tokens than the training asks for, instead of refusing it."""
    sae: dict[str, Any]
    """`architecture` and the fields of SAELens' training config for it; `d_in` is read from the model."""
    k_anneal_share: float = Field(0.0, ge=0, lt=1)
    """Share of the steps in which k falls linearly from d_in to `sae.k`; 0: k from the start."""
    training_tokens: int = Field(gt=0)
    context_size: int = Field(128, gt=1)
    train_batch_size_tokens: int = Field(2048, gt=0)
    store_batch_size_prompts: int = Field(32, gt=0)
    """Windows in one forward pass of the model."""
    buffer_tokens: int = Field(65_536, gt=0)
    """Size of the shuffling buffer; half of it is replaced at each refill."""
    lr: float = Field(3e-4, gt=0)
    lr_scheduler_name: Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"] = "constant"
    lr_warm_up_steps: int = Field(0, ge=0)
    lr_decay_steps: int = Field(0, ge=0)
    dead_feature_window: int = Field(1000, gt=0)
    """Steps without firing after which a latent counts as dead."""
    seed: int = 42
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    checkpoint_every_tokens: int = Field(1_000_000, gt=0)
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "sae_italian"
    wandb_checkpoints: bool = False
    """Also send each checkpoint's SAE, as versions of one artifact; the finished SAE always goes."""
    seqpos_slice: list[int | None] = [None]
    """Positions of a window that are trained on, as a slice: `[stop]` or `[start, stop, step]`."""
    exclude_special_tokens: bool | list[int] = True
    checkpoint_every_minutes: float = Field(30.0, ge=0)
    """Also after this time since the last one; 0: by tokens alone."""
    evaluate_every_tokens: int = Field(0, ge=0)
    """Judge the SAE on held-out text while training, into `eval/...` of the metrics; 0: never."""
    evaluate_tokens: int = Field(10_000, gt=0)
    evaluate_corpus: str | None = None
    """Where held-out text is read; the corpus itself if not set."""

    @field_validator("sae")
    @classmethod
    def _sae_has_architecture(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "architecture" not in value:
            raise ValueError("needs the key 'architecture', e.g. topk")
        return value

    def sae_config(self) -> Any:
        """Return SAELens' training config of the SAE. Raises UsageError for an unknown architecture or field."""
        from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

        from sae_italian.models import load_model_config, parse_hook_name
        from sae_italian.models.activations import check_context

        architecture = self.sae["architecture"]
        if architecture not in SAE_TRAINING_CLASS_REGISTRY:
            raise UsageError(
                f"sae.architecture {architecture!r} is unknown. {nearest(architecture, SAE_TRAINING_CLASS_REGISTRY)}"
            )
        config_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
        fields = {field.name for field in dataclasses.fields(config_class)} - {"metadata"}
        kinds = get_type_hints(config_class)
        given = {key: value for key, value in self.sae.items() if key != "architecture"}
        for key in given:
            if key not in fields:
                raise UsageError(
                    f"unknown key 'sae.{key}' for architecture {architecture!r}. {nearest(key, sorted(fields))}"
                )
        given = {key: _typed(f"sae.{key}", value, kinds[key]) for key, value in given.items()}
        model_config = load_model_config(self.model)
        check_context(self.context_size, model_config)
        hook = parse_hook_name(self.hook_name, model_config.num_hidden_layers)
        hook.module_path(model_config)
        d_in = model_config.hidden_size
        if given.get("d_in", d_in) != d_in:
            raise UsageError(
                f"sae.d_in is {given['d_in']}, but {self.model} has {d_in} at {self.hook_name}. Remove the key."
            )
        if "d_sae" not in given:
            raise UsageError(f"sae.d_sae is missing: the number of latents, e.g. {16 * d_in}.")
        if "d_out" in fields or self.hook_name_out is not None:
            given |= {"d_out": self._check_target(hook, "d_out" in fields, model_config)}
        k = given.get("k", getattr(config_class, "k", None))
        if self.k_anneal_share and k is None:
            raise UsageError(
                f"k_anneal_share needs an SAE with a k, such as topk; sae.architecture is {architecture!r}."
            )
        if k is not None and not 0 < k < given["d_sae"]:
            raise UsageError(f"sae.k is {k}; it must be above 0 and below sae.d_sae, which is {given['d_sae']}.")
        given |= {"d_in": d_in, "device": self.device, "dtype": given.get("dtype", "float32")}
        return config_class(**given)

    def _check_target(self, hook: Any, transcodes: bool, model_config: Any) -> int:
        """Return the width of a transcoder's target. Raises: UsageError when architecture and hooks do not go together."""
        from sae_italian.models import parse_hook_name

        architecture = self.sae["architecture"]
        if not transcodes:
            raise UsageError(
                f"hook_name_out is set, but sae.architecture {architecture!r} is no transcoder. "
                "Use topk_transcoder or transcoder, or remove hook_name_out."
            )
        if self.hook_name_out is None:
            raise UsageError(
                f"sae.architecture {architecture!r} needs hook_name_out, e.g. blocks.{hook.layer}.hook_mlp_out."
            )
        target = parse_hook_name(self.hook_name_out, model_config.num_hidden_layers)
        if target.layer < hook.layer:
            raise UsageError(f"hook_name_out {target.name!r} comes before hook_name {hook.name!r}. Exchange them.")
        return model_config.hidden_size

    def to_saelens(self) -> Any:
        """Return SAELens' `LanguageModelSAERunnerConfig`, as the stock training runner takes it.

        `dataset_path` names a folder the stock runner can read; MicroItaliano is written to the user's cache for it.
        """
        from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

        from sae_italian.models import resolve

        return LanguageModelSAERunnerConfig(
            sae=self.sae_config(),
            model_name=resolve(self.model).saved_name,
            model_class_name="HookedTransformer",
            hook_name=self.hook_name,
            dataset_path=_stock_dataset(self.corpus),
            is_dataset_tokenized=False,
            context_size=self.context_size,
            training_tokens=self.training_tokens,
            train_batch_size_tokens=self.train_batch_size_tokens,
            store_batch_size_prompts=self.store_batch_size_prompts,
            # SAELens' buffer really holds n_batches_in_buffer * context_size tokens (reference/saelens.md section 5)
            n_batches_in_buffer=max(self.buffer_tokens, 2 * self.train_batch_size_tokens) // self.context_size,
            seqpos_slice=tuple(self.seqpos_slice),
            exclude_special_tokens=self.exclude_special_tokens,
            n_batches_for_norm_estimate=NORM_ESTIMATE_BATCHES,  # SAELens would read 1,000 and throw them away
            lr=self.lr,
            lr_scheduler_name=self.lr_scheduler_name,
            lr_warm_up_steps=self.lr_warm_up_steps,
            lr_decay_steps=self.lr_decay_steps,
            dead_feature_window=self.dead_feature_window,
            seed=self.seed,
            dtype=self.dtype,
            device=self.device,
            checkpoint_path=None,
            output_path=None,
            verbose=False,
            logger=LoggingConfig(log_to_wandb=self.wandb != "off", wandb_project=self.wandb_project),
        )


def _typed(key: str, value: Any, kind: Any) -> Any:
    """Return a value as the type its SAELens field declares. Raises: UsageError, naming key and value."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise UsageError(f"config key {key!r}: {error.errors()[0]['msg']}; got {value!r:.80}.") from error


def load_spec(path: str | Path, *overrides: str) -> RunSpec:
    """Read a YAML and apply `key=value` overrides (`sae.k=64`); values are read as YAML.

    A path that does not exist here is looked up in the configs shipped with the package.
    Raises: UsageError for a missing file (nearest one named), bad YAML, an unknown key or a value of the wrong kind.
    """
    return spec_from_dict(read_values(path, *overrides))


def read_values(path: str | Path, *overrides: str) -> dict[str, Any]:
    """Return what a config says, overrides applied, not yet checked. Raises: UsageError as `load_spec`."""
    file = find_config(path)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{file} must hold `key: value` lines; found {type(values).__name__}.")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UsageError(f"override {override!r} is not of the form key=value, e.g. sae.k=64.")
        target = values
        *parents, last = key.strip().split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UsageError(f"override {override!r}: {parent!r} is a value, not a group of keys.")
        target[last] = yaml.safe_load(text)
    return values


def spec_from_dict(values: dict[str, Any]) -> RunSpec:
    """Return the RunSpec of a plain dict. Raises UsageError as `load_spec`."""
    if SUITE_KEY in values:
        raise UsageError("this config is a suite of several SAEs (it has `layers`): train it with `sae-italian train`.")
    for key in values:
        if key not in RunSpec.model_fields:
            raise UsageError(f"unknown key {key!r} in the config. {nearest(str(key), RunSpec.model_fields)}")
    try:
        return RunSpec(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"config key {where!r}: {first['msg']}; got {first.get('input')!r:.80}.") from error


def load_config(path: str | Path, *overrides: str) -> Any:
    """Return the SAELens runner config of a YAML: `LanguageModelSAETrainingRunner(load_config(path)).run()` trains it.

    Raises: UsageError as `load_spec`, and for a model, hook, architecture or SAE field that does not exist.
    """
    return load_spec(path, *overrides).to_saelens()


def configs_folder() -> Path:
    """Return the shipped configs: inside the installed package, or at the top of a source checkout."""
    package = Path(str(resources.files("sae_italian")))
    installed = package / SITE_PACKAGE_CONFIGS
    return installed if installed.is_dir() else package.parent / SITE_PACKAGE_CONFIGS


def find_config(path: str | Path) -> Path:
    """Return the file itself, or the shipped config of that name (`configs/mini/topk.yaml`, `mini/topk`)."""
    given = Path(path).expanduser()
    if given.is_file():
        return given
    shipped = configs_folder()
    relative = Path(*given.parts[1:]) if given.parts[:1] == (SITE_PACKAGE_CONFIGS,) else given
    for candidate in (shipped / relative, shipped / f"{relative}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(f"configs/{file.relative_to(shipped).as_posix()}" for file in shipped.rglob("*.yaml"))
    raise UsageError(f"config {str(path)!r} does not exist. {nearest(str(path), known)}")


def _stock_dataset(corpus: str, n_documents: int = 20_000) -> str:
    """Return a path that `datasets.load_dataset` reads; MicroItaliano's training split is written once, then reused."""
    if corpus != MICRO_ITALIANO:
        return corpus
    import json
    import os
    from itertools import islice

    from sae_italian import __version__
    from sae_italian.base.storage import write_text
    from sae_italian.corpora import iter_documents

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "sae_italian" / f"{MICRO_ITALIANO}-{__version__}-{n_documents}"
    file = folder / "train.jsonl"
    if not file.is_file():
        rows = (document._asdict() for document in islice(iter_documents(corpus, "train"), n_documents))
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(folder)
