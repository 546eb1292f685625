"""Read SAEs that EleutherAI's sparsify wrote, from the hub or from disk, exactly as sparsify computes them.

On disk a folder per hookpoint holds `cfg.json` and `sae.safetensors` with `encoder.weight` [d_sae, d_in],
`encoder.bias` [d_sae], `W_dec` [d_sae, d_in] and `b_dec` [d_in]; transcoders may have `W_skip` [d_out, d_in].
sparsify computes z = TopK(ReLU(W_enc (x - b_dec) + b_enc)) and x_hat = z W_dec + b_dec, without the subtraction for
transcoders. SAELens' own converter transposes W_dec and drops the subtraction (reference/autointerp.md, fact 5).
Source: sparsify, sparse_coder.py, https://github.com/EleutherAI/sparsify.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import read_json
from sae_italian.models.hooks import parse_hook_name

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_TENSORS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def is_sparsify(folder: Path) -> bool:
    """Return whether the folder is one sparsify wrote for one hookpoint."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def hookpoints(folder: Path) -> list[str]:
    """Return the hookpoints of a run's folder (sparsify's, or the SAE folder that Delphi is given), sorted."""
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and is_sparsify(child))


def hook_of(hookpoint: str) -> str:
    """Return the legacy hook name of a sparsify hookpoint: the output of the module it names.

    Raises: UsageError for a module that is no site of the table of hooks.
    """
    name = re.sub(r"^layers[._](\d+)$", r"layers.\1", hookpoint)
    if name == "embed_tokens":
        return "hook_embed"
    try:
        return parse_hook_name(name).name
    except UsageError as error:
        raise UsageError(f"sparsify hookpoint {hookpoint!r} is not a block, an attention or an MLP: {error}") from error


def config_from_disk(
    path: str | Path, device: str | None = None, cfg_overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return SAELens' config of the sparsify SAE in a folder. Raises UsageError for what SAELens cannot express."""
    folder = Path(path)
    theirs = read_json(folder / CONFIG)
    run = next((read_json(p / "config.json") for p in (folder, folder.parent) if (p / "config.json").is_file()), {})
    if theirs.get("signed"):
        raise UsageError(f"{folder} was trained with signed latents, which SAELens' TopK cannot express.")
    if theirs.get("activation", "topk") != "topk":
        raise UsageError(f"{folder} has the activation {theirs['activation']!r}; only topk can be loaded.")
    transcodes = bool(theirs.get("transcode") or theirs.get("skip_connection") or run.get("transcode"))
    hook_name = hook_of(folder.name)
    metadata = {
        "model_name": run.get("model"),
        "hook_name": hook_name,
        "dataset_path": run.get("dataset"),
        "context_size": run.get("ctx_len", 2048),
        "prepend_bos": True,
        "model_class_name": "HookedTransformer",
        "hf_hook_name": folder.name,
        "source_format": "sparsify",
        "k": theirs["k"],
    }
    if transcodes:
        if not hook_name.endswith("hook_mlp_out"):
            raise UsageError(f"{folder} is a transcoder of {folder.name!r}; only those of an MLP can be loaded.")
        metadata |= {"hook_name": hook_name.replace("hook_mlp_out", "mlp.hook_in"), "hook_name_out": hook_name}
    config: dict[str, Any] = {
        "architecture": "topk_transcoder" if transcodes else "topk",
        "d_in": theirs["d_in"],
        "d_sae": theirs.get("num_latents") or theirs["d_in"] * theirs["expansion_factor"],
        "k": theirs["k"],
        "dtype": "float32",
        "device": device or "cpu",
        "apply_b_dec_to_input": not transcodes,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if transcodes:
        config["d_out"] = theirs["d_in"]
    else:
        config["rescale_acts_by_decoder_norm"] = False
    return with_overrides(config, cfg_overrides)


def with_overrides(config: dict[str, Any], overrides: dict[str, Any] | None) -> dict[str, Any]:
    """Return the config with SAELens' overrides in it: what is no field of the config belongs to the metadata."""
    from sae_lens import __version__

    config["metadata"].setdefault("sae_lens_version", __version__)
    for key, value in (overrides or {}).items():
        if key in config:
            config[key] = value
        else:
            config["metadata"][key] = value
    return config


def sparsify_disk_loader(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config, state dict) for `SAE.load_from_disk(path, converter=...)`.

    Raises: DataError when a tensor is missing or has another shape than cfg.json says.
    """
    config = config_from_disk(path, device, cfg_overrides)
    tensors = load_tensors(Path(path) / WEIGHTS, device, config["dtype"], _TENSORS)
    state = {
        "W_enc": tensors["encoder.weight"].T.contiguous(),
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    d_in, d_sae = config["d_in"], config["d_sae"]
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if config["architecture"] == "topk_transcoder":
        d_out = state["b_dec"].shape[0]
        config["d_out"] = d_out
        shapes |= {"W_dec": (d_sae, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
        state["W_skip"] = tensors.get("W_skip", torch.zeros(d_out, d_in, dtype=state["b_dec"].dtype, device=device))
    check_shapes(state, shapes, Path(path) / WEIGHTS)
    return config, state


def load_tensors(path: Path, device: str, dtype: str, needed: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file in one dtype. Raises DataError when a needed one is missing."""
    from safetensors.torch import load_file

    tensors = load_file(path, device)
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise DataError(f"{path} has no {', '.join(missing)}; it holds {', '.join(sorted(tensors))}.")
    return {name: tensor.to(getattr(torch, dtype.removeprefix("torch."))) for name, tensor in tensors.items()}


def check_shapes(state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], file: Path) -> None:
    """Raise DataError for the first tensor whose shape is not the expected one."""
    for name, shape in shapes.items():
        found = tuple(state[name].shape)
        if found != shape:
            hint = " It is transposed: transpose it in the file." if found == shape[::-1] else ""
            raise DataError(f"{name} in {file} is {list(found)}, but its config says {list(shape)}.{hint}")
