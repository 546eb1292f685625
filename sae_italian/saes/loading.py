"""Load an SAE in SAELens' format and check that it fits the model it is used on."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch

from sae_italian.errors import DataError, UsageError


def load_sae(name: str | Path, *, device: str = "cpu") -> Any:
    """Return a SAELens SAE from a folder (`cfg.json` + `sae_weights.safetensors`) or from `release:sae_id`.

    Raises: UsageError when there is no such folder or release, DataError when its files cannot be read.
    """
    from sae_lens import SAE

    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "sae_weights.safetensors").is_file():
            unfinished = (folder / "run.json").is_file()
            hint = "its training has not finished: run it again with --resume" if unfinished else "give an SAE's folder"
            raise UsageError(f"{folder} holds no sae_weights.safetensors; {hint}.")
        try:
            return SAE.load_from_disk(folder, device=device).eval()
        except Exception as error:
            raise DataError(f"the SAE in {folder} cannot be read: {error}") from error
    release, colon, sae_id = str(name).partition(":")
    if not colon:
        raise UsageError(f"SAE {str(name)!r} is neither a folder nor of the form release:sae_id.")
    try:
        return SAE.from_pretrained(release, sae_id, device=device).eval()
    except (ValueError, OSError) as error:
        raise UsageError(f"SAE {str(name)!r} could not be loaded: {str(error).splitlines()[0]:.300}") from error


def check_fits(sae: Any, model: Any) -> str:
    """Return the SAE's hook name if model and SAE belong together.

    Raises: UsageError when the hook name is missing or unknown to the model, or d_in is not the model's width there.
    """
    from sae_italian.models.activations import resolve_hook

    hook_name = sae.cfg.metadata.hook_name
    if not hook_name:
        raise UsageError("the SAE's metadata holds no hook_name; write it into its cfg.json under metadata.hook_name.")
    resolve_hook(model, hook_name)
    d_model = model.config.hidden_size
    if sae.cfg.d_in != d_model:
        raise UsageError(
            f"the SAE reads {sae.cfg.d_in} dimensions (d_in), but the model has {d_model} at {hook_name}; "
            f"it was trained on {sae.cfg.metadata.model_name!r}. Use that model."
        )
    return hook_name


def random_twin(sae: Any, seed: int = 0) -> Any:
    """Return an SAE of the same class and configuration with random weights: the untrained control.

    Encoder and decoder are tied random unit directions; the decoder bias is kept, so that inputs are centred alike.
    """
    twin = copy.deepcopy(sae)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(sae.cfg.d_sae, sae.cfg.d_in, generator=generator)
    directions /= directions.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        twin.W_dec.copy_(directions)
        twin.W_enc.copy_(directions.T)
        if getattr(twin, "b_enc", None) is not None:
            twin.b_enc.zero_()
    twin.cfg.metadata.random_twin_of = weights_hash(sae)
    return twin


def weights_hash(sae: Any) -> str:
    """Return a SHA-256 over all parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
