"""Load one model by name with the library that suits the work: transformers, TransformerBridge or HookedTransformer."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.hub import explain
from sae_italian.models.catalogue import ResolvedModel, config_differences, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Backend = Literal["hf", "bridge", "hooked"]
BACKENDS = ("hf", "bridge", "hooked")
DTYPES = ("float32", "bfloat16", "float16")
HOOKED_CONTEXT = 4096  # TransformerLens would cap Mistral at 2048; its masks grow with the square of what is used

# TransformerLens guesses the architecture from these pieces of a path (reference/transformerlens.md 1.1).
_MISLEADING_PATHS = ("llama", "gemma", "bert", "t5", "wav2vec2")


def load_model(
    name: str, backend: Backend = "hf", *, dtype: str = "float32", device: str = "cpu", context: int | None = None
) -> Any:
    """Return the model `name` in evaluation mode, with its tokenizer at `.tokenizer` whatever the backend.

    `hf` gives the transformers model (fastest for harvesting activations), `bridge` TransformerLens' TransformerBridge
    with SAELens' `run_with_saes` (raw, bit-exact), `hooked` SAELens' HookedSAETransformer without weight processing.
    Logits of the three agree within 1e-4 in float32. In memory, `hf` and `bridge` need the weights once while loading,
    `hooked` twice. `name@revision` pins a revision of the hub; what was loaded is recorded at `.loaded_from`.
    `context` is the longest sequence, in tokens: only `hooked` has to know it beforehand (default: what the model
    allows, at most 4096).

    Raises: UsageError for an unknown name, backend or dtype, a context the model does not allow, and when the weights
    can be neither found nor fetched.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r} is unknown. {nearest(backend, BACKENDS)}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown. {nearest(dtype, DTYPES)}")
    _check_device(device)
    resolved = resolve(name)
    longest = getattr(load_model_config(name), "max_position_embeddings", None)
    if context is not None and longest is not None and not 0 < context <= longest:
        raise UsageError(f"context is {context}; {resolved.saved_name} allows 1 to {longest} tokens.")
    tokenizer = load_tokenizer(name)
    model = _load_hf(resolved, dtype)
    facts = _loaded_from(resolved, model, backend, dtype)
    if backend == "bridge":
        model = _load_bridge(resolved, model, tokenizer, device)
    elif backend == "hooked":
        model = _load_hooked(
            resolved, model, tokenizer, device, context or min(longest or HOOKED_CONTEXT, HOOKED_CONTEXT)
        )
    else:
        model.tokenizer = tokenizer
        model = model.to(device)  # pyright: ignore[reportArgumentType]
    model.loaded_from = facts
    return model


def load_model_config(name: str) -> PreTrainedConfig:
    """Return the model's configuration without its weights. Raises UsageError as `load_model`."""
    from transformers import AutoConfig

    return _fetch(AutoConfig.from_pretrained, resolve(name))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the model's fast tokenizer. Raises UsageError as `load_model`, and when there is no fast tokenizer."""
    from transformers import AutoTokenizer

    resolved = resolve(name)
    tokenizer = _fetch(AutoTokenizer.from_pretrained, resolved)
    if not tokenizer.is_fast:
        raise UsageError(f"model {name!r} has no fast tokenizer (tokenizer.json); character offsets need one.")
    return tokenizer


def bos_count(tokenizer: PreTrainedTokenizerBase, text: str = "ciao") -> int:
    """Return how many BOS tokens the tokenizer puts in front of a text by itself: the model's BOS policy."""
    ids = list(tokenizer(text).input_ids)
    bos = tokenizer.bos_token_id
    return next((i for i, token in enumerate(ids) if token != bos), len(ids)) if bos is not None else 0


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"device {device!r} is unknown. Valid: cpu, cuda, cuda:N, mps.") from error
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(kind, lambda: True)()
    if not there:
        raise UsageError(f"device {device!r} is not on this machine (torch sees none). Use cpu.")


def _load_hf(resolved: ResolvedModel, dtype: str):
    import torch
    from transformers import AutoModelForCausalLM

    return _fetch(AutoModelForCausalLM.from_pretrained, resolved, dtype=getattr(torch, dtype)).eval()


