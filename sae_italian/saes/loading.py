"""Load an SAE from any known format and check that it fits the model it is used on."""

from __future__ import annotations

import copy
import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from sae_italian.base.errors import DataError, UsageError, nearest
from sae_italian.base.hub import explain
from sae_italian.saes.foreign import LLAMA_SCOPE, SPARSIFY, hookpoints


def load_sae(name: str | Path, *, device: str = "cpu") -> Any:
    """Return a SAELens SAE from a folder or from `release:sae_id`, whatever of the known formats its files have.

    A folder may hold SAELens' format, sparsify's (also a whole run with one hookpoint, as Delphi is given), or Llama
    Scope's. `release` is one of `sae-italian saes list`, any release of SAELens, or a hub repository `owner/name`;
    `release:sae_id@revision` pins a revision. What was loaded is recorded as `metadata.revision` where the hub knows.
    Raises: UsageError when there is no such folder or release, DataError when its files cannot be read.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(folder, device)
    release, colon, sae_id = str(name).partition(":")
    if not colon:
        raise UsageError(f"SAE {str(name)!r} is neither a folder nor of the form release:sae_id.")
    return _from_release(release, sae_id, device)


def _from_folder(folder: Path, device: str) -> Any:
    from sae_lens import SAE

    foreign = next((form for form in (SPARSIFY, LLAMA_SCOPE) if form.is_in(folder)), None)
    if foreign is None and not (folder / "sae_weights.safetensors").is_file():
        return _from_folder(_only_hookpoint(folder), device)
    converter: dict[str, Any] = {"converter": foreign.read} if foreign else {}
    try:
        return SAE.load_from_disk(folder, device=device, **converter).eval()
    except UsageError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"the SAE in {folder} cannot be read: {reason}{_transposed(reason)}") from error


def _only_hookpoint(folder: Path) -> Path:
    """Return the one hookpoint of a sparsify run. Raises UsageError when there is none, or a choice to make."""
    names = hookpoints(folder)
    if len(names) == 1:
        return folder / names[0]
    if names:
        raise UsageError(f"{folder} holds {len(names)} SAEs; give one of its folders: {', '.join(names[:8])}.")
    unfinished = (folder / "run.json").is_file()
    hint = "its training has not finished: run it again with --resume" if unfinished else "give an SAE's folder"
    raise UsageError(f"{folder} holds no sae_weights.safetensors; {hint}.")


def _from_release(release: str, sae_id: str, device: str) -> Any:
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    sae_id, _, revision = sae_id.partition("@")
    if release not in known and "/" not in release:
        raise UsageError(f"SAE release {release!r} is unknown. {nearest(release, known)}")
    if release in known:
        lookup = known[release]
        if sae_id not in lookup.saes_map:
            raise UsageError(f"release {release!r} has no SAE {sae_id!r}. {nearest(sae_id, lookup.saes_map)}")
        repo_id, path = lookup.repo_id, lookup.saes_map[sae_id]
    else:
        repo_id, path = release, sae_id
    try:
        if release in known and not revision:
            return SAE.from_pretrained(release, sae_id, device=device).eval()
        return _from_folder(_snapshot(repo_id, path, revision or None), device)
    except (UsageError, KeyError):
        raise
    except Exception as error:
        raise explain(error, f"{release}:{sae_id}", revision or None, repo_id=repo_id) from error


def _snapshot(repo_id: str, path: str, revision: str | None) -> Path:
    """Return the local folder `path` of a hub repository, downloading it where needed."""
    from huggingface_hub import snapshot_download

    root = snapshot_download(repo_id, revision=revision, allow_patterns=[f"{path}/*", "config.json"])
    folder = Path(root) / path
    if not folder.is_dir():
        raise UsageError(f"{repo_id} has no folder {path!r}; see https://huggingface.co/{repo_id}/tree/main.")
    return folder


def _transposed(reason: str) -> str:
    """Return a hint when a load failed because W_enc or W_dec has its two axes the other way round."""
    match = re.search(
        r"(W_(?:enc|dec)): copying a param with shape torch\.Size\(\[(\d+), (\d+)\]\) from checkpoint, "
        r"the shape in current model is torch\.Size\(\[(\d+), (\d+)\]\)",
        reason,
    )
    if match and (match[2], match[3]) == (match[5], match[4]):
        return f"; {match[1]} is transposed, store it as [{match[4]}, {match[5]}]"
    return ""


def check_fits(sae: Any, model: Any) -> str:
    """Return the SAE's hook name if model and SAE belong together.

    Raises: UsageError when the hook name is missing or unknown to the model, or d_in is not the model's width there.
    """
    from sae_italian.models.activations import resolve_hook

    hook_name = sae.cfg.metadata.hook_name
    if not hook_name:
        raise UsageError("the SAE's metadata holds no hook_name; write it into its cfg.json under metadata.hook_name.")
    path, trained_at = resolve_hook(model, hook_name)[0].module_path(model.config), sae.cfg.metadata.hf_hook_name
    if sae.cfg.metadata.source_format == "sparsify" and not path.endswith(trained_at):
        raise UsageError(
            f"the SAE was trained on the output of {trained_at!r}, but {hook_name} of this model is {path!r}."
        )
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
