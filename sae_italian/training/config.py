"""One run as a YAML of few keys, a recipe or the folder of an earlier run, and the SAELens config object it stands for.

Keys are SAELens' own words wherever SAELens has the setting. An unknown key is refused with the nearest valid one, and
nothing is read from the environment.
"""

from __future__ import annotations

import difflib
import re
from copy import deepcopy
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.constants import DTYPE_MAP
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY as KNOWN

from sae_italian.base.errors import DataError, UsageError, check_known, nearest
from sae_italian.base.hub import WandbRun
from sae_italian.base.labels import read_word, refusal
from sae_italian.base.storage import RUN_FILE, path_of, read_yaml, record_in
from sae_italian.corpora.stream import MICRO_ITALIANO
from sae_italian.models import load_model_config, parse_hook_name, resolve
from sae_italian.models.activations import check_context
from sae_italian.models.loading import device_of

CONFIGS = "configs"
SUITE_KEY = "layers"  # what only a suite's config has
NORM_ESTIMATE_BATCHES = 16  # of the stock runner; ours estimates from its buffer
# Settings of SAELens' runner that decide the result and that our keys do not have: they stay as SAELens has them.
DECIDING = (
    *("hook_head_index", "use_chat_formatting", "resume_from_checkpoint", "prepend_bos"),
    *("disable_concat_sequences", "sequence_separator_token", "feature_sampling_window"),
    *("adam_beta1", "adam_beta2", "lr_end", "n_restart_cycles", "autocast", "autocast_lm"),
)
# SAELens' scales of the input. The first two are one number, which any SAE can take into its weights.
SCALES = ("none", "expected_average_only_in", "covariance_whitening", "layer_norm")
THOUSANDS = {"k": 10**3, "M": 10**6, "B": 10**9}


def whole(given: Any) -> Any:
    """Return `100k`, `1.5M` or `6B` as a number; anything else as it is."""
    match = re.fullmatch("([0-9.]+)([kMB])", given) if isinstance(given, str) else None
    return round(float(match[1]) * THOUSANDS[match[2]]) if match else given


Count = Annotated[int, BeforeValidator(whole), Field(gt=0, lt=2**53)]
CountOrNone = Annotated[int, BeforeValidator(whole), Field(ge=0, lt=2**53)]


