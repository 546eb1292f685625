"""Published formats written by hand, with their own maths: the references that our loaders are held to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def sparsify_weights(d_in: int, d_sae: int, seed: int = 0, skip: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    W_dec = normal(d_sae, d_in)
    weights = {
        "encoder.weight": normal(d_sae, d_in) / d_in**0.5,
        "encoder.bias": 0.1 * normal(d_sae),
        "W_dec": W_dec / W_dec.norm(dim=-1, keepdim=True),
        "b_dec": normal(d_in),
    }
    return weights | ({"W_skip": 0.1 * normal(d_in, d_in)} if skip else {})


def write_sparsify(folder: Path, weights: dict[str, torch.Tensor], k: int, **config: Any) -> Path:
    """One hookpoint, as sparsify's SparseCoder.save_to_disk writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    d_sae, d_in = weights["encoder.weight"].shape
    cfg = {"activation": "topk", "expansion_factor": d_sae // d_in, "normalize_decoder": True, "num_latents": d_sae}
    cfg |= {"k": k, "multi_topk": False, "skip_connection": "W_skip" in weights, "transcode": False, "d_in": d_in}
    (folder / "cfg.json").write_text(json.dumps(cfg | config))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "sae.safetensors")
    return folder


def sparsify_forward(w: dict[str, torch.Tensor], k: int, x: torch.Tensor, transcode: bool = False) -> tuple[Any, Any]:
    """sparsify's own maths: z = TopK(ReLU(W_enc (x - b_dec) + b_enc)), x_hat = z W_dec + b_dec (+ W_skip x)."""
    x_in = x if transcode else x - w["b_dec"]
    pre = torch.nn.functional.linear(x_in, w["encoder.weight"], w["encoder.bias"]).relu()
    top = pre.topk(k, dim=-1, sorted=False)
    z = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    y = z @ w["W_dec"] + w["b_dec"]
    if "W_skip" in w:
        y = y + x @ w["W_skip"].mT
    return z, y


def llama_scope_weights(d_in: int, d_sae: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(d_in, d_sae, generator=generator)
    return {
        "encoder.weight": torch.randn(d_sae, d_in, generator=generator) / d_in**0.5,
        "encoder.bias": 0.1 * torch.randn(d_sae, generator=generator),
        "decoder.weight": decoder / decoder.norm(dim=0),
        "decoder.bias": torch.randn(d_in, generator=generator),
    }


def write_llama_scope(
    folder: Path, weights: dict[str, torch.Tensor], hook_in: str, hook_out: str, **config: Any
) -> Path:
    """One SAE as OpenMOSS published it: hyperparams.json and checkpoints/final.safetensors."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    d_sae, d_in = weights["encoder.weight"].shape
    hyperparams = {
        "dtype": "torch.bfloat16", "hook_point_in": hook_in, "hook_point_out": hook_out, "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False, "expansion_factor": d_sae // d_in, "d_model": d_in, "d_sae": d_sae,
        "act_fn": "jumprelu", "jump_relu_threshold": 0.1, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 8.0, "out": 3.0}, "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False, "top_k": 50,
    }  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(hyperparams | config))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "checkpoints/final.safetensors")
    return folder


def llama_scope_forward(w: dict[str, torch.Tensor], x: torch.Tensor, norm_in: float, norm_out: float, theta: float):
    """Inference on raw x: scale in to sqrt(D), JumpReLU on latent times decoder norm (raw output scale), scale out."""
    root = w["encoder.weight"].shape[1] ** 0.5
    pre = (x * root / norm_in) @ w["encoder.weight"].T + w["encoder.bias"]
    on_output_scale = pre * w["decoder.weight"].norm(dim=0) * norm_out / root
    z = pre.relu() * (on_output_scale > theta)
    return z, (z @ w["decoder.weight"].T + w["decoder.bias"]) * norm_out / root


def dictionary_weights(kind: str, d_in: int, d_sae: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of one of dictionary_learning's classes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    encoder, decoder, b_enc, b_dec = normal(d_sae, d_in) / d_in**0.5, normal(d_in, d_sae), normal(d_sae), normal(d_in)
    if kind == "JumpReluAutoEncoder":
        theta = normal(d_sae).abs()
        return {"W_enc": encoder.T, "W_dec": decoder.T, "b_enc": b_enc, "b_dec": b_dec, "threshold": theta}
    weights = {"encoder.weight": encoder, "decoder.weight": decoder}
    if kind == "GatedAutoEncoder":
        return weights | {"decoder_bias": b_dec, "r_mag": normal(d_sae), "gate_bias": b_enc, "mag_bias": normal(d_sae)}
    weights["encoder.bias"] = b_enc
    if kind == "AutoEncoder":
        return weights | {"bias": b_dec}
    return weights | {"b_dec": b_dec, "threshold": torch.tensor(0.4)}


def dictionary_forward(kind: str, w: dict[str, torch.Tensor], k: int, x: torch.Tensor) -> tuple[Any, Any]:
    """dictionary_learning's own maths, class by class (its dictionary.py and trainers/)."""
    if kind == "JumpReluAutoEncoder":
        pre = x @ w["W_enc"] + w["b_enc"]
        z = pre.relu() * (pre > w["threshold"])
        return z, z @ w["W_dec"] + w["b_dec"]
    b_dec = next(w[name] for name in ("b_dec", "bias", "decoder_bias") if name in w)
    pre = (x - b_dec) @ w["encoder.weight"].T
    if kind == "GatedAutoEncoder":
        z = ((pre + w["gate_bias"]) > 0) * (w["r_mag"].exp() * pre + w["mag_bias"]).relu()
    else:
        z = (pre + w["encoder.bias"]).relu()
        if kind == "AutoEncoderTopK":
            top = z.topk(k, dim=-1)
            z = torch.zeros_like(z).scatter(-1, top.indices, top.values)
        elif kind == "BatchTopKSAE":
            z = z * (z > w["threshold"])
    return z, z @ w["decoder.weight"].T + b_dec


def write_dictionary(
    folder: Path, kind: str, weights: dict[str, torch.Tensor], k: int, io: str = "out", **trainer: Any
) -> Path:
    """`config.json` and `ae.pt`, as dictionary_learning's training writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    matrix = weights["W_enc"].T if "W_enc" in weights else weights["encoder.weight"]
    config = {"dict_class": kind, "activation_dim": matrix.shape[1], "dict_size": matrix.shape[0], "layer": 3, "k": k}
    config |= {"lm_name": "EleutherAI/pythia-160m-deduped", "submodule_name": "resid_post_layer_3"} | trainer
    (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": {"ctx_len": 1024, "io": io}}))
    torch.save({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "ae.pt")
    return folder
