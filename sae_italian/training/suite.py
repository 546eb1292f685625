"""A suite: layers x sites x widths of one model, named as in Llama Scope (`L14R-32x`), several SAEs from one model pass.

As many SAEs as fit `memory_gb` make a group, which trains on one pass of the model. A group is a unit of work of its own:
`train_group` needs the suite, the group's number and the folder, all of which pickle, and resumes by itself.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.storage import claim_folder
from sae_italian.models import load_model, load_model_config
from sae_italian.models.hooks import SITES, Site, parse_hook_name
from sae_italian.training.checkpoint import Checkpoints
from sae_italian.training.config import RunSpec, read_values, spec_from_dict
from sae_italian.training.logging import open_logger
from sae_italian.training.loop import Loop
from sae_italian.training.memory import memory_of
from sae_italian.training.run import check_length, check_run, identity, open_stream
from sae_italian.training.transcoder_run import open_run

KIND = "suite"
WEIGHTS = "sae_weights.safetensors"
# The architecture that trains a transcoder as `sae.architecture` trains an SAE.
TRANSCODES = {"topk": "topk_transcoder", "sparse_topk": "topk_transcoder", "standard": "transcoder"}


class SuiteSpec(BaseModel):
    """Every SAE of a suite. `settings` are the other keys of a run, the same for all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: list[int] | Literal["all"]
    sites: list[Site] = Field(["R"], min_length=1)
    """R the residual stream after the block, A attention output, M MLP output, TC transcoder from MLP input to output."""
    expansions: list[float] = Field(min_length=1)
    """Latents per dimension; `sae.decoder_init_norm` is sqrt(2 / expansion), as in Llama Scope, unless it is given."""
    memory_gb: float = Field(gt=0)
    """What one group may take: its SAEs, their optimisers, the model and the shuffling buffer (10^9 bytes)."""
    settings: dict[str, Any]

    @property
    def on_gpu(self) -> bool:
        return str(self.settings.get("device", "cpu")).startswith("cuda")

    def members(self) -> dict[str, RunSpec]:
        """Return the run of each SAE by name, those that share activations side by side.

        Raises: UsageError for a name that comes twice, a layer or site the model lacks, and as `spec_from_dict`.
        """
        config = load_model_config(self.settings["model"])
        layers = list(range(config.num_hidden_layers)) if self.layers == "all" else self.layers
        made: dict[str, RunSpec] = {}
        for layer in layers:
            for site in self.sites:
                for expansion in self.expansions:
                    name = f"L{layer}{site}-{expansion:g}x"
                    if name in made:
                        raise UsageError(f"{name} comes twice in the suite. {self._twice()}")
                    made[name] = self._member(name, layer, site, expansion, config)
        return made

    def _twice(self) -> str:
        for key in ("layers", "sites", "expansions"):
            for value, n in Counter(getattr(self, key)).items():
                if n > 1:
                    return f"{key} holds {value} {n} times: remove one."
        return "Two expansions have the same name: remove one."

    def _member(self, name: str, layer: int, site: Site, expansion: float, config: Any) -> RunSpec:
        d_sae = round(expansion * config.hidden_size)
        sae = {"decoder_init_norm": (2 / expansion) ** 0.5, **self.settings["sae"], "d_sae": d_sae}
        values = {**self.settings, "sae": sae, "hook_name": f"blocks.{layer}.{SITES[site]}"}
        if site == "TC":
            architecture = TRANSCODES.get(sae["architecture"])
            if architecture is None:
                raise UsageError(
                    f"site TC: no transcoder is trained with sae.architecture {sae['architecture']!r}. "
                    f"Use one of {', '.join(TRANSCODES)}, or leave TC out."
                )
            sae |= {"architecture": architecture}
            values |= {"hook_name_out": f"blocks.{layer}.{SITES['M']}"}
        try:
            parse_hook_name(values["hook_name"], config.num_hidden_layers).module_path(config)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        return spec_from_dict(values)

    def groups(self) -> list[list[str]]:
        """Return the names of each group's SAEs, in order, as many to a group as fit the memory.

        Raises: UsageError, naming it and what it needs, for an SAE that does not fit alone.
        """
        members, groups, current = self.members(), [], []
        for name in members:
            together = memory_of([members[other] for other in [*current, name]])
            if together.total_gb > self.memory_gb:
                alone = memory_of([members[name]])
                if alone.total_gb > self.memory_gb:
                    raise UsageError(
                        f"{name} alone needs {alone.text()}, more than memory_gb {self.memory_gb:g}. "
                        "Raise memory_gb, or lower expansions, train_batch_size_tokens or buffer_tokens."
                    )
                groups.append(current)
                current = []
            current.append(name)
        return [*groups, current]


