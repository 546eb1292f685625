"""One run as a YAML of few keys, and the SAELens config object it stands for.

Keys are SAELens' own words wherever SAELens has the setting. An unknown key is refused with the nearest valid one, and
nothing is read from the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.storage import RUN_FILE, read_json, write_text
from sae_italian.corpora.documents import MICRO_ITALIANO

CONFIGS = "configs"
SUITE_KEY = "layers"  # what only a suite's config has
NORM_ESTIMATE_BATCHES = 16  # of the stock runner; ours estimates from its buffer


class RunSpec(BaseModel):
    """Everything that decides the result of one training run, and how it is watched. Each field is a key of the YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """A name of `sae-italian models list`, a hub id, or a local folder."""
    hook_name: str
    """Where activations are read, TransformerLens' name, e.g. `blocks.14.hook_resid_post`."""
    hook_name_out: str | None = None
    """Where a transcoder's target is read, e.g. `blocks.14.hook_mlp_out`; None for an SAE."""
    corpus: str = MICRO_ITALIANO
    """`micro-italiano`, a name of `corpora list`, or a local file or folder (txt, jsonl, parquet, csv)."""
    text_column: str = "text"
    """Column of the corpus that holds the text."""
    repeat_corpus: bool = False
    """Read a corpus again when it has fewer tokens than the training asks for, instead of refusing it."""
    sae: dict[str, Any]
    """`architecture` and the fields of SAELens' training config for it; `d_in` is read from the model."""
    k_anneal_share: float = Field(0.0, ge=0, lt=1)
    """Share of the steps in which k falls linearly from d_in to `sae.k`; 0: k from the start."""
    training_tokens: int = Field(gt=0)
    """Tokens whose activations are trained on."""
    context_size: int = Field(128, gt=1)
    """Tokens of a window of text."""
    train_batch_size_tokens: int = Field(2048, gt=0)
    """Tokens of one training step."""
    store_batch_size_prompts: int = Field(32, gt=0)
    """Windows in one forward pass of the model."""
    buffer_tokens: int = Field(65_536, gt=0)
    """Tokens in the shuffling buffer; half of it is replaced at each refill."""
    lr: float = Field(3e-4, gt=0)
    """Adam's learning rate."""
    lr_scheduler_name: Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"] = "constant"
    """SAELens' name of how the learning rate goes between warm-up and decay."""
    lr_warm_up_steps: int = Field(0, ge=0)
    """Steps in which the learning rate grows from 0, at the start."""
    lr_decay_steps: int = Field(0, ge=0)
    """Steps in which the learning rate falls to 0, at the end."""
    dead_feature_window: int = Field(1000, gt=0)
    """Steps without firing after which a latent counts as dead."""
    seed: int = 42
    """Seed of the weights at the start and of the order of the batches."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model and its activations; the SAE is float32 unless `sae.dtype` says otherwise."""
    device: str = "cpu"
    """Where model and SAE are: cpu, cuda or cuda:N."""
    checkpoint_every_tokens: int = Field(1_000_000, gt=0)
    """Tokens between two saved states."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Whether metrics go to Weights & Biases; online without a login becomes offline."""
    wandb_project: str = "sae_italian"
    """Project of W&B."""
    wandb_checkpoints: bool = False
    """Also send each checkpoint's SAE, as versions of one artifact; the finished SAE always goes."""
    seqpos_slice: list[int | None] = [None]
    """Positions of a window that are trained on, as a slice: `[stop]` or `[start, stop, step]`."""
    exclude_special_tokens: bool | list[int] = True
    """Leave special tokens out: all of the tokenizer's, none, or these ids."""
    checkpoint_every_minutes: float = Field(30.0, ge=0)
    """Also save after this many minutes since the last state; 0: by tokens alone."""
    evaluate_every_tokens: int = Field(0, ge=0)
    """Tokens between two evaluations on held-out text, which go into `eval/...` of the metrics; 0: none."""
    evaluate_tokens: int = Field(10_000, gt=0)
    """Held-out tokens of one evaluation."""
    evaluate_corpus: str | None = None
    """Where held-out text is read; the corpus itself if not set."""

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The hooks that are read: one, or a transcoder's input and target."""
        return (self.hook_name,) if self.hook_name_out is None else (self.hook_name, self.hook_name_out)

    @property
    def n_steps(self) -> int:
        return self.training_tokens // self.train_batch_size_tokens

    def sae_config(self) -> Any:
        """Return SAELens' training config of the SAE.

        Raises: UsageError for an architecture, field, value, hook or width that does not exist or does not fit.
        """
        from sae_italian.models import load_model_config, parse_hook_name
        from sae_italian.models.activations import check_context

        config_class, given = self._sae_fields()
        model_config = load_model_config(self.model)
        check_context(self.context_size, model_config)
        d_in = model_config.hidden_size
        if given.get("d_in", d_in) != d_in:
            raise UsageError(
                f"sae.d_in is {given['d_in']}, but {self.model} has {d_in} at {self.hook_name}. Remove the key."
            )
        if "d_sae" not in given:
            raise UsageError(f"sae.d_sae is missing: the number of latents, e.g. {16 * d_in}.")
        k = given.get("k", getattr(config_class, "k", None))
        if k is not None and not 0 < k < given["d_sae"]:
            raise UsageError(f"sae.k is {k}; it must be above 0 and below sae.d_sae, which is {given['d_sae']}.")
        first, *target = (parse_hook_name(name, model_config.num_hidden_layers) for name in self.hook_names)
        first.module_path(model_config)
        if target and target[0].layer < first.layer:
            raise UsageError(f"hook_name_out {target[0].name!r} comes before hook_name {first.name!r}. Exchange them.")
        architecture, transcodes = self.sae["architecture"], "d_out" in config_class.__dataclass_fields__
        if target and not transcodes:
            raise UsageError(
                f"hook_name_out is set, but sae.architecture {architecture!r} is no transcoder. "
                "Use topk_transcoder or transcoder, or remove hook_name_out."
            )
        if transcodes and not target:
            raise UsageError(
                f"sae.architecture {architecture!r} needs hook_name_out, e.g. blocks.{first.layer}.hook_mlp_out."
            )
        widths = {"d_in": d_in, "d_out": d_in} if transcodes else {"d_in": d_in}
        return config_class(**{"dtype": "float32"} | given | widths | {"device": self.device})

    def _sae_fields(self) -> tuple[Any, dict[str, Any]]:
        """Return SAELens' config class and its fields as `sae` gives them, of the types the class declares."""
        from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY as KNOWN

        given = dict(self.sae)
        architecture = given.pop("architecture", None)
        if architecture not in KNOWN:
            raise UsageError(f"sae.architecture {architecture!r} is unknown. {nearest(str(architecture), KNOWN)}")
        # SAELens' own architectures anneal as their twins; ours have the field themselves
        twin = f"annealed_{architecture}" if self.k_anneal_share else architecture
        config_class = KNOWN.get(twin, KNOWN[architecture])[1]
        kinds = get_type_hints(config_class)
        valid = sorted(field.name for field in dataclasses.fields(config_class) if field.name != "metadata")
        for key, value in given.items():
            if key not in valid:
                raise UsageError(f"unknown key 'sae.{key}' for architecture {architecture!r}. {nearest(key, valid)}")
            try:
                given[key] = TypeAdapter(kinds[key]).validate_python(value)
            except ValidationError as error:
                raise first_refusal(error, f"sae.{key}", value) from error
        if self.k_anneal_share:
            if "k_anneal_steps" not in valid:
                raise UsageError(
                    f"k_anneal_share needs an SAE with a k, such as topk; sae.architecture is {architecture!r}."
                )
            given["k_anneal_steps"] = round(self.k_anneal_share * self.n_steps)
        return config_class, given

    def to_saelens(self) -> Any:
        """Return SAELens' `LanguageModelSAERunnerConfig` of this run. Raises: UsageError as `sae_config`."""
        from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

        from sae_italian.models import resolve

        theirs = LanguageModelSAERunnerConfig.__dataclass_fields__
        same = {name: getattr(self, name) for name in type(self).model_fields if name in theirs}
        ours = {
            "sae": self.sae_config(),
            "seqpos_slice": tuple(self.seqpos_slice),
            "model_name": resolve(self.model).saved_name,
            "model_class_name": "HookedTransformer",
            "dataset_path": self.corpus,
            "is_dataset_tokenized": False,
            # SAELens' buffer really holds n_batches_in_buffer * context_size tokens (reference/saelens.md section 5)
            "n_batches_in_buffer": max(self.buffer_tokens, 2 * self.train_batch_size_tokens) // self.context_size,
            "n_batches_for_norm_estimate": NORM_ESTIMATE_BATCHES,  # SAELens would read 1,000 and throw them away
            "logger": LoggingConfig(log_to_wandb=self.wandb != "off", wandb_project=self.wandb_project),
        }
        return LanguageModelSAERunnerConfig(**same | ours, checkpoint_path=None, output_path=None, verbose=False)


