"""A suite: layers x sites x widths of one model, named as in Llama Scope (`L14R-32x`), and the memory that trainings take.

As many SAEs as fit `memory_gb` make a group, which trains on one pass of the model. Memory is reckoned from shapes, before
anything is allocated: `train --dry-run` shows it, and what stands out in the activations.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import AutoModelForCausalLM

from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.labels import refusal
from sae_italian.base.report import plain
from sae_italian.corpora.packing import special_mask
from sae_italian.evaluation.card import Outliers, outliers_of
from sae_italian.models import load_model, load_model_config, load_tokenizer
from sae_italian.models.activations import read_many
from sae_italian.models.hooks import SITES, Site
from sae_italian.training.config import RunSpec, read_values, spec_from_dict
from sae_italian.training.shards import FLOAT, traffic
from sae_italian.training.text import WindowBlocks, check_length, training_documents

# The architecture that trains a transcoder as `sae.architecture` trains an SAE.
TRANSCODES = {"topk": "topk_transcoder", "sparse_topk": "topk_transcoder", "standard": "transcoder"}
GB = 1e9
COPIES = 4  # of the weights: themselves, the gradient, Adam's two averages
SPARSE = ("sparse_topk", "topk_transcoder")
DEVICE_GB = (24, 80)  # of the devices a dry run plans for
LOOKED_AT = 2048  # tokens whose activations a dry run reads
# [batch, d_sae] matrices that are alive at once: pre-activations, activations, and their gradients and masks.
DENSE_MATRICES, SPARSE_MATRICES = 6, 1


class SuiteSpec(BaseModel):
    """Every SAE of a suite. `settings` are the other keys of a run, the same for all."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    layers: list[int] | Literal["all"]
    """Numbers of layers, from 0, or all."""
    sites: list[Site] = Field(["R"], min_length=1)
    """R the residual stream after the block, A attention output, M MLP output, TC transcoder from MLP input to output."""
    expansions: list[Annotated[float, Field(gt=0, lt=1e6)]] = Field(min_length=1)
    """Latents per dimension; `sae.decoder_init_norm` is sqrt(2 / expansion), as in Llama Scope, unless it is given."""
    memory_gb: float = Field(gt=0)
    """What one group may take: its SAEs, their optimisers, the model and the shuffling buffer (10^9 bytes)."""
    settings: dict[str, Any]
    """The other keys of `RunSpec`."""

    def members(self) -> dict[str, RunSpec]:
        """Return the run of each SAE by name, those that share activations side by side.

        Raises: UsageError for a name that comes twice, a layer or site the model lacks, and as `spec_from_dict`.
        """
        config: Any = load_model_config(self.settings["model"])
        layers = list(range(config.num_hidden_layers)) if self.layers == "all" else self.layers
        made: dict[str, RunSpec] = {}
        for layer, site, expansion in product(layers, self.sites, self.expansions):
            name = f"L{layer}{site}-{expansion:g}x"
            if name in made:
                raise UsageError(f"{name} comes twice in the suite. Name each layer, site and expansion once.")
            made[name] = self._member(layer, site, expansion, config.hidden_size)
        for name, spec in made.items():
            try:
                spec.sae_config()
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from error
        return made

    def _member(self, layer: int, site: Site, expansion: float, d_in: int) -> RunSpec:
        sae = {"decoder_init_norm": (2 / expansion) ** 0.5, **self.settings["sae"], "d_sae": round(expansion * d_in)}
        values = {**self.settings, "sae": sae, "hook_name": f"blocks.{layer}.{SITES[site]}"}
        if site == "TC":
            if sae.get("architecture") not in TRANSCODES:
                raise UsageError(
                    f"site TC: no transcoder is trained with sae.architecture {sae.get('architecture')!r}. "
                    f"Use one of {', '.join(TRANSCODES)}, or leave TC out."
                )
            sae["architecture"] = TRANSCODES[sae["architecture"]]
            values["hook_name_out"] = f"blocks.{layer}.{SITES['M']}"
        return spec_from_dict(values)

    def groups(self) -> list[dict[str, RunSpec]]:
        """Return the runs of each group by name, in order, as many to a group as fit the memory.

        Raises: UsageError, naming it and what it needs, for an SAE that does not fit alone.
        """
        groups: list[dict[str, RunSpec]] = [{}]
        for name, spec in self.members().items():
            if sum(memory_of([*groups[-1].values(), spec]).values()) > self.memory_gb:
                alone = memory_of([spec])
                if sum(alone.values()) > self.memory_gb:
                    raise UsageError(
                        f"{name} alone needs {_memory_text(alone)}, more than memory_gb {self.memory_gb:g}. "
                        "Raise memory_gb, or lower expansions, train_batch_size_tokens or buffer_tokens."
                    )
                groups.append({})
            groups[-1][name] = spec
        return groups