def _loaded_from(resolved: ResolvedModel, model: Any, backend: str, dtype: str) -> dict[str, Any]:
    """Return what was loaded, for metadata; warn about every difference between catalogue and config."""
    differences = config_differences(resolved.entry, model.config)
    if differences:
        warnings.warn(f"{resolved.saved_name}: {'; '.join(differences)}. The loaded config is used.", stacklevel=3)
    return {
        "name": resolved.saved_name,
        "revision": _commit_of(resolved),
        "backend": backend,
        "dtype": dtype,
        "differences": differences,
    }


def _commit_of(resolved: ResolvedModel) -> str | None:
    """Return the commit of the hub's repository that was loaded; None for a local folder."""
    from huggingface_hub import try_to_load_from_cache

    if Path(resolved.load_from).is_dir():
        return None
    path = try_to_load_from_cache(resolved.load_from, "config.json", revision=resolved.revision)
    return Path(path).parts[-2] if isinstance(path, str) else resolved.revision


def _fetch(loader: Any, resolved: ResolvedModel, **arguments: Any) -> Any:
    """Call a `from_pretrained` and turn what goes wrong on the way to the files into one line."""
    from safetensors import SafetensorError

    if resolved.revision:
        arguments["revision"] = resolved.revision
    try:
        with _no_bars_in_a_pipe():
            return loader(resolved.load_from, **arguments)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise explain(error, resolved.saved_name, resolved.revision) from error


def _load_bridge(resolved: ResolvedModel, model: Any, tokenizer: Any, device: str) -> Any:
    from sae_italian.models.loud import LoudBridge

    bridge = LoudBridge.boot_transformers(
        resolved.load_from, hf_model=model, tokenizer=tokenizer, device=device, dtype=model.dtype
    )
    bridge.cfg.model_name = resolved.saved_name
    return bridge.eval()


def _load_hooked(resolved: ResolvedModel, model: Any, tokenizer: Any, device: str, context: int) -> Any:
    """Build SAELens' HookedSAETransformer from a loaded Hugging Face model, without any weight processing.

    HookedTransformer reads the config by name and guesses the architecture from the name; so the loaded config is
    written to a folder whose name misleads nobody, and that folder is registered while it loads.
    """
    from sae_italian.models.loud import LoudHooked
    from sae_italian.plugin import register_model, unregister_model

    with _plain_folder() as folder:
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        config.setdefault("n_ctx", getattr(model.config, "max_position_embeddings", context))  # GPT-2: asked for
        (folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
        register_model(str(folder), [])
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # TransformerLens prints
                warnings.simplefilter("ignore", DeprecationWarning)
                hooked = LoudHooked.from_pretrained_no_processing(
                    str(folder), hf_model=model, tokenizer=tokenizer, device=device, dtype=model.dtype, n_ctx=context
                )
        finally:
            unregister_model(str(folder))
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
    angles = torch.arange(context, dtype=torch.float32)[:, None] * rotary.inv_freq.float().cpu()[None, :]
    angles = torch.cat([angles, angles], dim=-1)
    for block in hooked.blocks:
        for name, values in (("rotary_sin", angles.sin()), ("rotary_cos", angles.cos())):
            old = getattr(block.attn, name)  # [positions, rotary_dim]; TransformerLens keeps 2048 and grows them itself
            if old.shape[1] != values.shape[1]:
                raise UsageError(f"RoPE turns {old.shape[1]} dimensions here, {values.shape[1]} there; use 'bridge'.")
            setattr(block.attn, name, (values * rotary.attention_scaling).to(old))


@contextlib.contextmanager
def _plain_folder() -> Iterator[Path]:
    """Yield a scratch folder whose path holds none of the pieces from which TransformerLens guesses."""

    def misleads(path: object) -> bool:
        return any(piece in str(path).lower() for piece in _MISLEADING_PATHS)

    places = [Path(parent).resolve() for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp", ".")]
    place = next((p for p in places if os.access(p, os.W_OK) and not misleads(p)), None)
    if place is None:
        raise UsageError(
            f"the backend 'hooked' needs a scratch folder without {', '.join(_MISLEADING_PATHS)} in its path. Set TMPDIR."
        )
    folder = Path(tempfile.mkdtemp(prefix="model-", dir=place))
    while misleads(folder):  # its random name can be unlucky
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="model-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _no_bars_in_a_pipe() -> Iterator[None]:
    """Keep transformers' progress bars for terminals: in a log file they are noise."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
