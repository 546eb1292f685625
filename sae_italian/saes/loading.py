"""Load an SAE from any known format, with its model and its text; and the one check of its fitness, made at every door."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from sae_italian.base.errors import DataError, SaeItalianError, UsageError
from sae_italian.base.hub import explain
from sae_italian.base.storage import fingerprint, path_of, understood
from sae_italian.models import load_model
from sae_italian.models.loading import DTYPES, device_of
from sae_italian.saes.releases import find_sae, snapshot


def load_sae(name: str | Path, *, device: str = "auto") -> Any:
    """Return a SAELens SAE from a folder or from `release:sae_id`, whatever of the known formats its files have.

    A folder may hold SAELens' format (of any of its versions), or one of `foreign.py`; also a whole run with one SAE in
    it, as Delphi is given. `release` is one of `sae-italian saes list`, any release of SAELens, or a hub repository
    `owner/name`; `release:sae_id@revision` pins a revision. What was loaded is recorded as `metadata.revision` where the
    hub knows.
    Raises: UsageError when there is no such folder or release, DataError when its files cannot be read or hold numbers
    that are not finite.
    """
    folder, device = path_of(name), device_of(device)
    sae = _from_folder(folder, device) if folder.is_dir() else _from_release(str(name), device)
    check_sae(sae, f"the SAE {name}")
    return sae.eval()


def _from_folder(folder: Path, device: str) -> Any:
    from sae_lens import SAE

    from sae_italian.saes.foreign import find_format

    folder, form = find_format(folder)
    with understood(f"the SAE in {folder}", form.hint, Exception):  # whatever is made of odd files
        return SAE.load_from_disk(folder, device=device, converter=form.read)


def _from_release(name: str, device: str) -> Any:
    release, sae_id, revision = find_sae(name)
    from sae_lens import SAE  # takes seconds; a name that is not there is told before

    if revision or not release["name"]:
        folder, commit = snapshot(release["repo_id"], release["saes"][sae_id], revision)
        sae = _from_folder(folder, device)
        metadata = sae.cfg.metadata
        metadata.revision, metadata.model_name = commit, metadata.model_name or release["model"]
        return sae
    try:
        return SAE.from_pretrained(release["name"], sae_id, device=device)
    except SaeItalianError:
        raise
    except KeyError as error:
        raise DataError(f"the SAE {name} cannot be read: its files lack {error}.") from error
    except Exception as error:
        raise explain(error, name, repo_id=release["repo_id"]) from error


def sae_facts(name: str | Path, /) -> dict[str, Any]:
    """Return the configuration and metadata of an SAE in one level, what matters most first.

    Raises: as `load_sae`.

    Args:
        name: A folder, or release:sae_id, of which only the configuration is fetched.
    """
    release, sae_id, revision = ({"name": None}, "", None) if path_of(name).is_dir() else find_sae(str(name))
    if revision or not release["name"]:
        config = load_sae(name).cfg.to_dict()
    else:
        from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

        try:
            config = dict(load_sae_config_from_huggingface(release["name"], sae_id))
        except (OSError, ValueError) as error:
            raise explain(error, str(name), repo_id=release["repo_id"]) from error
    metadata = config.pop("metadata", {})
    facts = config | {key: value for key, value in metadata.items() if key not in config}
    first = ["architecture", "d_in", "d_sae", "d_out", "k", "hook_name", "hook_name_out", "model_name", "dataset_path"]
    return {key: facts[key] for key in dict.fromkeys((*first, *facts)) if key in facts}


# --- with its model and its text --------------------------------------------------------------------------------------


def open_sae(sae: Any, model: Any = None, corpus: str | Path | None = None) -> tuple[Any, Any, str]:
    """Return SAE, Hugging Face model and corpus. An SAE and a model may be names; None is what the metadata says.

    Raises: UsageError when the metadata does not say, and as `load_sae` and `load_model`.
    """
    if isinstance(sae, str | Path):
        sae = load_sae(sae, device=str(getattr(model, "device", "auto")))
    corpus = corpus or metadata_of(sae).dataset_path
    if not corpus:
        raise UsageError("the SAE's metadata does not name its corpus; give one (--corpus).")
    return sae, model_of(sae, model), str(corpus)


def model_of(sae: Any, model: Any = None) -> Any:
    """Return a model: itself, or that of a name, or the one the SAE names, on a GPU as precise as in training. Raises: UsageError."""
    model = model or metadata_of(sae).model_name
    if not model:
        raise UsageError("the SAE's metadata does not name its model; give one (--model).")
    kind = str((metadata_of(sae).model_from_pretrained_kwargs or {}).get("dtype")).removeprefix("torch.")
    dtype = kind if kind in DTYPES and device_of("auto") != "cpu" else "float32"
    return load_model(model, dtype=dtype) if isinstance(model, str) else model


def full_name(sae: Any) -> str:
    """Return the name under which an SAE is remembered: a folder's whole path, or release:sae_id as given."""
    if not isinstance(sae, str | Path):
        return "in memory"
    return str(folder.resolve()) if (folder := path_of(sae)).is_dir() else str(sae)