def load_suite(path: str | Path, *overrides: str) -> SuiteSpec:
    """Return the suite of a YAML, `key=value` overrides applied. Raises: UsageError as `load_spec`."""
    return suite_from_dict(read_values(path, *overrides))


def suite_from_dict(values: dict[str, Any]) -> SuiteSpec:
    """Return the suite of a plain dict. Raises: UsageError for an unknown key or a value of the wrong kind."""
    keys = set(SuiteSpec.model_fields) - {"settings"}
    ours = ("hook_name", "hook_name_out")
    for key in values:
        if key in ours:
            raise UsageError(f"{key!r} is not set in a suite: layers and sites say where its SAEs read.")
        if key not in keys and key not in RunSpec.model_fields:
            raise UsageError(f"unknown key {key!r} in the suite. {nearest(key, [*keys, *RunSpec.model_fields])}")
    settings = {key: value for key, value in values.items() if key not in keys}
    for key in ("model", "sae"):
        if key not in settings:
            raise UsageError(f"the suite lacks the key {key!r}.")
    for given in values.get("sites") or ():
        if given not in get_args(Site):
            raise UsageError(f"site {given!r} is unknown. {nearest(str(given), get_args(Site))}")
    spec_from_dict({**settings, "hook_name": "blocks.0.hook_resid_post"})  # a wrong value is named before anything else
    try:
        return SuiteSpec(**{key: value for key, value in values.items() if key in keys}, settings=settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"config key {where!r}: {first['msg']}; got {first.get('input')!r:.80}.") from error


def train_suite(
    suite: SuiteSpec,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    run_units: Callable[..., Iterator[list[Path]]] = map,
) -> list[Path]:
    """Train every group of a suite into `out/<name>` and return these folders.

    `run_units` maps the groups: one after the other here, or elsewhere (`base.units.map_units` with an engine). With
    `resume`, finished groups are left alone and the one that was stopped goes on.
    Raises: UsageError as `train`, and for a suite that does not fit its memory; KeyboardInterrupt after a signal.
    """
    out, groups = Path(out), suite.groups()
    check_run(next(iter(suite.members().values())))
    claim_folder(out, KIND, suite.model_dump(mode="json"), resume=resume, overwrite=overwrite)
    trained = run_units(partial(_train_index, suite, out), range(len(groups)))
    return [folder for folders in trained for folder in folders]


def _train_index(suite: SuiteSpec, out: Path, index: int) -> list[Path]:
    return train_group(suite, index, out)


def train_group(suite: SuiteSpec, group_index: int, out: str | Path) -> list[Path]:
    """Train one group on one pass of the model and return its SAEs' folders; goes on where it was stopped.

    Raises: UsageError as `train`; KeyboardInterrupt after a signal, once the state is saved.
    """
    out, names = Path(out), suite.groups()[group_index]
    members = suite.members()
    specs = {name: members[name] for name in names}
    folders = [out / name for name in names]
    state = out / f"group-{group_index:03}"
    checkpoints = Checkpoints(state, {name: identity(spec) for name, spec in specs.items()})
    if all((folder / WEIGHTS).is_file() for folder in folders):
        checkpoints.clear()
        _remove_empty(state)
        return folders
    first = next(iter(specs.values()))
    model = load_model(first.model, dtype=first.dtype, device=first.device)
    check_length(first, model.tokenizer)
    for name, spec in specs.items():
        claim_folder(out / name, "train", spec.model_dump(mode="json"), resume=True)
    runs = {name: open_run(spec, model, out / name) for name, spec in specs.items()}
    hook_names = [hook for run in runs.values() for hook in run.hook_names]
    loop = Loop(runs, open_stream(first, model, hook_names), checkpoints)
    loop.resume()
    with _loggers(runs):
        loop.fit()
        loop.finish()
        for run in runs.values():
            run.log.finish(run.out, model, loop.stream.windows.state())
    _remove_empty(state)
    return folders


@contextlib.contextmanager
def _loggers(runs: dict[str, Any]) -> Iterator[None]:
    """Give each run the rows' other place, if its spec asks for one."""
    with contextlib.ExitStack() as stack:
        for run in runs.values():
            run.log = stack.enter_context(open_logger(run.spec, run.config, run.out))
        yield


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
