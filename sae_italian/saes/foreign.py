"""SAEs of two other programs, read from disk so that they compute on raw activations exactly what theirs compute.

**sparsify** (EleutherAI, https://github.com/EleutherAI/sparsify): a folder per hookpoint holds `cfg.json` and
`sae.safetensors` with `encoder.weight` [d_sae, d_in], `encoder.bias` [d_sae], `W_dec` [d_sae, d_in], `b_dec` [d_in];
transcoders may have `W_skip` [d_out, d_in]. z = TopK(ReLU(W_enc (x - b_dec) + b_enc)), x_hat = z W_dec + b_dec, without
the subtraction for transcoders. SAELens' own converter transposes W_dec and drops the subtraction.

**Llama Scope** (OpenMOSS, arXiv 2410.20526): a folder holds `hyperparams.json` and `checkpoints/final.safetensors` with
`encoder.weight` [d_sae, d_in], `encoder.bias`, `decoder.weight` [d_out, d_sae], `decoder.bias`. The weights live where
activations have norm sqrt(D): inputs are scaled by s_in = sqrt(D) / dataset norm in, outputs come back through s_out
likewise; the two differ for transcoders, and folding the decoder with s_in inflates a transcoder's output by s_out / s_in
(19 times at layer 8). `jump_relu_threshold` is stored for latents times decoder norm on the raw output scale, so before
the encoder's own scale is reached it is multiplied by s_out / |W_dec|. For SAEs with unit decoder columns this is
SAELens' rule (its issue 482); for transcoders it is what makes the stored thresholds of all sites agree (about 2 after
scaling); the weights could not be fetched here, and `sae-italian saes doctor` shows it on yours (L0 against k).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import read_json
from sae_italian.models.hooks import parse_hook_name

Config = dict[str, Any]
State = dict[str, Tensor]


class Format(NamedTuple):
    """One format: its two files, the tensors that must be there, and how config and tensors become SAELens'."""

    config: str
    weights: str
    needed: tuple[str, ...]
    config_of: Callable[[Path], Config]
    state_of: Callable[[Path, Config, State], State]

    def is_in(self, folder: Path) -> bool:
        """Return whether a folder holds one SAE of this format."""
        return (folder / self.config).is_file() and (folder / self.weights).is_file()

    def read_config(self, path: str | Path, device: str | None = None, cfg_overrides: Config | None = None) -> Config:
        """Return SAELens' config of the SAE in a folder; an override that is none of its fields goes to the metadata.

        Raises: UsageError for what SAELens cannot express.
        """
        from sae_lens import __version__

        shared = {"dtype": "float32", "normalize_activations": "none", "reshape_activations": "none"}
        config = {**self.config_of(Path(path)), **shared, "device": device or "cpu"}
        config["metadata"] |= {"prepend_bos": True, "model_class_name": "HookedTransformer"}
        config["metadata"].setdefault("sae_lens_version", __version__)
        for key, value in (cfg_overrides or {}).items():
            (config if key in config else config["metadata"])[key] = value
        return config

    def read(self, path: str | Path, device: str = "cpu", cfg_overrides: Config | None = None) -> tuple[Config, State]:
        """Return (config, state dict) for `SAE.load_from_disk(path, converter=...)`.

        Raises: UsageError as `read_config`, DataError when a tensor is missing or has another shape than the config says.
        """
        from safetensors.torch import load_file

        config, file = self.read_config(path, device, cfg_overrides), Path(path) / self.weights
        tensors = load_file(file, device)
        missing = [name for name in self.needed if name not in tensors]
        if missing:
            raise DataError(f"{file} has no {', '.join(missing)}; it holds {', '.join(sorted(tensors))}.")
        dtype = getattr(torch, config["dtype"].removeprefix("torch."))
        state = self.state_of(Path(path), config, {name: tensor.to(dtype) for name, tensor in tensors.items()})
        d_in, d_sae, d_out = config["d_in"], config["d_sae"], config.get("d_out", config["d_in"])
        shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
        for name, shape in (shapes | ({"W_skip": (d_out, d_in)} if "W_skip" in state else {})).items():
            found = tuple(state[name].shape)
            if found != shape:
                hint = " It is transposed: transpose it in the file." if found == shape[::-1] else ""
                raise DataError(f"{name} in {file} is {list(found)}, but its config says {list(shape)}.{hint}")
        return config, state


def hookpoints(folder: Path) -> list[str]:
    """Return the hookpoints of a run's folder (sparsify's, or the SAE folder that Delphi is given), sorted."""
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and SPARSIFY.is_in(child))