def load_suite(path: str | Path | dict[str, Any], *overrides: str) -> SuiteSpec:
    """Return the suite of a YAML, `key=value` overrides applied. Raises: UsageError as `load_spec`."""
    return suite_from_dict(read_values(path, *overrides))


def suite_from_dict(values: dict[str, Any]) -> SuiteSpec:
    """Return the suite of a plain dict. Raises: UsageError for an unknown key or a value of the wrong kind."""
    keys = set(SuiteSpec.model_fields) - {"settings"}
    for key in values:
        if key in ("hook_name", "hook_name_out", "from_pretrained_path"):
            raise UsageError(f"{key!r} is not set in a suite: layers and sites say where its SAEs read.")
        if key not in keys and key not in RunSpec.model_fields:
            raise UsageError(f"unknown key {key!r} in the suite. {nearest(key, [*keys, *RunSpec.model_fields])}")
    settings = {key: value for key, value in values.items() if key not in keys}
    spec_from_dict({**settings, "hook_name": "blocks.0.hook_resid_post"})  # a wrong value is named before anything else
    try:
        return SuiteSpec(**{key: value for key, value in values.items() if key in keys}, settings=settings)
    except ValidationError as error:
        raise refusal(error) from error


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_of(specs: Sequence[RunSpec]) -> dict[str, float]:
    """Return what training these SAEs on one pass of their model takes, in 10^9 bytes by what they hold.

    SAEs are trained one after the other, so `step` is that of the largest. Each must have passed `RunSpec.sae_config`.
    """
    first, saes, steps = specs[0], 0, []
    model: Any = load_model_config(first.model)
    both = 2 * model.hidden_size  # what goes in and what comes out
    for spec in specs:
        d_sae, architecture = spec.sae["d_sae"], spec.sae["architecture"]
        matrices = SPARSE_MATRICES if architecture in SPARSE else DENSE_MATRICES
        saes += COPIES * FLOAT * d_sae * (both + 1)
        steps.append(FLOAT * spec.train_batch_size_tokens * (matrices * d_sae + 4 * both))
    width = 2 if first.dtype == "bfloat16" else 4
    hidden = getattr(model, "intermediate_size", None) or 4 * model.hidden_size
    hooks = {hook for spec in specs for hook in spec.hook_names}
    forward = first.store_batch_size_prompts * first.context_size * (6 * model.hidden_size + 3 * hidden)
    return {
        "saes_gb": saes / GB,
        "step_gb": max(steps) / GB,
        "model_gb": width * n_parameters(first.model) / GB,
        "forward_gb": width * forward / GB,
        "buffer_gb": width * len(hooks) * first.buffer_tokens * model.hidden_size / GB,
    }


