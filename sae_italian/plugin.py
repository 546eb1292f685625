"""Everything that touches another library's tables, in one place.

TransformerLens resolves model names through two module-level objects (`OFFICIAL_MODEL_NAMES`, `MODEL_ALIASES`), SAELens
its releases through a cached dict and its loaders through another; none has a public call to extend it. So entries are
added to these objects in place; nothing is rebound or replaced, and a name they already know is never taken over.
Importing these libraries costs seconds, so each registration waits until somebody imports the library.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODEL_TABLES = "transformer_lens.supported_models"
_REGISTERED_MODULES = [f"sae_italian.saes.{name}" for name in ("tied", "topk", "transcoder_training", "transcoders")]
_HAVE_RUN: set[str] = set()  # those of them that were imported to the end


class _Aliases(list):
    """A list of aliases that is asked `in` without regard to case: TransformerBridge compares them as typed."""

    def __contains__(self, name: object) -> bool:
        return any(str(name).lower() == alias.lower() for alias in self)


def register_model(official: str, aliases: Sequence[str]) -> None:
    """Add one model name and its aliases to TransformerLens' tables; calling it again changes nothing.

    Raises: ValueError when an alias already means another model there.
    """
    tables = importlib.import_module(_MODEL_TABLES)
    names: list[str] = tables.OFFICIAL_MODEL_NAMES
    known: dict[str, list[str]] = tables.MODEL_ALIASES
    owners = {name.lower(): name for name in names}
    owners |= {alias.lower(): name for name, its in known.items() for alias in its}
    for alias in aliases:
        owner = owners.get(alias.lower(), official)
        if owner != official:
            raise ValueError(f"alias {alias!r} already means {owner!r} in TransformerLens; it was not taken over")
    if official not in names:
        names.append(official)
    current = known.setdefault(official, _Aliases())
    current += [alias for alias in aliases if alias not in current]


def unregister_model(official: str) -> None:
    """Take back a name that `register_model` added; aliases of a name TransformerLens ships are left alone."""
    tables = importlib.import_module(_MODEL_TABLES)
    if isinstance(tables.MODEL_ALIASES.get(official), _Aliases):
        del tables.MODEL_ALIASES[official]
        tables.OFFICIAL_MODEL_NAMES.remove(official)


def register_all() -> None:
    """Register every model of the catalogue with TransformerLens."""
    from sae_italian.models.catalogue import catalogue

    for entry in catalogue().values():
        register_model(entry.official, entry.aliases)


def register_releases() -> None:
    """Add our loaders and releases to SAELens' tables, so that `SAE.from_pretrained` knows them; idempotent.

    While one of our own modules is being imported (it was what imported SAELens) nothing happens; its last line calls
    `has_run`. Raises: ValueError when SAELens already has a release or loader of that name that is not ours.
    """
    if any(map(_is_being_imported, _REGISTERED_MODULES)):
        return
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup, get_pretrained_saes_directory
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    from sae_italian.saes.releases import CONFIG_GETTERS, LOADERS, releases
    from sae_italian.saes.tied import TIED, TiedTrainingSAE, TiedTrainingSAEConfig
    from sae_italian.saes.topk import SPARSE_TOPK, SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
    from sae_italian.saes.transcoder_training import TRAINED_TRANSCODERS
    from sae_italian.saes.transcoders import TOPK_TRANSCODER, TopKTranscoder, TopKTranscoderConfig

    _add("SAE architecture", SAE_CLASS_REGISTRY, {TOPK_TRANSCODER: (TopKTranscoder, TopKTranscoderConfig)})
    trained = {SPARSE_TOPK: (SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig)}
    trained |= {TIED: (TiedTrainingSAE, TiedTrainingSAEConfig), **TRAINED_TRANSCODERS}
    _add("training architecture", SAE_TRAINING_CLASS_REGISTRY, trained)
    _add("loader", loaders.NAMED_PRETRAINED_SAE_LOADERS, LOADERS)
    _add("config getter", loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS, CONFIG_GETTERS)
    lookups = {
        release.name: PretrainedSAELookup(
            release=release.name,
            repo_id=release.repo_id,
            model=release.model,
            conversion_func=release.loader,
            saes_map=dict(release.saes),
            expected_var_explained={},
            expected_l0={sae_id: float(release.k) for sae_id in release.saes if release.k},
            neuronpedia_id={},
            norm_scaling_factor={},
            config_overrides=None,
        )
        for release in releases().values()
    }
    _add("release", get_pretrained_saes_directory(), lookups)


def _is_being_imported(name: str) -> bool:
    return name in sys.modules and name not in _HAVE_RUN


def has_run(name: str) -> None:
    """Say that one of our modules whose classes SAELens is told has run to its end."""
    _HAVE_RUN.add(name)
    install()


def _add(what: str, table: dict[str, Any], ours: dict[str, Any]) -> None:
    for name, value in ours.items():
        if table.setdefault(name, value) != value:
            raise ValueError(f"SAELens already has a {what} named {name!r}; it was not replaced")


# What to do once a library's module has been imported.
_WHEN_IMPORTED: dict[str, Callable[[], None]] = {_MODEL_TABLES: register_all, "sae_lens": register_releases}


class _AfterExec(importlib.abc.Loader):
    """The loader of an awaited module, with one call added after the module has run."""

    def __init__(self, loader: importlib.abc.Loader, then: Callable[[], None]):
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        sys.modules[module.__name__] = module
        self.then()

    def __getattr__(self, name: str):
        return getattr(self.loader, name)


class _Waiter(importlib.abc.MetaPathFinder):
    """Waits on `sys.meta_path` for one module, then steps aside."""

    def __init__(self, awaited: str, then: Callable[[], None]):
        self.awaited, self.then = awaited, then

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _AfterExec(spec.loader, self.then)
        return spec


def install() -> None:
    """Register now with each library that is imported, with the others at the moment they will be. Idempotent."""
    for awaited, then in _WHEN_IMPORTED.items():
        if awaited in sys.modules:
            then()
        elif not any(isinstance(finder, _Waiter) and finder.awaited == awaited for finder in sys.meta_path):
            sys.meta_path.insert(0, _Waiter(awaited, then))
