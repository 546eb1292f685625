"""An SAE's configuration, read without its weights where a release is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_italian.base.hub import explain
from sae_italian.saes.loading import load_sae

FIRST = ("architecture", "d_in", "d_sae", "d_out", "k", "hook_name", "hook_name_out", "model_name", "dataset_path")


def sae_facts(name: str | Path) -> dict[str, Any]:
    """Return the configuration and metadata of an SAE in one level, what matters most first.

    Of a release of `sae-italian saes list` or of SAELens only the configuration is fetched. Raises: as `load_sae`.
    """
    config = _config(str(name))
    metadata = config.pop("metadata", {})
    facts = {**config, **{key: value for key, value in metadata.items() if key not in config}}
    return {key: facts[key] for key in (*(key for key in FIRST if key in facts), *(k for k in facts if k not in FIRST))}


def _config(name: str) -> dict[str, Any]:
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, _, sae_id = name.partition(":")
    known = get_pretrained_saes_directory().get(release)
    if Path(name).expanduser().is_dir() or known is None or sae_id not in known.saes_map:
        return load_sae(name).cfg.to_dict()
    try:
        return dict(load_sae_config_from_huggingface(release, sae_id))
    except (OSError, ValueError) as error:
        raise explain(error, name, None, repo_id=known.repo_id) from error