def _sparsify_config(folder: Path) -> Config:
    theirs = read_json(folder / "cfg.json")
    run = next((read_json(p / "config.json") for p in (folder, folder.parent) if (p / "config.json").is_file()), {})
    if theirs.get("signed"):
        raise UsageError(f"{folder} was trained with signed latents, which SAELens' TopK cannot express.")
    if theirs.get("activation", "topk") != "topk":
        raise UsageError(f"{folder} has the activation {theirs['activation']!r}; only topk can be loaded.")
    transcodes = bool(theirs.get("transcode") or theirs.get("skip_connection") or run.get("transcode"))
    try:  # the output of the module that the hookpoint names
        hook_name = parse_hook_name(re.sub(r"^layers_(\d+)$", r"layers.\1", folder.name)).name
    except UsageError as error:
        if folder.name != "embed_tokens":
            message = f"sparsify hookpoint {folder.name!r} is not a block, an attention or an MLP: {error}"
            raise UsageError(message) from error
        hook_name = "hook_embed"
    metadata = {
        "model_name": run.get("model"),
        "hook_name": hook_name,
        "dataset_path": run.get("dataset"),
        "context_size": run.get("ctx_len", 2048),
        "hf_hook_name": folder.name,
        "source_format": "sparsify",
        "k": theirs["k"],
    }
    config: Config = {
        "architecture": "topk_transcoder" if transcodes else "topk",
        "d_in": theirs["d_in"],
        "d_sae": theirs.get("num_latents") or theirs["d_in"] * theirs["expansion_factor"],
        "k": theirs["k"],
        "apply_b_dec_to_input": not transcodes,
        "metadata": metadata,
    }
    if not transcodes:
        return config | {"rescale_acts_by_decoder_norm": False}
    if not hook_name.endswith("hook_mlp_out"):
        raise UsageError(f"{folder} is a transcoder of {folder.name!r}; only those of an MLP can be loaded.")
    metadata |= {"hook_name": hook_name.replace("hook_mlp_out", "mlp.hook_in"), "hook_name_out": hook_name}
    return config | {"d_out": theirs["d_in"]}


def _sparsify_state(_folder: Path, config: Config, tensors: State) -> State:
    state = {"W_enc": tensors["encoder.weight"].T.contiguous(), "b_enc": tensors["encoder.bias"]}
    state |= {"W_dec": tensors["W_dec"], "b_dec": tensors["b_dec"]}
    if config["architecture"] == "topk_transcoder":
        config["d_out"] = d_out = len(state["b_dec"])
        state["W_skip"] = tensors.get("W_skip", state["b_dec"].new_zeros(d_out, config["d_in"]))
    return state


def _llama_scope_config(folder: Path) -> Config:
    theirs = read_json(folder / "hyperparams.json")
    if theirs.get("act_fn", "jumprelu") != "jumprelu":
        raise UsageError(
            f"{folder} has the activation {theirs['act_fn']!r}; Llama Scope's published SAEs have jumprelu."
        )
    if theirs.get("apply_decoder_bias_to_pre_encoder") or theirs.get("use_glu_encoder"):
        raise UsageError(
            f"{folder} subtracts the decoder bias or has a gated encoder; Llama Scope's published SAEs do not."
        )
    hook_in, hook_out = theirs["hook_point_in"], theirs.get("hook_point_out") or theirs["hook_point_in"]
    metadata = {
        "model_name": "meta-llama/Llama-3.1-8B",
        "hook_name": hook_in,
        "dataset_path": "cerebras/SlimPajama-627B",
        "context_size": 1024,
        "source_format": "llama_scope",
        "k": theirs.get("top_k"),
    }
    sizes = {"d_in": theirs["d_model"], "d_sae": theirs["d_sae"], "apply_b_dec_to_input": False}
    if hook_in == hook_out:
        return {"architecture": "jumprelu", **sizes, "metadata": metadata}
    metadata["hook_name_out"] = hook_out
    return {"architecture": "jumprelu_transcoder", **sizes, "d_out": theirs["d_model"], "metadata": metadata}


def _llama_scope_state(folder: Path, config: Config, tensors: State) -> State:
    theirs = read_json(folder / "hyperparams.json")
    norms, root = theirs["dataset_average_activation_norm"], config["d_in"] ** 0.5
    scale_in, scale_out = root / norms["in"], root / norms.get("out", norms["in"])
    if theirs.get("norm_activation", "dataset-wise") != "dataset-wise":
        scale_in = scale_out = 1.0  # already folded
    W_dec, b_enc = tensors["decoder.weight"].T.contiguous(), tensors["encoder.bias"]
    decoder_norm = W_dec.norm(dim=-1) if theirs.get("sparsity_include_decoder_norm", True) else 1.0
    return {
        "W_enc": tensors["encoder.weight"].T.contiguous() * scale_in,
        "b_enc": b_enc,
        "W_dec": W_dec / scale_out,
        "b_dec": tensors["decoder.bias"] / scale_out,
        "threshold": b_enc.new_ones(config["d_sae"]) * theirs["jump_relu_threshold"] * scale_out / decoder_norm,
    }


_ENCODER = ("encoder.weight", "encoder.bias")
SPARSIFY = Format("cfg.json", "sae.safetensors", (*_ENCODER, "W_dec", "b_dec"), _sparsify_config, _sparsify_state)
LLAMA_SCOPE = Format(
    "hyperparams.json",
    "checkpoints/final.safetensors",
    (*_ENCODER, "decoder.weight", "decoder.bias"),
    _llama_scope_config,
    _llama_scope_state,
)
