"""Load one model by name with the library that suits the work: transformers, TransformerBridge or HookedTransformer."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sae_italian.errors import UsageError, nearest
from sae_italian.models.catalogue import ResolvedModel, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Backend = Literal["hf", "bridge", "hooked"]
BACKENDS = ("hf", "bridge", "hooked")
DTYPES = ("float32", "bfloat16", "float16")

# TransformerLens guesses the architecture from these pieces of a local path (reference/transformerlens.md 1.1).
_MISLEADING_PATHS = ("llama", "gemma", "bert", "t5", "wav2vec2")


def load_model(name: str, backend: Backend = "hf", *, dtype: str = "float32", device: str = "cpu") -> Any:
    """Return the model `name` in evaluation mode, with its tokenizer at `.tokenizer` whatever the backend.

    `hf` gives the transformers model (fastest for harvesting activations), `bridge` TransformerLens' TransformerBridge
    (raw, bit-exact), `hooked` SAELens' HookedSAETransformer without weight processing. Logits of the three agree
    within 1e-4 in float32.

    Raises: UsageError for an unknown name, backend or dtype, and when the weights can be neither found nor fetched.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r} is unknown. {nearest(backend, BACKENDS)}")
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown. {nearest(dtype, DTYPES)}")
    resolved = resolve(name)
    model = _load_hf(resolved, dtype)
    tokenizer = load_tokenizer(name)
    if backend == "bridge":
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(
            resolved.load_from, hf_model=model, tokenizer=tokenizer, device=device, dtype=model.dtype
        )
    if backend == "hooked":
        return _load_hooked(resolved, model, tokenizer, device)
    model.tokenizer = tokenizer
    return model.to(device)  # pyright: ignore[reportArgumentType]


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


def _load_hf(resolved: ResolvedModel, dtype: str):
    import torch
    from transformers import AutoModelForCausalLM

    return _fetch(AutoModelForCausalLM.from_pretrained, resolved, dtype=getattr(torch, dtype)).eval()


def _fetch(loader: Any, resolved: ResolvedModel, **arguments: Any) -> Any:
    """Call a `from_pretrained` and turn what goes wrong on the way to the files into one line."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    name = resolved.saved_name
    try:
        with _no_bars_in_a_pipe():
            return loader(resolved.load_from, **arguments)
    except (OSError, ValueError) as error:
        chain = []
        cause: BaseException | None = error
        while cause is not None:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        page = f"https://huggingface.co/{name}"
        if any(isinstance(e, GatedRepoError) for e in chain):
            raise UsageError(f"{name} is gated: accept its terms at {page}, then set HF_TOKEN.") from error
        if any(isinstance(e, RepositoryNotFoundError) for e in chain):
            raise UsageError(f"{name} is not on the hub, or is private: check the name, or set HF_TOKEN.") from error
        if any(isinstance(e, LocalEntryNotFoundError) for e in chain) or "offline" in str(error).lower():
            raise UsageError(
                f"{name} is not on this machine and the hub cannot be reached. Download it elsewhere with "
                f"`hf download {name}` and give the folder, or copy it into the Hugging Face cache."
            ) from error
        raise UsageError(f"{name} could not be loaded: {str(error).splitlines()[0]}") from error


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


def _load_hooked(resolved: ResolvedModel, model: Any, tokenizer: Any, device: str):
    """Build SAELens' HookedSAETransformer from a loaded Hugging Face model, without any weight processing."""
    from sae_lens import HookedSAETransformer

    from sae_italian.plugin import register_model

    context = min(model.config.max_position_embeddings, 4096)
    with tempfile.TemporaryDirectory(prefix="sae-italian-") as scratch:
        source = resolved.load_from
        if Path(source).is_dir():
            if any(piece in source.lower() for piece in _MISLEADING_PATHS):
                link = Path(scratch) / "model"
                link.symlink_to(source)
                source = str(link)
            register_model(source, [])
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # TransformerLens prints
            warnings.simplefilter("ignore", DeprecationWarning)
            hooked = HookedSAETransformer.from_pretrained_no_processing(
                source, hf_model=model, tokenizer=tokenizer, device=device, dtype=model.dtype, n_ctx=context
            )
    hooked.cfg.model_name = resolved.saved_name
    return hooked.eval()
