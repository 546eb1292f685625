"""Read a run's settings: a YAML of the user's, a recipe that comes with the package, or the folder of an earlier run."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import RUN_FILE, read_json, read_yaml
from sae_italian.base.words import read_word
from sae_italian.training.config import RunSpec, spec_from_dict
from sae_italian.training.text import written_for_saelens

CONFIGS = "configs"


def load_spec(path: str | Path, *overrides: str) -> RunSpec:
    """Read a YAML and apply `key=value` overrides (`sae.k=64`); values are read as YAML.

    A path that does not exist here is looked up in the configs shipped with the package.
    Raises: UsageError for a missing file (nearest one named), bad YAML, an unknown key or a value of the wrong kind.
    """
    return spec_from_dict(read_values(path, *overrides))


def load_config(path: str | Path, *overrides: str) -> Any:
    """Return the SAELens runner config of a YAML: `LanguageModelSAETrainingRunner(load_config(path)).run()` trains it.

    The runner reads no held-out split, no column but `text` and no MicroItaliano: so the training documents are written,
    as far as the training reads, to the user's cache, which `dataset_path` names. It has no seed: SAELens draws anew.
    Raises: UsageError as `load_spec`, for a model, hook, architecture or SAE field that does not exist, and for what
    cannot be carried: a transcoder, a pretokenised corpus, one that is too short or too large to be written.
    """
    spec = load_spec(path, *overrides)
    config = spec.to_saelens()
    if spec.hook_name_out is not None:
        raise UsageError(f"SAELens' runner knows no hook_name_out ({spec.hook_name_out!r}); use `sae-italian train`.")
    config.dataset_path = str(written_for_saelens(spec))
    return config


def read_values(path: str | Path, *overrides: str) -> dict[str, Any]:
    """Return what a config says, overrides applied, not yet checked; of a training's folder, what it was started with.

    Raises: UsageError as `load_spec`.
    """
    run = Path(path).expanduser() / RUN_FILE
    if run.is_file():
        record = read_json(run)
        values = record.get("spec") if isinstance(record, dict) else None
        if not isinstance(values, dict) or not isinstance(settings := values.pop("settings", {}), dict):
            raise DataError(f"{run} does not say what was trained. Name the config itself.")
        values |= settings  # a suite's
    else:
        file = find_config(path)
        values = read_yaml(file)
        if not isinstance(values, dict):
            raise UsageError(f"{file} must hold `key: value` lines; found {type(values).__name__}.")
    for override in overrides:
        _set(values, override)
    return values


def _set(values: dict[str, Any], override: str) -> None:
    key, value = read_word(override)
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UsageError(f"{override!r:.80}: {parent!r} is a value, not a group of keys.")
    values[last] = value


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
    by_word = {word: name for name in known for word in (name.split("/")[-1], name)}
    near = difflib.get_close_matches(relative.as_posix().removesuffix(".yaml"), by_word, n=1, cutoff=0.5)
    hint = f"Did you mean {by_word[near[0]]!r}? " if near else ""
    raise UsageError(f"config {str(path)!r} does not exist. {hint}`sae-italian recipes` lists all {len(known)}.")