class RunSpec(BaseModel):
    """Everything that decides the result of one training run, and how it is watched. Each field is a key of the YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

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
    use_cached_activations: bool = False
    """Train on activations that SAELens' CacheActivationsRunner kept; the corpus is then read for evaluations alone."""
    cached_activations_path: str | None = None
    """Folder of these activations."""
    repeat_corpus: bool = False
    """Read a corpus again when it has fewer tokens than the training asks for, instead of refusing it."""
    sae: dict[str, Annotated[Any, BeforeValidator(whole)]]
    """`architecture` and the fields of SAELens' training config for it; `d_in` is read from the model. `start`, where b_dec
    starts, is `mean` unless it says `zero`."""
    from_pretrained_path: str | None = None
    """A folder or `release:sae_id`, in any format that is read, whose weights the training starts from; `sae.start` is then
    of no account. Model, hooks and shapes must be the same."""
    k_anneal_share: float = Field(0.0, ge=0, lt=1)
    """Share of the steps in which k falls linearly from d_in to `sae.k`; 0: k from the start."""
    training_tokens: Count
    """Tokens whose activations are trained on."""
    context_size: Annotated[Count, Field(gt=1)] = 128
    """Tokens of a window of text."""
    train_batch_size_tokens: Count = 2048
    """Tokens of one training step."""
    store_batch_size_prompts: Count = 32
    """Windows in one forward pass of the model."""
    buffer_tokens: Count = 65_536
    """Tokens in the shuffling buffer; half of it is replaced at each refill."""
    lr: float = Field(3e-4, gt=0)
    """Adam's learning rate."""
    lr_scheduler_name: Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"] = "constant"
    """SAELens' name of how the learning rate goes between warm-up and decay."""
    lr_warm_up_steps: CountOrNone = 0
    """Steps in which the learning rate grows from 0, at the start."""
    lr_decay_steps: CountOrNone = 0
    """Steps in which the learning rate falls to 0, at the end."""
    dead_feature_window: Count = 1000
    """Steps without firing after which a latent counts as dead."""
    seed: int = Field(42, ge=0, lt=2**63)
    """Seed of the weights at the start and of the order of the batches."""
    seeds: int = Field(1, ge=1, le=64)
    """Trainings with other weights at the start (seed, seed + 1, ...) on the same batches; the others lie in `seeds/`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model and its activations; the SAE is float32 unless `sae.dtype` says otherwise."""
    device: Annotated[str, AfterValidator(lambda name: device_of(name) if name == "auto" else name)] = Field(
        "auto", validate_default=True
    )
    """Where model and SAE are: cpu, cuda, cuda:N, mps, or auto: cuda where it is here, else cpu."""
    checkpoint_every_tokens: Count = 1_000_000
    """Tokens between two saved states."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Whether metrics go to Weights & Biases; online without a login becomes offline."""
    wandb_project: str = Field(WandbRun().project, pattern=r"^([^/\\#?%:]+/)?[^/\\#?%:]+$")
    """Project of W&B, or `entity/project`."""
    wandb_checkpoints: bool = False
    """Also send each checkpoint's SAE, as versions of one artifact; the finished SAE always goes."""
    seqpos_slice: list[int | None] = [None]
    """Positions of a window that are trained on, as a slice: `[stop]` or `[start, stop, step]`."""
    exclude_special_tokens: bool | list[int] = True
    """Leave special tokens out: all of the tokenizer's, none, or these ids."""
    checkpoint_every_minutes: float = Field(30.0, ge=0)
    """Also save after this many minutes since the last state; 0: by tokens alone."""
    process_timeout_seconds: float = Field(600.0, gt=0)
    """Seconds without a sign of another process after which it counts as lost, where several train one SAE."""
    shard_latents: bool = False
    """Give each of several processes a part of the latents, where no device holds all: `sparse_topk` alone."""
    evaluate_every_tokens: CountOrNone = 0
    """Tokens between two evaluations on held-out text, which go into `eval/...` of the metrics; 0: none."""
    evaluate_tokens: Count = 10_000
    """Held-out tokens of one evaluation."""
    evaluate_corpus: str | None = None
    """Where held-out text is read; the corpus itself if not set."""

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The hooks that are read: one, or a transcoder's input and target."""
        return (self.hook_name,) if self.hook_name_out is None else (self.hook_name, self.hook_name_out)

    def sae_config(self) -> Any:
        """Return SAELens' training config of the SAE.

        Raises: UsageError for an architecture, field, value, hook or width that does not exist or does not fit.
        """
        config_class, given = self._sae_fields()
        model_config = load_model_config(self.model)
        check_context(self.context_size, model_config)
        d_in, k = model_config.hidden_size, given.get("k", getattr(config_class, "k", None))
        if "d_sae" not in given:
            raise UsageError(f"sae.d_sae is missing: the number of latents, e.g. {16 * d_in}.")
        if k is not None and not 0 < k < given["d_sae"]:
            raise UsageError(f"sae.k is {k}; it must be above 0 and below sae.d_sae, which is {given['d_sae']}.")
        transcodes = "d_out" in config_class.__dataclass_fields__
        self._check_hooks(model_config, transcodes)
        widths = {"d_in": d_in, "d_out": d_in} if transcodes else {"d_in": d_in}
        for key in widths:
            if given.get(key, d_in) != d_in:
                raise UsageError(f"sae.{key} is {given[key]}, but {self.model} has {d_in}. Remove the key.")
        unsaid = [] if "matryoshka_widths" in config_class.__dataclass_fields__ else [1]
        nested = given.get("matryoshka_widths", unsaid)
        if not nested or nested != sorted(width for width in {*nested} if 0 < width <= given["d_sae"]):
            raise UsageError(f"sae.matryoshka_widths is {nested}; numbers that rise to sae.d_sae were expected.")
        try:
            return config_class(**{"dtype": "float32"} | given | widths | {"device": self.device})
        except ValueError as error:  # of SAELens' own checks
            raise UsageError(f"sae: {' '.join(str(error).split())}") from error

    def _sae_fields(self) -> tuple[Any, dict[str, Any]]:
        """Return SAELens' config class and its fields as `sae` gives them, of the types the class declares."""
        given = dict(self.sae)
        name = given.pop("architecture", None)
        check_known("sae.architecture", KNOWN, name)
        config_class = self._config_class(name, given)
        valid = sorted({field.name for field in fields(config_class)} - {"metadata", "device"})
        # our tied SAE and transcoders know no other; with the auxiliary loss no token has its own scale
        n_scales = 2 if name == "tied" or "d_out" in valid else 3 if "aux_loss_coefficient" in valid else 4
        # SAELens' gated SAE multiplies the activations, in the model's dtype, by its weights
        half = name != "gated" or self.dtype != "float32"
        dtypes = tuple(each for each in DTYPE_MAP if half or "16" not in each)
        ours = {"reshape_activations": Literal["none"], "normalize_activations": Literal[SCALES[:n_scales]]}
        above_zero = Annotated[float, Field(gt=0)]
        ours |= {"d_sae": Count, "dtype": Literal[dtypes], "jumprelu_bandwidth": above_zero}
        kinds: dict[str, Any] = get_type_hints(config_class) | ours
        for key, value in given.items():
            if key not in valid:
                raise UsageError(f"unknown key 'sae.{key}' for architecture {name!r}. {nearest(key, valid)}")
            try:
                given[key] = TypeAdapter(kinds[key], config=ConfigDict(allow_inf_nan=False)).validate_python(value)
            except ValidationError as error:
                raise refusal(error, f"config key 'sae.{key}'") from error
        if self.k_anneal_share:
            if not {"k", "k_anneal_steps"} <= set(valid):
                raise UsageError(f"k_anneal_share needs an SAE with a k, such as topk; sae.architecture is {name!r}.")
            given["k_anneal_steps"] = round(
                self.k_anneal_share * (self.training_tokens // self.train_batch_size_tokens)
            )
        return config_class, given

    def _config_class(self, architecture: str, given: dict[str, Any]) -> Any:
        """Return the config class, and put the start into `given`: where nothing is said, the mean of the first batch.

        SAELens' own architectures start elsewhere than at zero, and anneal, as their twins `started_...`; ours have the
        fields themselves. What has no `start`, such as the tied SAE without b_dec, is as it is.
        """
        plain: Any = KNOWN[architecture][1]
        twin = KNOWN.get(f"started_{architecture}", (None, None))[1]
        started = twin or plain
        if "start" not in started.__dataclass_fields__:
            return plain
        if self.from_pretrained_path is not None:
            given["start"] = "zero"  # b_dec is the origin's
        if given.get("start") == "zero" and twin is not None and not self.k_anneal_share:
            del given["start"]
            return plain
        given.setdefault("start", "mean")
        return started

    def _check_hooks(self, model_config: Any, transcodes: bool) -> None:
        """Refuse hooks that the model does not have, or that do not go with the architecture."""
        first, *target = (parse_hook_name(name, model_config.num_hidden_layers) for name in self.hook_names)
        first.module_path(model_config)
        if target and target[0].layer < first.layer:
            raise UsageError(f"hook_name_out {target[0].name!r} comes before hook_name {first.name!r}. Exchange them.")
        if bool(target) != transcodes:
            raise UsageError(
                f"sae.architecture {self.sae['architecture']!r} does not go with hook_name_out {self.hook_name_out!r}: "
                f"topk_transcoder and transcoder need one, e.g. blocks.{first.layer}.hook_mlp_out; an SAE has none."
            )

    def to_saelens(self) -> Any:
        """Return SAELens' `LanguageModelSAERunnerConfig` of this run. Raises: UsageError as `sae_config`."""
        theirs = LanguageModelSAERunnerConfig.__dataclass_fields__
        same = {name: getattr(self, name) for name in type(self).model_fields if name in theirs}
        entity, _, project = self.wandb_project.rpartition("/")
        ours = {
            "sae": self.sae_config(),
            "seqpos_slice": tuple(self.seqpos_slice),
            "model_name": resolve(self.model).saved_name,
            "model_class_name": "HookedTransformer",
            "dataset_path": self.corpus,
            "is_dataset_tokenized": False,
            # SAELens' buffer really holds n_batches_in_buffer * context_size tokens (reference/saelens.md section 5)
            "n_batches_in_buffer": max(self.buffer_tokens, 2 * self.train_batch_size_tokens) // self.context_size,
            "n_batches_for_norm_estimate": NORM_ESTIMATE_BATCHES,  # SAELens would waste 1,000
            "logger": LoggingConfig(self.wandb != "off", wandb_project=project, wandb_entity=entity or None),
        }
        if self.dtype != "float32":  # SAELens loads its models in float32 whatever `dtype` is
            ours["model_from_pretrained_kwargs"] = {"center_writing_weights": False, "dtype": self.dtype}
        try:
            return LanguageModelSAERunnerConfig(**same | ours, checkpoint_path=None, output_path=None, verbose=False)
        except (ValueError, TypeError) as error:
            raise UsageError(f"SAELens refuses the config: {' '.join(str(error).split())}") from error

    @classmethod
    def from_saelens(cls, config: Any) -> RunSpec:
        """Return the run that SAELens' runner config describes.

        Raises: UsageError, naming it, for a setting that decides the result and that our training does not have.
        """
        sae = {key: value for key, value in config.sae.to_dict().items() if key not in ("metadata", "device", "d_in")}
        if f"started_{sae['architecture']}" in KNOWN:
            sae["start"] = "zero"  # where SAELens' own start; here the mean is the default
        values: dict[str, Any] = {
            **{name: getattr(config, name) for name in cls.model_fields if hasattr(config, name)},
            "sae": sae,
            "model": config.model_name,
            "corpus": config.dataset_path,
            "seqpos_slice": list(config.seqpos_slice),
            "buffer_tokens": config.n_batches_in_buffer * config.context_size,
            "wandb": "online" if config.logger.log_to_wandb else "off",
            "wandb_project": "/".join(filter(None, (config.logger.wandb_entity, config.logger.wandb_project))),
        }
        spec = spec_from_dict(values)
        ours = spec.to_saelens()
        for name in DECIDING:
            if getattr(config, name) != getattr(ours, name):
                raise UsageError(
                    f"{name} is {getattr(config, name)!r}; training here has it at {getattr(ours, name)!r} alone. "
                    "Set it to that, or train with SAELens' runner."
                )
        return spec


def spec_from_dict(values: dict[str, Any]) -> RunSpec:
    """Return the RunSpec of a plain dict. Raises UsageError as `load_spec`."""
    if SUITE_KEY in values:
        raise UsageError("this config is a suite of several SAEs (it has `layers`): train it with `sae-italian train`.")
    for key in values:
        if key not in RunSpec.model_fields:
            sae = values.get("sae")
            in_sae = key in ("d_sae", "k", "architecture") or isinstance(sae, dict) and key in sae
            hint = f"Did you mean 'sae.{key}'?" if in_sae else nearest(str(key), RunSpec.model_fields)
            raise UsageError(f"unknown key {key!r} in the config. {hint}")
    try:
        return RunSpec(**values)
    except ValidationError as error:
        raise refusal(error) from error


# --- reading ----------------------------------------------------------------------------------------------------------


def load_spec(path: str | Path | dict[str, Any], *overrides: str) -> RunSpec:
    """Read a YAML, or take a dict, and apply `key=value` overrides (`sae.k=64`); values are read as YAML.

    A path that does not exist here is looked up in the configs shipped with the package.
    Raises: UsageError for a missing file (nearest one named), bad YAML, an unknown key or a value of the wrong kind.
    """
    return spec_from_dict(read_values(path, *overrides))


def read_values(path: str | Path | dict[str, Any], *overrides: str) -> dict[str, Any]:
    """Return what a config says, overrides applied, not yet checked; of a training's folder, what it was started with.

    Raises: UsageError as `load_spec`.
    """
    if isinstance(path, dict):
        values = deepcopy(path)
    elif (run := path_of(path) / RUN_FILE).is_file():
        values = record_in(run.parent, "train", "suite").get("spec", {})
        settings = values.pop("settings", {})  # a suite's
        if not values or not isinstance(settings, dict):
            raise DataError(f"{run} does not say what was trained. Name a training's folder, or the config itself.")
        values |= settings
    else:
        file = find_config(path)
        values = read_yaml(file)
        if not isinstance(values, dict):
            raise UsageError(f"{file} must hold `key: value` lines; found {type(values).__name__}.")
    for override in overrides:
        if not isinstance(override, str):
            raise UsageError(f"{override!r:.80} is no text of the form key=value; give several as *words.")
        key, value = read_word(override)
        *parents, last = key.split(".")
        group = values
        for parent in parents:
            group = group.setdefault(parent, {})
            if not isinstance(group, dict):
                raise UsageError(f"{override!r:.80}: {parent!r} is a value, not a group of keys.")
        group[last] = value
    return values


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
    given = path_of(path)
    if given.is_file():
        return given
    relative = Path(*given.parts[1:]) if given.parts[:1] == (CONFIGS,) else given
    for candidate in (configs_folder() / relative, configs_folder() / f"{relative}.yaml"):
        if candidate.is_file():
            return candidate
    known = recipes()
    by_word = {word: name for name in known for word in (name.split("/")[-1], name)}
    near = difflib.get_close_matches(relative.as_posix().removesuffix(".yaml"), by_word, n=1, cutoff=0.5)
    hint = f"Did you mean {by_word[near[0]]!r}? " if near else ""
    raise UsageError(f"config {str(path)!r} does not exist. {hint}`sae-italian recipes` lists all {len(known)}.")
