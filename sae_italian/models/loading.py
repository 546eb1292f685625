"""Load one model by name with the library that suits the work: transformers, TransformerBridge or HookedTransformer."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal
from unittest.mock import patch

from sae_italian.base.errors import UsageError, check_known
from sae_italian.base.hub import explain
from sae_italian.models.catalogue import ResolvedModel, config_differences, record_of, resolve
from sae_italian.models.hooks import SITES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Backend = Literal["hf", "bridge", "hooked"]
BACKENDS = ("hf", "bridge", "hooked")
DTYPES = ("float32", "bfloat16", "float16")
CUDA_WHEELS = "https://download.pytorch.org/whl/cu128"
TOLERANCE = 1e-4  # largest relative difference between backends, in float32
_HUB_CONFIGS: dict[Any, Any] = {}  # by repository and revision: a suite asks 256 times, and the hub counts requests
HOOKED_CONTEXT = 4096  # TransformerLens would cap Mistral at 2048; its masks grow with the square


def load_model(
    name: str,
    backend: Backend = "hf",
    *,
    dtype: str = "float32",
    device: str = "auto",
    context: int | None = None,
    fetch: bool = True,
) -> Any:
    """Return the model `name` in evaluation mode, with its tokenizer at `.tokenizer` whatever the backend.

    `hf` gives the transformers model (fastest for harvesting activations), `bridge` TransformerLens' TransformerBridge
    with SAELens' `run_with_saes` (raw, bit-exact), `hooked` SAELens' HookedSAETransformer without weight processing.
    Logits of the three agree within 1e-4 of their spread in float32. In memory, `hf` and `bridge` need the weights once
    while loading, `hooked` twice. `name@revision` pins a revision of the hub; what was loaded is recorded at `.loaded_from`.
    `context` is the longest sequence, in tokens: only `hooked` has to know it beforehand (default: what the model
    allows, at most 4096). `auto` is the first GPU of CUDA, else the CPU. Without `fetch`, weights that are not on this machine are refused.

    Raises: UsageError for an unknown name, backend or dtype, a context the model does not allow, and when the weights
    can be neither found nor fetched.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_known("backend", BACKENDS, backend)
    check_known("dtype", DTYPES, dtype)
    device = device_of(device)
    resolved = resolve(name)
    longest = getattr(load_model_config(name), "max_position_embeddings", None)
    if context is not None and longest is not None and not 0 < context <= longest:
        raise UsageError(f"context is {context}; {resolved.saved_name} allows 1 to {longest} tokens.")
    # before the weights: reading 262,144 entries takes for a while what is freed again
    tokenizer = load_tokenizer(name)
    how = {"dtype": getattr(torch, dtype), "local_files_only": not fetch}
    model: Any = _fetch(AutoModelForCausalLM.from_pretrained, resolved, **how).eval()
    facts = _loaded_from(resolved, model, backend, dtype)
    half = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
    if half and device == "cpu" and not getattr(torch.ops.mkldnn, f"_is_mkldnn_{half}_supported")():
        sys.stderr.write(f"No {dtype} on this processor: float32 may be 100 times as fast.\n")
    if bos_count(tokenizer):
        tokenizer.init_kwargs["add_bos_token"] = True  # or TransformerLens reads it once more, to have that
    if backend == "bridge":
        from sae_italian.models.loud import LoudBridge

        kept: Any = {"hf_model": model, "tokenizer": tokenizer, "device": device, "dtype": model.dtype}
        model = LoudBridge.boot_transformers(resolved.load_from, **kept).eval()
        model.cfg.model_name = resolved.saved_name
    elif backend == "hooked":
        n_positions = context or min(longest or HOOKED_CONTEXT, HOOKED_CONTEXT)
        model = _load_hooked(resolved, model, tokenizer, device, n_positions)
    else:
        model.tokenizer = tokenizer
        model = model.to(device)
    model.tokenizer.split_special_tokens = True  # TransformerLens may have made another tokenizer of it
    model.loaded_from = facts
    return model


