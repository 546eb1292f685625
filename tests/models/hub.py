"""A hub cache on disk, in the hub's own layout, with shrunken random copies of the catalogue's families."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch

REVISION = "0123456789abcdef0123456789abcdef01234567"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

# Same head dimension, KV ratio, window, context and vocabulary quirks as the hub's configs say; fewer layers and heads.
MISTRAL = {
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_hidden_layers": 2,
}
GPT2 = {"n_layer": 2, "bos_token_id": 0, "eos_token_id": 0}
SHRUNKEN: dict[str, dict[str, Any]] = {
    "sapienzanlp/Minerva-350M-base-v1.0": {
        **MISTRAL, "model_type": "mistral", "hidden_size": 288, "num_attention_heads": 4, "num_key_value_heads": 1,
        "intermediate_size": 512, "vocab_size": 1000, "sliding_window": 2048, "max_position_embeddings": 16384,
    },
    "sapienzanlp/Minerva-1B-base-v1.0": {
        **MISTRAL, "model_type": "mistral", "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1,
        "intermediate_size": 512, "vocab_size": 1000, "sliding_window": 2048, "max_position_embeddings": 16384,
    },
    "sapienzanlp/Minerva-3B-base-v1.0": {
        **MISTRAL, "model_type": "mistral", "hidden_size": 320, "num_attention_heads": 4, "num_key_value_heads": 1,
        "intermediate_size": 512, "vocab_size": 1000, "sliding_window": 2048, "max_position_embeddings": 16384,
    },
    "sapienzanlp/Minerva-7B-base-v1.0": {
        **MISTRAL, "model_type": "mistral", "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1,
        "intermediate_size": 512, "vocab_size": 51200, "sliding_window": None, "max_position_embeddings": 4096,
    },
    "sapienzanlp/Minerva-7B-instruct-v1.0": {
        **MISTRAL, "model_type": "mistral", "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1,
        "intermediate_size": 512, "vocab_size": 51264, "sliding_window": None, "max_position_embeddings": 4096,
        "eos_token_id": [2, 51202],
    },
    "LorenzoDeMattei/GePpeTto": {
        **GPT2, "model_type": "gpt2", "n_embd": 256, "n_head": 4, "vocab_size": 30000, "n_positions": 1024, "n_ctx": 1024,
    },
    "GroNLP/gpt2-small-italian": {
        **GPT2, "model_type": "gpt2", "n_embd": 256, "n_head": 4, "vocab_size": 30001, "n_positions": 1024, "pad_token_id": 0,
    },
    "GroNLP/gpt2-medium-italian-embeddings": {
        **GPT2, "model_type": "gpt2", "n_embd": 320, "n_head": 5, "vocab_size": 30001, "n_positions": 1024,
    },
    "goldfish-models/ita_latn_10mb": {
        **GPT2, "model_type": "gpt2", "n_embd": 256, "n_head": 4, "vocab_size": 51200, "n_positions": 512, "n_ctx": 512,
        "n_inner": 1024, "activation_function": "gelu", "bos_token_id": 50000, "eos_token_id": 50001,
    },
    "mii-llm/zagreus-0.4B-ita": {
        **MISTRAL, "model_type": "llama", "hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1,
        "intermediate_size": 512, "vocab_size": 4000, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    },
    "Almawave/Velvet-2B": {
        **MISTRAL, "model_type": "mistral", "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 512, "vocab_size": 4000, "sliding_window": None, "max_position_embeddings": 4096,
        "rope_theta": 1e6, "head_dim": 128,
    },
    "HPLT/hplt2c_ita_checkpoints": {
        **MISTRAL, "model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 512, "vocab_size": 4000, "max_position_embeddings": 2048,
    },
    "sapienzanlp/modello-italia-9b": {
        "model_type": "gpt_neox", "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2,
        "intermediate_size": 512, "vocab_size": 4000, "max_position_embeddings": 1024, "rotary_pct": 0.25,
        "use_parallel_residual": True, "bos_token_id": 1, "eos_token_id": 2,
    },
    "swap-uniba/LLaMAntino-2-7b-hf-ITA": {
        **MISTRAL, "model_type": "llama", "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 512, "vocab_size": 4000, "max_position_embeddings": 4096,
    },
    "swap-uniba/LLaMAntino-3-ANITA-8B-Inst-DPO-ITA": {
        **MISTRAL, "model_type": "llama", "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1,
        "intermediate_size": 512, "vocab_size": 4000, "max_position_embeddings": 8192, "rope_theta": 5e5,
    },
}  # fmt: skip


def random_model(config: dict[str, Any], seed: int = 0) -> Any:
    """Return a model with weights large enough that a wrong window, head order or norm shows in the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    fields = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **{"initializer_range": 0.05, **fields})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and ("norm" in name or "ln_" in name) and name.endswith("weight"):
                parameter.uniform_(0.7, 1.3)
    return model.eval()


def put_in_cache(cache: Path, repo_id: str, folder: Path, revision: str = REVISION) -> Path:
    """Store a folder's files as the hub's cache would: blobs by hash, links in snapshots/<revision>, refs/main."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / revision
    for sub in (repo / "blobs", repo / "refs", snapshot):
        sub.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(revision)
    for file in folder.rglob("*"):
        if not file.is_file():
            continue
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        if not blob.exists():
            shutil.copy(file, blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
    return snapshot


def save_model(model: Any, folder: Path) -> Path:
    """Save a model with the mini model's tokenizer, its config in the hub's older form (no head_dim, literal dtype)."""
    from sae_italian.models import catalogue

    model.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(Path(catalogue()["sae-italian-mini"].official) / file, folder)
    return folder
