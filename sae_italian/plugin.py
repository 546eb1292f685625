"""Everything that touches another library's tables, in one place.

TransformerLens resolves model names through two module-level objects (`OFFICIAL_MODEL_NAMES`, `MODEL_ALIASES`) and has
no public call to extend them, so names are added to these objects in place; nothing is rebound or replaced, and a name
that TransformerLens already knows is never taken over. Importing TransformerLens costs seconds, so registration waits
until somebody imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLES = "transformer_lens.supported_models"


def register_model(official: str, aliases: Sequence[str]) -> None:
    """Add one model name and its aliases to TransformerLens' tables; calling it again changes nothing.

    Raises: ValueError when an alias already means another model there.
    """
    tables = importlib.import_module(_TABLES)
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
    current = known.setdefault(official, [])
    current += [alias for alias in aliases if alias not in current]


def register_all() -> None:
    """Register every model of the catalogue."""
    from sae_italian.models.catalogue import catalogue

    for entry in catalogue().values():
        register_model(entry.official, entry.aliases)


class _AfterExec(importlib.abc.Loader):
    """The loader of the awaited module, with one call added after the module has run."""

    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        sys.modules[_TABLES] = module
        register_all()

    def __getattr__(self, name: str):
        return getattr(self.loader, name)


class _Waiter(importlib.abc.MetaPathFinder):
    """Waits on `sys.meta_path` for TransformerLens' tables, then steps aside."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _AfterExec(spec.loader)
        return spec


def install() -> None:
    """Register now if TransformerLens is imported, else at the moment it will be. Idempotent."""
    if _TABLES in sys.modules:
        register_all()
    elif not any(isinstance(finder, _Waiter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiter())