def load_model_config(name: str | Path) -> PreTrainedConfig:
    """Return the model's configuration without its weights.

    Raises: UsageError as `load_model`, and for a model that has no one width.
    """
    from transformers import AutoConfig

    resolved = resolve(name)
    key = (resolved.load_from, resolved.revision)
    config = _HUB_CONFIGS.get(key) or _fetch(AutoConfig.from_pretrained, resolved)
    if not Path(resolved.load_from).is_dir():
        _HUB_CONFIGS[key] = config
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise UsageError(
            f"{name} has no one hidden_size (its config says {width}), so no SAE fits all of its layers. "
            "Use a language model of one width; of one that also sees, its text model."
        )
    return config


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Return the model's fast tokenizer. Raises UsageError as `load_model`, and when there is no fast tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = _fetch(AutoTokenizer.from_pretrained, resolve(name))
    if not tokenizer.is_fast:
        raise UsageError(f"{name!r} has no fast tokenizer (tokenizer.json); character offsets need one.")
    tokenizer.split_special_tokens = True  # text is text: a typed `<s>` is characters
    for made_of in ("_vocab", "_merges"):  # 0.14 GB of 262,144 entries, which transformers reads no more
        vars(tokenizer).pop(made_of, None)
    return tokenizer


def bos_count(tokenizer: PreTrainedTokenizerBase, text: str = "ciao") -> int:
    """Return how many BOS tokens the tokenizer puts in front of a text by itself: the model's BOS policy."""
    ids, bos = list(tokenizer(text).input_ids), tokenizer.bos_token_id
    return next((i for i, token in enumerate(ids) if token != bos), len(ids)) if bos is not None else 0


def device_of(name: str) -> str:
    """Return the device of that name; of `auto`, cuda where it is here, else cpu.

    Raises: UsageError for one that PyTorch does not know, does not see, or was not built for.
    """
    import torch

    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return "cuda" if here["cuda"] else "cpu"  # mps, on which nothing of ours has run, is for who asks for it
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is unknown. Valid: auto, cpu, cuda, cuda:N, mps.") from error
    if kind == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        raise UsageError(
            f"device is {name!r}, but this PyTorch ({torch.__version__}) is built without CUDA. Use cpu or auto; or "
            f"install one that has it: pip install --force-reinstall torch --index-url {CUDA_WHEELS}"
        )
    if not here.get(kind, True):
        raise UsageError(f"device {name!r} is not on this machine (torch sees none). Use cpu or auto.")
    return str(name)  # a torch.device too, which safetensors does not know


def _loaded_from(resolved: ResolvedModel, model: Any, backend: str, dtype: str) -> dict[str, Any]:
    """Return what was loaded, for metadata; warn about every difference between catalogue and config."""
    from huggingface_hub import try_to_load_from_cache

    if differences := config_differences(resolved.entry, model.config):
        warnings.warn(f"{resolved.saved_name}: {'; '.join(differences)}. The loaded config is used.", stacklevel=3)
    commit = None  # of the hub's repository
    if not Path(resolved.load_from).is_dir():
        cached = try_to_load_from_cache(resolved.load_from, "config.json", revision=resolved.revision)
        commit = Path(cached).parts[-2] if isinstance(cached, str) else resolved.revision
    return {
        "name": resolved.saved_name,
        "revision": commit,
        "backend": backend,
        "dtype": dtype,
        "differences": differences,
        "quantisation": (record_of(resolved.load_from) or {}).get("quantisation"),  # of a GGUF file
    }


def _fetch(loader: Any, resolved: ResolvedModel, **arguments: Any) -> Any:
    """Call a `from_pretrained` and turn what goes wrong on the way to the files into one line."""
    from safetensors import SafetensorError

    try:
        return loader(resolved.load_from, revision=resolved.revision or "main", **arguments)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if resolved.entry is not None and resolved.entry.wheels and not Path(resolved.load_from).is_dir():
            fetch = f"sae-italian models fetch {resolved.entry.aliases[0]}"
            raise UsageError(f"{resolved.saved_name} is not on this machine. `{fetch}` fetches it.") from error
        raise explain(error, resolved.saved_name, resolved.revision) from error


