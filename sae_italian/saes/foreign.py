"""SAEs on disk, of SAELens and of other programs, read so that they compute on raw activations exactly what theirs compute.

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

What SAELens reads, but only from the hub (dictionary_learning's `ae.pt`, Gemma Scope's `params.npz`, OpenMOSS' later
`config.json` and `sae_weights.safetensors`), is read by its own loaders.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import read_json
from sae_italian.models.hooks import parse_hook_name

Config = dict[str, Any]
State = dict[str, Tensor]
Found = tuple[Config, State]


class Format(NamedTuple):
    """One format: the files that mark it, the weights last; how (folder, device, overrides) becomes SAELens' config and state."""

    files: tuple[str, ...]
    reader: Callable[[Path, str, Config], Found]
    config_of: Callable[[Path, str, Config], Config] = lambda *_: {}  # the config alone, of a hub's SAE
    hint: str = "Make or fetch it again."  # what to do where it cannot be read

    def is_in(self, folder: Path) -> bool:
        """Return whether a folder holds one SAE of this format, its weights whole or in shards."""
        return all((folder / name).is_file() or _index_of(folder / name).is_file() for name in self.files)

    def read(self, path: str | Path, device: str = "cpu", cfg_overrides: Config | None = None) -> Found:
        """Return (config, state dict) for `SAE.load_from_disk(path, converter=...)`.

        Raises: UsageError for what SAELens cannot express, KeyError for a setting or tensor that is not there, DataError
        when a tensor has another shape than the config says.
        """
        config, state = self.reader(Path(path), device, cfg_overrides or {})
        check_shapes(state, config, Path(path) / self.files[-1])
        return config, state


def find_format(folder: Path) -> tuple[Path, Format]:
    """Return the folder of the one SAE that a folder holds, itself or right inside (a run of sparsify, a suite), and its format.

    Raises: UsageError where there are more, or none that is read: what the folder holds instead, and what to do about it.
    """

    def format_of(place: Path) -> Format | None:
        return next((form for form in FORMATS if form.is_in(place)), None)

    if form := format_of(folder):
        return folder, form
    found = {child: form for child in sorted(folder.iterdir()) if (form := format_of(child))}
    if len(found) == 1:
        return found.popitem()
    what = f"{len(found)} SAEs; give one of its folders: " + ", ".join(child.name for child in list(found)[:8])
    if not found:
        signs = (said.format(file=file.name) for sign, said in _SIGNS for file in sorted(folder.glob(sign)))
        what = f"no SAE that can be read; {next(signs, 'give the folder of one SAE')}"
    raise UsageError(f"{folder} holds {what}.")


_SAVE = "load it with the program that wrote it, and save it with SAELens' save_model"
# What is in a folder, the first that is there, and what to say of it.
_SIGNS = (
    ("manifest.json", "it is a feature cache: give the SAE that it was built with (`sae-italian cache info` names it)"),
    ("run.json", "its training has not finished: run it again with --resume"),
    ("*.pt", "{file} is a PyTorch file without the config.json of dictionary_learning beside it: " + _SAVE),
    ("*.pkl", "{file} is a pickle, which can run code and is not read: " + _SAVE),
    ("hyperparams.json", "it is an SAE of OpenMOSS without checkpoints/final.safetensors: download that file too"),
    ("cfg.json", "its weights (sae_weights.safetensors or sae.safetensors) are missing: download or copy them too"),
    ("*.safetensors", "{file} has no configuration beside it: download or copy cfg.json too"),
    ("*.np[yz]", "{file} is no params.npz of Gemma Scope: " + _SAVE),
)


def read_tensors(file: Path, device: str, config: Config) -> State:
    """Return the tensors of a safetensors file, whole or in shards, as the numbers that the config says."""
    from safetensors.torch import load_file

    dtype = getattr(torch, config.get("dtype", "float32").removeprefix("torch."))
    files = [file]
    if not file.is_file():
        files = [file.with_name(name) for name in sorted(set(read_json(_index_of(file))["weight_map"].values()))]
    return {name: tensor.to(dtype=dtype) for each in files for name, tensor in load_file(each, device).items()}