def layout_on(device_gb: float, spec: RunSpec, memory: dict[str, float]) -> dict[str, Any]:
    """Return how one SAE is trained on several devices of that size: replicas, or its latents sharded over so many.

    A replica takes all of `memory` on each device, whatever their number; sharded latents (`shards.py`) take their part of
    `saes` and `step`, and all of the rest.
    """
    sae, total = spec.sae_config(), sum(memory.values())
    shared = memory["saes_gb"] + memory["step_gb"]
    parts = ((2**i, total - shared + shared / 2**i) for i in range(9) if sae.d_sae % 2**i == 0)
    n, part = next(((n, part) for n, part in parts if part <= device_gb), (0, total))
    found: dict[str, Any] = {"layout": None}
    if n == 1:
        found = {"layout": "replicas", "devices": n, "memory_gb": part, "megabytes_a_step": 0.0}
        text = f"replicas, {total:.2f} GB on each"
    elif n and spec.sae["architecture"] == "sparse_topk":
        sent = sum(traffic(spec.train_batch_size_tokens, sae.d_in, sae.k, n, dead=True).values()) / 1e6
        found = {"layout": "sharded", "devices": n, "memory_gb": part, "megabytes_a_step": sent}
        how = f"shard_latents=true --processes {n}"
        text = f"latents sharded over {n} ({how}), {part:.2f} GB and {sent:.0f} MB a step on each"
    else:
        text = f"too large{', and only sparse_topk can be sharded' if n else ' even sharded'}"
    return found | {"device_gb": device_gb, "text": f"devices of {device_gb} GB: {text}"}


def _memory_text(memory: dict[str, float]) -> str:
    """Return `1.25 GB (saes 0.50, step 0.25, ...)`."""
    parts = ", ".join(f"{name.removesuffix('_gb')} {value:.2f}" for name, value in memory.items())
    return f"{sum(memory.values()):.2f} GB ({parts})"


@cache
def n_parameters(model: str) -> int:
    """Return how many parameters a model has, without loading any. Raises: UsageError as `load_model_config`."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_model_config(model)).num_parameters()


def plan(groups: Sequence[Mapping[str, RunSpec]], limit_gb: float | None = None) -> tuple[dict[str, Any], str]:
    """Return what training these groups takes, each on one pass of the model and of the text, as JSON and as text.

    Raises: UsageError as `check_length`.
    """
    first = next(iter(groups[0].values()))
    n_tokens, length = first.training_tokens, check_length(first, load_tokenizer(first.model))
    rows, lines = [], [f"{n_tokens:,} tokens to train on; {length}"]
    for number, group in enumerate(groups):
        specs = list(group.values())
        memory = memory_of(specs)
        total = {"memory": memory, "memory_gb": sum(memory.values())}
        total["devices"] = [layout_on(size, specs[0], memory) for size in DEVICE_GB]
        rows.append({"names": list(group), "tokens": n_tokens, **total})
        lines += [f"group {number}: SAEs {len(group)}, memory {_memory_text(memory)}", f"  {' '.join(group)}"]
    lines += [device["text"] for row in rows for device in row["devices"]] if len(rows) == 1 and len(group) == 1 else []
    limit = "" if limit_gb is None else f" of {limit_gb:g} GB given"
    largest = max(row["memory_gb"] for row in rows)
    lines.append(f"SAEs {sum(map(len, groups))}, groups {len(groups)}; largest group {largest:.2f} GB{limit}")
    hooks = dict.fromkeys(hook for group in groups for spec in group.values() for hook in spec.hook_names)
    try:
        found = look_at(first, list(hooks))
    except UsageError as error:
        found = {}
        lines.append(f"activations were not looked at: {error}")
    lines += [f"activations at {hook}: {outliers.text()}" for hook, outliers in found.items()]
    result = {"groups": rows, "memory_gb": limit_gb, "corpus": length, "activations": plain(found)}
    return result, "\n".join(lines)


def look_at(spec: RunSpec, hook_names: list[str]) -> dict[str, Outliers]:
    """Return what stands out at some hooks in the first windows of the training text.

    Raises: UsageError when the model's weights would have to be fetched first, or its device is not here.
    """
    if spec.use_cached_activations:
        raise UsageError("they are read from a folder.")
    model = load_model(spec.model, dtype=spec.dtype, device=spec.device, fetch=False)
    n_windows = max(1, LOOKED_AT // spec.context_size)
    windows = next(WindowBlocks(training_documents(spec), model.tokenizer, spec.context_size, n_windows))
    tokens = torch.from_numpy(windows).to(model.device)
    keep = torch.from_numpy(~special_mask(windows, model.tokenizer)).to(model.device)
    acts = read_many(model, tokens, hook_names)
    return {name: outliers_of(acts[name], tokens, keep, model.tokenizer) for name in hook_names}