def _load_hooked(resolved: ResolvedModel, model: Any, tokenizer: Any, device: str, context: int) -> Any:
    """Build SAELens' HookedSAETransformer from a loaded Hugging Face model, without any weight processing.

    HookedTransformer fetches the config by name and guesses the architecture from pieces of the name, such as "llama"; so
    it is given the loaded config, under a name that misleads nobody.
    """
    from transformer_lens import loading_from_pretrained as theirs

    from sae_italian.models.loud import LoudHooked

    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if not hasattr(config, "n_ctx"):  # GPT-2
        config.n_ctx = getattr(config, "max_position_embeddings", context)
    ours = SimpleNamespace(from_pretrained=lambda *_, **__: config)
    given = patch.multiple(theirs, get_official_model_name=str, AutoConfig=ours)
    try:
        with given, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints
            warnings.simplefilter("ignore", DeprecationWarning)
            how: dict[str, Any] = {"tokenizer": tokenizer, "device": device, "dtype": model.dtype, "n_ctx": context}
            hooked: Any = LoudHooked.from_pretrained_no_processing("<in memory>", hf_model=model, **how)
    except NotImplementedError as error:
        raise UsageError(
            f"TransformerLens' HookedTransformer has no {model.config.model_type!r} models; use the backend 'bridge'."
        ) from error
    _copy_rotary(model, hooked, context)
    hooked.cfg.model_name = resolved.saved_name
    return hooked.eval()


def _copy_rotary(model: Any, hooked: Any, context: int) -> None:
    """Give HookedTransformer the rotary angles of the Hugging Face model.

    Its own are rounded otherwise, which costs 1e-4 in the logits past 2,000 tokens, and ignore any scaling of RoPE.
    """
    import torch

    rotary = next((m for m in model.modules() if hasattr(m, "inv_freq") and hasattr(m, "attention_scaling")), None)
    if rotary is None:
        return
    angles = torch.outer(torch.arange(context, dtype=torch.float32), rotary.inv_freq.float().cpu()).repeat(1, 2)
    for block in hooked.blocks:
        for name, values in (("rotary_sin", angles.sin()), ("rotary_cos", angles.cos())):
            old = getattr(block.attn, name)  # [positions, rotary_dim], which TransformerLens grows
            if old.shape[1] != values.shape[1]:
                raise UsageError(f"RoPE turns {old.shape[1]} dimensions here, {values.shape[1]} there; use 'bridge'.")
            setattr(block.attn, name, (values * rotary.attention_scaling).to(old))


# --- do the three backends agree? ---------------------------------------------------------------------------------------


def compare_backends(name: str, prompt: str) -> dict[str, Any]:
    """Return the `largest_differences` from the Hugging Face backend, and whether all are within 1e-4 (float32).

    `hooked` is left out, and said to be, where TransformerLens cannot build the family.
    """
    hf = load_model(name, "hf")
    tokens = hf.tokenizer(prompt, return_tensors="pt").input_ids
    differences: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for backend in ("bridge", "hooked"):
        try:
            found = largest_differences(hf, load_model(name, backend), tokens)
            differences |= {f"{backend} {what}": value for what, value in found.items()}
        except UsageError as error:
            if backend == "bridge":
                raise
            left_out[backend] = str(error)
    return {
        "model": name,
        "revision": hf.loaded_from["revision"],
        "prompt": prompt,
        "n_tokens": tokens.shape[1],
        "n_layers": hf.config.num_hidden_layers,
        "bos_added": bos_count(hf.tokenizer),
        "catalogue_differences": hf.loaded_from["differences"],
        "differences": differences,
        "left_out": left_out,
        "ok": all(difference <= TOLERANCE for difference in differences.values()),
    }


def largest_differences(hf: Any, other: Any, tokens: Any) -> dict[str, float]:
    """Return the largest difference of another backend from `hf` on tokens [batch, pos].

    Compared are the activations at every layer of each site (R, A, M, TC), the norm of the difference over theirs, which
    reaches 100,000 in some families; and the logits, each by itself and over their standard deviation at that position:
    rounding grows with what they range over, a constant on all of them (no probability sees it) would flatter a norm, and
    a norm over 262,144 of them would hide one that is wrong.
    """
    import torch

    from sae_italian.models.activations import read_many

    names = {site: [f"blocks.{i}.{hook}" for i in range(hf.config.num_hidden_layers)] for site, hook in SITES.items()}
    every = [name for some in names.values() for name in some]
    with torch.no_grad():
        expected = read_many(hf, tokens, every)
        logits, cache = other.run_with_cache(tokens, names_filter=every)
        off = (logits - (own := hf(tokens).logits)).abs().amax(-1) / own.std(-1).clamp_min(1e-9)
        differences = {"logits (over their spread)": off.max().item()}
        for site, hook in SITES.items():
            a, b = (torch.stack([found[name] for name in names[site]]) for found in (expected, cache))
            relative = (b - a).norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-9)
            differences[f"{site} ({hook}), all layers"] = relative.max().item()
    return differences