def _index_of(file: Path) -> Path:
    """Return where the index of a safetensors file lies that was cut into shards."""
    return file.with_name(f"{file.name}.index.json")


def check_shapes(state: State, config: Config, file: object) -> None:
    """Compare encoder and decoder with the sizes in the config. Raises: DataError, which names a tensor that is transposed."""
    d_in, d_sae, d_out = config["d_in"], config["d_sae"], config.get("d_out", config["d_in"])
    sizes = {"d_in": d_in, "d_sae": d_sae, "d_out": d_out, "k": config.get("k", 1)}
    for name, size in sizes.items():
        if not isinstance(size, int | float if name == "k" else int) or size <= 0:
            raise DataError(f"the configuration of {file} has {name} {size!r}; it must be a number above 0.")
    if sizes["k"] > d_sae:
        raise DataError(f"the configuration of {file} has k {sizes['k']:,}, more than its {d_sae:,} latents (d_sae).")
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    for name, shape in (shapes | {"W_skip": (d_out, d_in), "threshold": (d_sae,)}).items():
        found = tuple(state[name].shape) if name in state else shape
        if found != shape:
            hint = f" {name} is transposed: transpose it in the file." if found == shape[::-1] else ""
            raise DataError(f"{name} in {file} is {list(found)}, but its config says {list(shape)}.{hint}")


# --- SAELens, and what it reads from the hub --------------------------------------------------------------------------


def _own(folder: Path, device: str, overrides: Config) -> Found:
    """Read SAELens' own format, of any of its versions, whole or sharded."""
    from sae_lens.loading.pretrained_sae_loaders import get_sae_lens_config_from_disk, sae_lens_disk_loader
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    config = get_sae_lens_config_from_disk(folder, device, overrides)
    if (name := config["architecture"]) not in SAE_CLASS_REGISTRY:
        if name in SAE_TRAINING_CLASS_REGISTRY:
            end = "sae-italian train RUN --resume, or TrainingSAE.load_from_disk(RUN).save_inference_model(OUT)"
            raise DataError(f"{folder} is a checkpoint of a training ({name}); end it: {end}.")
        raise DataError(f"{folder}/cfg.json: unknown architecture {name!r}; there are {', '.join(SAE_CLASS_REGISTRY)}.")
    if (folder / SAELENS_WEIGHTS).is_file():
        return sae_lens_disk_loader(folder, device, overrides)
    return config, read_tensors(folder / SAELENS_WEIGHTS, device, config)


def _by_saelens(loader: str, facts: Callable[[Path], Config], folder: Path, device: str, overrides: Config) -> Found:
    """Read with SAELens' loader; `facts` are what the files say and the loader does not read."""
    from sae_lens.loading import pretrained_sae_loaders as saelens

    folder = folder.resolve()
    # Gemma Scope's loader takes model, site and layer from the names of repository and folder
    at = next((i for i, part in enumerate(folder.parts) if "gemma-scope" in part), len(folder.parts) - 1)
    names = folder.parts[at], "/".join(folder.parts[at + 1 :])

    def beside(_repo_id: str = "", filename: str = "", **_: Any) -> str:
        return str(folder / Path(filename).name)

    # all that keeps the loaders from files on disk is that they ask the hub where these are
    with patch.object(saelens, "hf_hub_download", beside):
        load = getattr(saelens, loader)
        config, state, _ = load(*names, device=device, cfg_overrides=facts(folder) | overrides)
    config["d_in"], config["d_sae"] = state["W_enc"].shape  # Gemma Scope's names say them only roughly
    return config, state


def _openmoss_facts(folder: Path) -> Config:
    folded = read_json(folder / "config.json").get("norm_activation") == "inference"
    return {"normalize_activations": "none"} if folded else {}


