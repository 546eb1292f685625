"""Read Llama Scope SAEs and transcoders (OpenMOSS, arXiv 2410.20526) so that they run on raw activations.

On disk a folder holds `hyperparams.json` and `checkpoints/final.safetensors` with `encoder.weight` [d_sae, d_in],
`encoder.bias`, `decoder.weight` [d_out, d_sae], `decoder.bias`. The weights live where activations have norm sqrt(D):
inputs are scaled by s_in = sqrt(D) / dataset norm in, outputs come back through s_out likewise; the two differ for
transcoders, and folding the decoder with s_in inflates a transcoder's output by s_out / s_in (19 times at layer 8).

`jump_relu_threshold` is stored for latents times decoder norm on the raw output scale, so before the encoder's own scale
is reached it is multiplied by s_out / |W_dec|. For SAEs with unit decoder columns this is SAELens' rule (its issue 482);
for transcoders it is what makes the stored thresholds of all sites agree (about 2 after scaling); the weights could not
be fetched here, and `sae-italian saes doctor` shows it on yours (L0 against k).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import read_json
from sae_italian.saes.sparsify import check_shapes, load_tensors, with_overrides

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_TENSORS = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def is_llama_scope(folder: Path) -> bool:
    """Return whether the folder is one of Llama Scope's."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def config_from_disk(
    path: str | Path, device: str | None = None, cfg_overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return SAELens' config of a Llama Scope SAE or transcoder. Raises UsageError when its activation is not JumpReLU."""
    theirs = read_json(Path(path) / CONFIG)
    if theirs.get("act_fn", "jumprelu") != "jumprelu":
        raise UsageError(f"{path} has the activation {theirs['act_fn']!r}; Llama Scope's published SAEs have jumprelu.")
    if theirs.get("apply_decoder_bias_to_pre_encoder") or theirs.get("use_glu_encoder"):
        raise UsageError(
            f"{path} subtracts the decoder bias or has a gated encoder; Llama Scope's published SAEs do not."
        )
    hook_in, hook_out = theirs["hook_point_in"], theirs.get("hook_point_out") or theirs["hook_point_in"]
    metadata = {
        "model_name": "meta-llama/Llama-3.1-8B",
        "hook_name": hook_in,
        "dataset_path": "cerebras/SlimPajama-627B",
        "context_size": 1024,
        "prepend_bos": True,
        "model_class_name": "HookedTransformer",
        "source_format": "llama_scope",
        "k": theirs.get("top_k"),
    }
    config: dict[str, Any] = {
        "architecture": "jumprelu",
        "d_in": theirs["d_model"],
        "d_sae": theirs["d_sae"],
        "dtype": "float32",
        "device": device or "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if hook_in != hook_out:
        config |= {"architecture": "jumprelu_transcoder", "d_out": theirs["d_model"]}
        metadata["hook_name_out"] = hook_out
    return with_overrides(config, cfg_overrides)


def llama_scope_disk_loader(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config, state dict), scales folded in, for `SAE.load_from_disk(path, converter=...)`.

    Raises: DataError when a tensor has another shape than hyperparams.json says.
    """
    theirs = read_json(Path(path) / CONFIG)
    config = config_from_disk(path, device, cfg_overrides)
    tensors = load_tensors(Path(path) / WEIGHTS, device, config["dtype"], _TENSORS)
    d_in, d_sae = config["d_in"], config["d_sae"]
    norms = theirs["dataset_average_activation_norm"]
    scale_in, scale_out = d_in**0.5 / norms["in"], d_in**0.5 / norms.get("out", norms["in"])
    if theirs.get("norm_activation", "dataset-wise") != "dataset-wise":
        scale_in = scale_out = 1.0  # already folded
    W_dec = tensors["decoder.weight"].T.contiguous()
    decoder_norm = W_dec.norm(dim=-1) if theirs.get("sparsity_include_decoder_norm", True) else 1.0
    state = {
        "W_enc": tensors["encoder.weight"].T.contiguous() * scale_in,
        "b_enc": tensors["encoder.bias"],
        "W_dec": W_dec / scale_out,
        "b_dec": tensors["decoder.bias"] / scale_out,
        "threshold": tensors["encoder.bias"].new_ones(d_sae) * theirs["jump_relu_threshold"] * scale_out / decoder_norm,
    }
    d_out = config.get("d_out", d_in)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    check_shapes(state, shapes, Path(path) / WEIGHTS)
    return config, state