def weights_hash(sae: Any) -> str:
    """Return a SHA-256 over all parameters and buffers, by name."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- the doors --------------------------------------------------------------------------------------------------------


def metadata_of(sae: Any) -> Any:
    """Return the metadata of an SAE of SAELens. Raises: UsageError for what is none."""
    if not hasattr(getattr(sae, "cfg", None), "metadata"):
        raise UsageError(f"the SAE is a {type(sae).__name__}; give one of SAELens, as load_sae(name) returns.")
    return sae.cfg.metadata


def hooks_of(sae: Any) -> tuple[str, str]:
    """Return the hook the SAE reads and the one it writes; the same for all but transcoders. Raises: UsageError."""
    metadata = metadata_of(sae)
    names = metadata.hook_name, metadata.hook_name_out or metadata.hook_name
    if not all(isinstance(name, str) and name for name in names):
        raise UsageError("the SAE's metadata holds no hook_name; write it into its cfg.json under metadata.hook_name.")
    return names


@lru_cache(maxsize=4)
def vocabulary_hash(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's tokens and their numbers, without those that were added to it, as chat models do."""
    return fingerprint(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False))


def check_fits(sae: Any, model: Any, *, writes: bool = False) -> str:
    """Return the SAE's hook name if it can be used on the model as it is; with `writes`, also if its output can be put in.

    Checked are its weights (finite, of the shapes that the config says), that it is no BatchTopK in training, that the scale
    of its input is folded in, its hooks with their widths, and the tokenizer: its tokens are those of the training (where
    ours noted them), no more than the model has.
    Raises: UsageError, with what to do.
    """
    check_sae(sae)
    if type(getattr(sae, "activation_fn", None)).__name__ == "BatchTopK":
        raise UsageError(
            "the SAE is in training, its latents depend on the batch. Load what sae.save_inference_model(folder) writes."
        )
    mode = getattr(sae.cfg, "normalize_activations", "none")
    if mode in ("expected_average_only_in", "covariance_whitening"):
        raise UsageError(
            f"the SAE was trained on normalised activations ({mode}) and its scale is not folded in: on raw ones its "
            "latents are wrong. Fold it once, sae.fold_activation_norm_scaling_factor(sqrt(d_in) / mean norm), and save it; "
            "`sae-italian saes doctor` gives the factor."
        )
    return check_hooks(sae, model, writes=writes)


def check_sae(sae: Any, name: str = "the SAE") -> None:
    """Refuse weights that make no SAE, and metadata of another kind than its readers take.

    Raises: DataError naming the tensor that is not finite or has another shape, or the key of the metadata.
    """
    from sae_italian.saes.foreign import check_shapes

    metadata, tensors = metadata_of(sae), getattr(sae, "state_dict", dict)()  # what only acts like an SAE has none
    for key, tensor in tensors.items():
        if n := int((~tensor.isfinite()).sum()):
            raise DataError(
                f"{name} cannot be used: {n:,} numbers of {key} are not finite. Its training diverged, or the file is "
                "damaged: train it again with a lower lr, or take an earlier checkpoint."
            )
    check_shapes(tensors, vars(sae.cfg), name)
    divides = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) and "W_dec" in tensors
    if divides and (n := int((~tensors["W_dec"].any(dim=1)).sum())):
        raise DataError(
            f"{name} cannot be used: {n:,} rows of W_dec are 0, and it divides by their norms (its cfg says so: "
            "rescale_acts_by_decoder_norm). Take an earlier checkpoint, or one without these latents."
        )
    for key, kind in {"model_name": str, "dataset_path": str, "context_size": int}.items():
        value = metadata[key]
        if not isinstance(value, kind | None) or (kind is int and value is not None and value < 2):
            told = "a name" if kind is str else "a number of tokens, 2 or more,"
            raise DataError(f"{name} cannot be used: metadata.{key} in its cfg.json is {value!r}; {told} was expected.")


def check_hooks(sae: Any, model: Any, *, writes: bool = False) -> str:
    """Return the SAE's hook name if model and SAE belong together there. Raises: UsageError."""
    from sae_italian.models.activations import check_model, resolve_hook

    hook_name, hook_out = hooks_of(sae)
    cfg, d_model = sae.cfg, check_model(model).config.hidden_size
    path, trained_at = resolve_hook(model, hook_name)[0].module_path(model.config), cfg.metadata.hf_hook_name
    there = f"it was trained on {cfg.metadata.model_name!r}. Use that model."
    if cfg.metadata.source_format == "sparsify" and not path.endswith(trained_at):
        raise UsageError(
            f"the SAE was trained on the output of {trained_at!r}, but {hook_name} of this model is {path!r}."
        )
    if cfg.d_in != d_model:
        raise UsageError(
            f"the SAE reads {cfg.d_in} dimensions (d_in), but the model has {d_model} at {hook_name}; {there}"
        )
    if writes and (d_out := getattr(cfg, "d_out", cfg.d_in)) != d_model:
        raise UsageError(
            f"the transcoder writes {d_out} dimensions (d_out), but the model has {d_model} at {hook_out}; {there}"
        )
    if writes and resolve_hook(model, hook_out)[0].normalised:
        raise UsageError(
            f"the SAE writes at {hook_out}, which can be read but not replaced: no losses, nothing can be edited there."
        )
    if (n_tokens := getattr(model.tokenizer, "vocab_size", 0)) > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {n_tokens:,} tokens, the model {model.config.vocab_size:,} rows: it is that of another "
            "model. Load this model's own."
        )
    if cfg.metadata.vocabulary and cfg.metadata.vocabulary != vocabulary_hash(model.tokenizer):
        raise UsageError(f"this model's tokenizer has other tokens than the one that the SAE was trained with; {there}")
    return hook_name