def _dictionary_facts(folder: Path) -> Config:
    """Return the hook of an SAE of dictionary_learning, of which SAELens reads the layer alone.

    `trainer.submodule_name` names a module whose output was read (`buffer.io`), as in its demo and pages
    (`resid_post_layer_3`, `mlp_out_layer1`) or by path, or a hook. Raises: UsageError for what is neither.
    """
    theirs = read_json(folder / "config.json")
    trainer, io = theirs["trainer"], theirs["buffer"].get("io", "out")
    layer, name, kind = trainer["layer"], str(trainer.get("submodule_name")), trainer["dict_class"]
    if kind not in _DICTIONARIES:
        raise UsageError(f"{folder} has the dict_class {kind!r}; only {', '.join(_DICTIONARIES)} can be loaded.")
    said = _SUBMODULE.fullmatch(name)
    try:
        hook = parse_hook_name(f"layers.{said[2]}.{said[1]}".removesuffix(".resid") if said else name)
    except UsageError:
        hook = None
    if hook is None or hook.layer != layer or not (io == "out" or name == hook.name):
        raise UsageError(
            f"{folder}: submodule_name {name!r} with io {io!r} and layer {layer!r} names no hook that is known. Write the "
            f"hook into config.json as trainer.submodule_name, e.g. 'blocks.{layer}.hook_resid_post'."
        )
    return {"hook_name": hook.name}


_DICTIONARIES = (
    *("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"),
    *("JumpReluAutoEncoder", "GatedAutoEncoder"),
)
_SUBMODULE = re.compile(r"(resid|mlp|attn|attention)_?(?:post|out)?_?(?:layer_?)?([0-9]+)")


# --- sparsify and Llama Scope -----------------------------------------------------------------------------------------


def _completed(config: Config, device: str, overrides: Config) -> Config:
    """Return a config with what SAELens asks for."""
    from sae_lens import __version__

    shared = {"dtype": "float32", "normalize_activations": "none", "reshape_activations": "none", "device": device}
    more = {"prepend_bos": True, "model_class_name": "HookedTransformer", "sae_lens_version": __version__}
    return config | shared | {"metadata": config["metadata"] | more} | overrides


def _sparsify_config(folder: Path, device: str, overrides: Config) -> Config:
    """Return SAELens' config of an SAE of sparsify. Raises: UsageError for what SAELens cannot express."""
    theirs = read_json(folder / "cfg.json")
    run = next((read_json(p / "config.json") for p in (folder, folder.parent) if (p / "config.json").is_file()), {})
    if theirs.get("signed"):
        raise UsageError(f"{folder} was trained with signed latents, which SAELens' TopK cannot express.")
    if theirs.get("activation", "topk") != "topk":
        raise UsageError(f"{folder} has the activation {theirs['activation']!r}; only topk can be loaded.")
    transcodes = bool(theirs.get("transcode") or theirs.get("skip_connection") or run.get("transcode"))
    try:  # the output of the module that the hookpoint names
        hook_name = parse_hook_name(re.sub(r"^layers_([0-9]+)$", r"layers.\1", folder.name)).name
    except UsageError as error:
        if folder.name != "embed_tokens":
            raise UsageError(f"sparsify hookpoint {folder.name!r} is not a block, attention or MLP: {error}") from error
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
        return _completed(config | {"rescale_acts_by_decoder_norm": False}, device, overrides)
    if not hook_name.endswith("hook_mlp_out"):
        raise UsageError(f"{folder} is a transcoder of {folder.name!r}; only those of an MLP can be loaded.")
    metadata |= {"hook_name": hook_name.replace("hook_mlp_out", "mlp.hook_in"), "hook_name_out": hook_name}
    return _completed(config | {"d_out": theirs["d_in"]}, device, overrides)


def _sparsify(folder: Path, device: str, overrides: Config) -> Found:
    config = _sparsify_config(folder, device, overrides)
    tensors = read_tensors(folder / SPARSIFY.files[-1], device, config)
    state = {"W_enc": tensors["encoder.weight"].T.contiguous(), "b_enc": tensors["encoder.bias"]}
    state |= {"W_dec": tensors["W_dec"], "b_dec": tensors["b_dec"]}
    if config["architecture"] == "topk_transcoder":
        config["d_out"] = d_out = len(state["b_dec"])
        state["W_skip"] = tensors.get("W_skip", state["b_dec"].new_zeros(d_out, config["d_in"]))
    return config, state


