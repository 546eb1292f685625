"""What a latent, its SAE and its model are called on Neuronpedia, and the ids of rows."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import fingerprint
from sae_italian.browser.exports.fields import tables
from sae_italian.cache import Manifest
from sae_italian.models import parse_hook_name

CREATOR = "clkht01d40000jv08hvalcvly"  # the bot, which every database of Neuronpedia's has
_SITES = {"R": "res", "A": "att", "M": "mlp", "TC": "transcoder", None: "pre"}
_NAMESPACE = uuid.UUID("5d0f6d0e-6a53-5c1b-9a1e-0b9f3f6f5a11")


@dataclass(frozen=True)
class Names:
    """The names of one export. `suffix` tells apart the SAEs of one layer in one set."""

    model: str
    layer: int
    source_set: str
    suffix: str | None
    creator: str
    creator_name: str
    release: str
    cache: str  # fingerprint: ids of rows are made from it

    @property
    def source(self) -> str:
        return f"{self.layer}-{self.source_set}" + (f"__{self.suffix}" if self.suffix else "")

    def row_id(self, *parts: object) -> str:
        """Return an id that is the same at every export of this cache and unlike any other's."""
        return str(uuid.uuid5(_NAMESPACE, "/".join(map(str, (self.cache, self.model, self.source, *parts)))))


def names_of(
    manifest: Manifest,
    *,
    model: str | None = None,
    source_set: str | None = None,
    suffix: str | None = None,
    creator: str = CREATOR,
    creator_name: str = "sae_italian",
) -> Names:
    """Return the names of an export, made from the cache's where they are not given.

    Raises: UsageError for a name that Neuronpedia refuses.
    """
    hook = parse_hook_name(manifest.hook_name)
    own_model = _slug(manifest.model.rstrip("/").split("/")[-1], "a-z0-9.")[:32].rstrip("-.")
    model = model or own_model
    source_set = source_set or f"{_SITES[hook.site]}-it-{manifest.d_sae}"
    _check("model_id=", model, tables()["model"]["pattern"]["id"])
    _check("set=", source_set, tables()["sourceset"]["pattern"]["name"])
    if suffix:
        _check("suffix=", suffix, "[a-z0-9.-]+")
    cache = fingerprint(manifest.identity())
    return Names(model, hook.layer, source_set, suffix, creator, creator_name, f"{model}-{source_set}", cache)


def _slug(text: str, letters: str) -> str:
    return re.sub(f"[^{letters}]+", "-", text.lower()).strip("-.")


def _check(option: str, name: str, pattern: str) -> None:
    if not re.fullmatch(pattern, name):
        raise UsageError(f"{option} is {name!r}, which Neuronpedia refuses; it has to match {pattern}.")


def cantor(layer: int, latent: int) -> int:
    """Return the Cantor pair of two numbers, by which circuit-tracer names a latent."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def saelens_config(sae: Any) -> dict[str, Any] | None:
    """Return the SAE's configuration as plain JSON, None without an SAE."""
    import json

    return None if sae is None else json.loads(json.dumps(sae.cfg.to_dict(), default=str))