def first_refusal(error: ValidationError, key: str = "", value: Any = None) -> UsageError:
    """Return pydantic's first complaint as one line that names the key and what was given."""
    first = error.errors()[0]
    where = key or ".".join(str(part) for part in first["loc"])
    return UsageError(f"config key {where!r}: {first['msg']}; got {value if key else first.get('input')!r:.80}.")


def load_spec(path: str | Path, *overrides: str) -> RunSpec:
    """Read a YAML and apply `key=value` overrides (`sae.k=64`); values are read as YAML.

    A path that does not exist here is looked up in the configs shipped with the package.
    Raises: UsageError for a missing file (nearest one named), bad YAML, an unknown key or a value of the wrong kind.
    """
    return spec_from_dict(read_values(path, *overrides))


def read_values(path: str | Path, *overrides: str) -> dict[str, Any]:
    """Return what a config says, overrides applied, not yet checked; of a training's folder, what it was started with.

    Raises: UsageError as `load_spec`.
    """
    run = Path(path).expanduser() / RUN_FILE
    if run.is_file():
        values = dict(read_json(run).get("spec") or {})
        values |= values.pop("settings", {})  # a suite's
    else:
        file = find_config(path)
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UsageError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise UsageError(f"{file} must hold `key: value` lines; found {type(values).__name__}.")
    for override in overrides:
        _set(values, override)
    return values


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"override {override!r} is not of the form key=value, e.g. sae.k=64.")
    *parents, last = key.strip().split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UsageError(f"override {override!r}: {parent!r} is a value, not a group of keys.")
    values[last] = yaml.safe_load(text)