def _llama_scope_config(folder: Path, device: str, overrides: Config) -> Config:
    """Return SAELens' config of an SAE of Llama Scope. Raises: UsageError for what its published SAEs do not have."""
    theirs = read_json(folder / "hyperparams.json")
    for key, known in _LLAMA_SCOPES.items():
        if (said := theirs.get(key, known[0])) not in known:
            raise UsageError(f"{folder} has {key} {said!r}; only {' or '.join(map(repr, known))} can be loaded.")
    hook_in, hook_out = theirs["hook_point_in"], theirs.get("hook_point_out") or theirs["hook_point_in"]
    metadata = {
        "model_name": "meta-llama/Llama-3.1-8B",
        "hook_name": hook_in,
        "dataset_path": "cerebras/SlimPajama-627B",
        "context_size": 1024,
        "source_format": "llama_scope",
        "k": theirs.get("top_k"),
    }
    widths = {"d_in": theirs["d_model"], "d_sae": theirs["d_sae"]}
    config: Config = {"architecture": "jumprelu", **widths, "apply_b_dec_to_input": False, "metadata": metadata}
    if hook_in != hook_out:
        metadata["hook_name_out"] = hook_out
        config |= {"architecture": "jumprelu_transcoder", "d_out": theirs["d_model"]}
    return _completed(config, device, overrides)


def _llama_scope(folder: Path, device: str, overrides: Config) -> Found:
    config, theirs = _llama_scope_config(folder, device, overrides), read_json(folder / "hyperparams.json")
    tensors = read_tensors(folder / LLAMA_SCOPE.files[-1], device, config)
    W_enc, W_dec = (tensors[f"{side}.weight"].T.contiguous() for side in ("encoder", "decoder"))
    b_enc, b_dec = (tensors[f"{side}.bias"] for side in ("encoder", "decoder"))
    norms, root = theirs["dataset_average_activation_norm"], config["d_in"] ** 0.5
    scale_in, scale_out = root / norms["in"], root / norms.get("out", norms["in"])
    if theirs.get("norm_activation") == "inference":
        scale_in = scale_out = 1.0  # already folded
    threshold = theirs["jump_relu_threshold"] * scale_out / W_dec.norm(dim=-1)
    decoder = {"W_dec": W_dec / scale_out, "b_dec": b_dec / scale_out}
    return config, {"W_enc": W_enc * scale_in, "b_enc": b_enc, **decoder, "threshold": threshold}


# What the published SAEs have of each setting that decides the numbers; the first where a file does not say.
_LLAMA_SCOPES = {
    "act_fn": ("jumprelu",),
    "apply_decoder_bias_to_pre_encoder": (False,),
    "use_glu_encoder": (False,),
    "sparsity_include_decoder_norm": (True,),
    "norm_activation": ("dataset-wise", "inference"),
}
SAELENS_WEIGHTS = "sae_weights.safetensors"
SPARSIFY = Format(("cfg.json", "sae.safetensors"), _sparsify, _sparsify_config)
LLAMA_SCOPE = Format(("hyperparams.json", "checkpoints/final.safetensors"), _llama_scope, _llama_scope_config)
_OPENMOSS = partial(_by_saelens, "llama_scope_r1_distill_sae_huggingface_loader", _openmoss_facts)
_DICTIONARY = partial(_by_saelens, "dictionary_learning_sae_huggingface_loader_1", _dictionary_facts)
_GEMMA_SCOPE = partial(_by_saelens, "gemma_2_sae_huggingface_loader", lambda _: {})
FORMATS = (
    Format(("cfg.json", SAELENS_WEIGHTS), _own),
    SPARSIFY,
    LLAMA_SCOPE,
    Format(("config.json", SAELENS_WEIGHTS), _OPENMOSS),
    Format(("config.json", "ae.pt"), _DICTIONARY),
    Format(("params.npz",), _GEMMA_SCOPE, hint="Keep its names: gemma-scope-2b-pt-res/layer_12/width_16k/..."),
)
