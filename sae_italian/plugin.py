"""Everything that touches another library's tables, in one place.

TransformerLens resolves model names through two module-level objects (`OFFICIAL_MODEL_NAMES`, `MODEL_ALIASES`), SAELens
its releases through a cached dict and its loaders through another; none has a public call to extend it. So entries are
added to these objects in place; nothing is rebound or replaced, and a name they already know is never taken over.
(Architectures SAELens registers by a public call, which the modules of `saes` make in their last lines.)

Importing these libraries costs seconds, so each registration waits until somebody imports the library.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

_MODEL_TABLES = "transformer_lens.supported_models"


class _Aliases(list):
    """A list of aliases that is asked `in` without regard to case: TransformerBridge compares them as typed."""

    def __contains__(self, name: object) -> bool:
        return any(str(name).lower() == alias.lower() for alias in self)


def register_model(official: str, aliases: Sequence[str]) -> None:
    """Add one model name and its aliases to TransformerLens' tables; calling it again changes nothing.

    Raises: ValueError when an alias already means another model there.
    """
    tables = import_module(_MODEL_TABLES)
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
    tables = import_module(_MODEL_TABLES)
    if isinstance(tables.MODEL_ALIASES.get(official), _Aliases):
        del tables.MODEL_ALIASES[official]
        tables.OFFICIAL_MODEL_NAMES.remove(official)


def register_models() -> None:
    """Register every model of the catalogue with TransformerLens."""
    from sae_italian.models.catalogue import catalogue

    for entry in catalogue().values():
        register_model(entry.official, entry.aliases)


def register_saes() -> None:
    """Register our architectures, loaders and releases with SAELens, so that its own calls know them; idempotent.

    Raises: ValueError when SAELens already has a release or loader of that name that is not ours.
    """
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup, get_pretrained_saes_directory

    from sae_italian.saes.releases import CONFIG_GETTERS, LOADERS, releases

    # One of these may be what imported SAELens: it is then only half there, and registers itself when it is whole.
    for module in ("architectures", "annealing", "tied"):
        import_module(f"sae_italian.saes.{module}")
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


def _add(what: str, table: dict[str, Any], ours: dict[str, Any]) -> None:
    for name, value in ours.items():
        if table.setdefault(name, value) != value:
            raise ValueError(f"SAELens already has a {what} named {name!r}; it was not replaced")


# What to do once a library's module has been imported.
_WHEN_IMPORTED: dict[str, Callable[[], None]] = {_MODEL_TABLES: register_models, "sae_lens": register_saes}


class _Door(MetaPathFinder):
    """Stands first on `sys.meta_path` and lets the awaited modules in as others find them, then registers with them."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        then = _WHEN_IMPORTED.get(fullname)
        if then is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)  # pyright: ignore
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                then()

            spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Register with each library that is imported, and with the others at the moment they will be. Idempotent."""
    for awaited, then in _WHEN_IMPORTED.items():
        if awaited in sys.modules:
            then()
    if not any(isinstance(finder, _Door) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Door())
