"""A suite: layers x sites x widths of one model, named as in Llama Scope (`L14R-32x`).

As many SAEs as fit `memory_gb` make a group, which trains on one pass of the model.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sae_italian.base.errors import UsageError, nearest
from sae_italian.models import load_model_config
from sae_italian.models.hooks import SITES, Site, parse_hook_name
from sae_italian.training.config import RunSpec, first_refusal, spec_from_dict
from sae_italian.training.memory import memory_of, memory_text
from sae_italian.training.reading import read_values

# The architecture that trains a transcoder as `sae.architecture` trains an SAE.
TRANSCODES = {"topk": "topk_transcoder", "sparse_topk": "topk_transcoder", "standard": "transcoder"}


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

    @property
    def on_gpu(self) -> bool:
        return str(self.settings.get("device", "cpu")).startswith("cuda")

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
            spec = self._member(layer, site, expansion, config.hidden_size)
            try:
                parse_hook_name(spec.hook_name, config.num_hidden_layers).module_path(config)
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from error
            made[name] = spec
        return made

    def _member(self, layer: int, site: Site, expansion: float, d_in: int) -> RunSpec:
        start = {"decoder_init_norm": (2 / expansion) ** 0.5}
        sae = {**start, **self.settings["sae"], "d_sae": round(expansion * d_in)}
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
                        f"{name} alone needs {memory_text(alone)}, more than memory_gb {self.memory_gb:g}. "
                        "Raise memory_gb, or lower expansions, train_batch_size_tokens or buffer_tokens."
                    )
                groups.append({})
            groups[-1][name] = spec
        return groups


def load_suite(path: str | Path, *overrides: str) -> SuiteSpec:
    """Return the suite of a YAML, `key=value` overrides applied. Raises: UsageError as `load_spec`."""
    return suite_from_dict(read_values(path, *overrides))


def suite_from_dict(values: dict[str, Any]) -> SuiteSpec:
    """Return the suite of a plain dict. Raises: UsageError for an unknown key or a value of the wrong kind."""
    keys = set(SuiteSpec.model_fields) - {"settings"}
    for key in values:
        if key in ("hook_name", "hook_name_out"):
            raise UsageError(f"{key!r} is not set in a suite: layers and sites say where its SAEs read.")
        if key not in keys and key not in RunSpec.model_fields:
            raise UsageError(f"unknown key {key!r} in the suite. {nearest(key, [*keys, *RunSpec.model_fields])}")
    settings = {key: value for key, value in values.items() if key not in keys}
    spec_from_dict({**settings, "hook_name": "blocks.0.hook_resid_post"})  # a wrong value is named before anything else
    try:
        return SuiteSpec(**{key: value for key, value in values.items() if key in keys}, settings=settings)
    except ValidationError as error:
        raise first_refusal(error) from error
