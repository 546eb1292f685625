"""What is told to TransformerLens and SAELens, and when.

TransformerLens resolves model names through two module-level objects, SAELens its releases through a cached dict and its
loaders through another; none has a public call to extend it. So entries are added to these objects in place; nothing is
rebound or replaced, and a name they already know is never taken over.
(Architectures SAELens registers by a public call, which the modules of `saes` make in their last lines.)

Importing these libraries costs seconds, so each registration waits until somebody imports the library.
"""

import logging
import re
from typing import Any

from wrapt import register_post_import_hook


class _Aliases(list):
    """A list of aliases that is asked `in` without regard to case: TransformerBridge compares them as typed."""

    def __contains__(self, name: object) -> bool:
        return any(str(name).lower() == alias.lower() for alias in self)


def _not_about_ours(record: logging.LogRecord) -> bool:
    """Keep back that an alias of ours is deprecated: TransformerLens says it of every alias, and names a folder."""
    from sae_italian.models import catalogue

    found = re.search(r"deprecated, model_name alias '(.*?)'", str(record.msg))
    return not (found and any(found[1].lower() in entry.aliases for entry in catalogue().values()))


def register_models() -> None:
    """Add every model of the catalogue and its aliases to TransformerLens' tables of names; idempotent.

    Raises: ValueError when an alias already means another model there.
    """
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    from sae_italian.models import catalogue

    meant = {name.lower(): name for name in OFFICIAL_MODEL_NAMES}
    meant |= {alias.lower(): name for name, its in MODEL_ALIASES.items() for alias in its}
    for entry in catalogue().values():
        _add("model", meant, dict.fromkeys((entry.official.lower(), *entry.aliases), entry.official))
        if entry.official not in OFFICIAL_MODEL_NAMES:
            OFFICIAL_MODEL_NAMES.append(entry.official)
        known = MODEL_ALIASES.setdefault(entry.official, _Aliases())
        known += [alias for alias in entry.aliases if alias not in known]
    logging.getLogger().addFilter(_not_about_ours)


def register_saes() -> None:
    """Register our architectures, loaders and releases with SAELens, so that its own calls know them; idempotent.

    Raises: ValueError when SAELens already has a release or loader of that name that is not ours.
    """
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup, get_pretrained_saes_directory

    # One of these may be what imported SAELens: it is then only half there, and registers itself when it is whole.
    from sae_italian.saes import architectures, tied  # noqa: F401
    from sae_italian.saes.releases import loaders as our_loaders
    from sae_italian.saes.releases import releases

    readers, config_readers = our_loaders()
    _add("loader", loaders.NAMED_PRETRAINED_SAE_LOADERS, readers)
    _add("config getter", loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS, config_readers)
    lookups = {
        name: PretrainedSAELookup(
            release=name,
            repo_id=release["repo_id"],
            model=release["model"],
            conversion_func=release["loader"],
            saes_map=dict(release["saes"]),
            expected_var_explained={},
            expected_l0={sae_id: float(release["k"]) for sae_id in release["saes"] if release["k"]},
            neuronpedia_id={},
            norm_scaling_factor={},
            config_overrides=None,
        )
        for name, release in releases().items()
    }
    _add("release", get_pretrained_saes_directory(), lookups)


def _add(what: str, table: dict[str, Any], ours: dict[str, Any]) -> None:
    for name, value in ours.items():
        if table.setdefault(name, value) != value:
            raise ValueError(f"there already is a {what} named {name!r}; it was not replaced")


def install() -> None:
    """Register with each library that is imported, and with the others at the moment they will be. Idempotent."""
    register_post_import_hook(lambda _: register_models(), "transformer_lens.supported_models")
    register_post_import_hook(lambda _: register_saes(), "sae_lens")
