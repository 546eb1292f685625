"""An SAE with its model and its text, however each is given: loaded, by name, or left to what the SAE's metadata says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.models import load_model
from sae_italian.saes.loading import load_sae


def open_sae(sae: Any, model: Any = None, corpus: str | Path | None = None) -> tuple[Any, Any, str]:
    """Return SAE, Hugging Face model and corpus. An SAE and a model may be names; None is what the metadata says.

    Raises: UsageError when the metadata does not say, and as `load_sae` and `load_model`.
    """
    if isinstance(sae, str | Path):
        sae = load_sae(sae)
    corpus = corpus or sae.cfg.metadata.dataset_path
    if not corpus:
        raise UsageError("the SAE's metadata does not name its corpus; give one (--corpus).")
    return sae, model_of(sae, model), str(corpus)


def model_of(sae: Any, model: Any = None) -> Any:
    """Return a model: itself, the one of that name, or the one the SAE names. Raises: UsageError when it names none."""
    model = model or sae.cfg.metadata.model_name
    if not model:
        raise UsageError("the SAE's metadata does not name its model; give one (--model).")
    return load_model(model) if isinstance(model, str) else model


def full_name(sae: Any) -> str:
    """Return the name under which an SAE is remembered: a folder's whole path, or release:sae_id as given."""
    if not isinstance(sae, str | Path):
        return "in memory"
    return str(Path(sae).resolve()) if Path(sae).is_dir() else str(sae)