def spec_from_dict(values: dict[str, Any]) -> RunSpec:
    """Return the RunSpec of a plain dict. Raises UsageError as `load_spec`."""
    if SUITE_KEY in values:
        raise UsageError("this config is a suite of several SAEs (it has `layers`): train it with `sae-italian train`.")
    for key in values:
        if key not in RunSpec.model_fields:
            in_sae = key in (values.get("sae") or {})
            hint = f"Did you mean 'sae.{key}'?" if in_sae else nearest(str(key), RunSpec.model_fields)
            raise UsageError(f"unknown key {key!r} in the config. {hint}")
    try:
        return RunSpec(**values)
    except ValidationError as error:
        raise first_refusal(error) from error


def load_config(path: str | Path, *overrides: str) -> Any:
    """Return the SAELens runner config of a YAML: `LanguageModelSAETrainingRunner(load_config(path)).run()` trains it.

    MicroItaliano, which the stock runner cannot generate, is written to the user's cache for it.
    Raises: UsageError as `load_spec`, for a model, hook, architecture or SAE field that does not exist, and for what the
    stock runner cannot do: a transcoder, another column than `text`.
    """
    spec = load_spec(path, *overrides)
    config = spec.to_saelens()
    for key, stock in (("hook_name_out", None), ("text_column", "text")):
        if getattr(spec, key) != stock:
            raise UsageError(f"SAELens' runner knows no {key} ({getattr(spec, key)!r}); use `sae-italian train`.")
    if spec.corpus == MICRO_ITALIANO:
        config.dataset_path = _written_micro_italiano()
    return config


def configs_folder() -> Path:
    """Return the shipped configs: inside the installed package, or at the top of a source checkout."""
    package = Path(str(resources.files("sae_italian")))
    return package / CONFIGS if (package / CONFIGS).is_dir() else package.parent / CONFIGS


def recipes() -> dict[str, str]:
    """Return what each shipped config is, in one line, by name (`mini/topk`); files of sweeps are none."""
    folder = configs_folder()
    files = [file for file in sorted(folder.rglob("*.yaml")) if file.parent.name != "sweeps"]
    first = {file: file.read_text(encoding="utf-8").split("\n", 1)[0] for file in files}
    return {file.relative_to(folder).with_suffix("").as_posix(): line.lstrip("# ") for file, line in first.items()}


def find_config(path: str | Path) -> Path:
    """Return the file itself, or the shipped config of that name (`configs/mini/topk.yaml`, `mini/topk`).

    Raises: UsageError that names the nearest of all recipes.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return given
    relative = Path(*given.parts[1:]) if given.parts[:1] == (CONFIGS,) else given
    for candidate in (configs_folder() / relative, configs_folder() / f"{relative}.yaml"):
        if candidate.is_file():
            return candidate
    known = recipes()
    wanted = relative.as_posix().removesuffix(".yaml")
    by_word = {word: name for name in known for word in (name.split("/")[-1], name)}
    near = difflib.get_close_matches(wanted, by_word, n=1, cutoff=0.5)
    hint = f"Did you mean {by_word[near[0]]!r}? " if near else ""
    raise UsageError(f"config {str(path)!r} does not exist. {hint}`sae-italian recipes` lists all {len(known)}.")


def _written_micro_italiano(n_documents: int = 20_000) -> str:
    """Return a folder of MicroItaliano's training documents that `datasets` reads; it is written once, then reused."""
    from sae_italian import __version__
    from sae_italian.corpora import iter_documents

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "sae_italian" / f"{MICRO_ITALIANO}-{__version__}-{n_documents}"
    if not (folder / "train.jsonl").is_file():
        rows = (document._asdict() for document in islice(iter_documents(MICRO_ITALIANO, "train"), n_documents))
        write_text(folder / "train.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(folder)
