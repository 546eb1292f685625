"""Train the embedded mini model on MicroItaliano, tokenizer first: `python -m tests.bench.train_mini`.

The model is Minerva in small: MistralForCausalLM with grouped-query attention, a sliding window shorter than the
context, untied embeddings, and a Llama-style BPE tokenizer with byte fallback that puts one BOS in front. Everything is
seeded; the command, seed, losses and time are written beside the weights in training.json.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import cyclopts
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from sae_italian.base.storage import package_versions
from sae_italian.corpora import Split, iter_documents, pack

SPECIAL = ["<unk>", "<s>", "</s>"]


@dataclass(frozen=True)
class Recipe:
    """Sizes in tokens where nothing else is said."""

    vocab_size: int = 2560
    tokenizer_documents: int = 20_000
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    d_mlp: int = 384
    window: int = 64
    max_context: int = 512
    context_size: int = 128
    batch_windows: int = 32
    steps: int = 3_000
    lr: float = 4e-3
    warm_up_steps: int = 100
    weight_decay: float = 0.1
    seed: int = 0


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a Llama-style BPE tokenizer: Metaspace, byte fallback, ids 0 to 2 for <unk>, <s>, </s>, BOS in front."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True))
    # A word takes its space, and an elided one its apostrophe («▁l'»); punctuation and each digit stand alone.
    words = pre_tokenizers.Split(Regex(r"▁?\p{L}+['’]?|▁?\d|▁?[^\p{L}\d▁]|▁"), behavior="isolated")
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([metaspace, words])  # pyright: ignore
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # Byte tokens must be ordinary vocabulary: as special tokens they would match literally and vanish when decoding.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True)),
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe) -> MistralForCausalLM:
    """Return the model with its first weights, which the seed decides."""
    torch.manual_seed(recipe.seed)
    config = MistralConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_kv_heads,
        head_dim=recipe.d_model // recipe.n_heads,
        max_position_embeddings=recipe.max_context,
        sliding_window=recipe.window,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    return MistralForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, split: Split) -> Iterator[Tensor]:
    """Yield token batches [batch_windows, context_size] of MicroItaliano without end."""
    documents = iter_documents("micro-italiano", split)
    for block in pack(documents, tokenizer, recipe.context_size, windows_per_block=recipe.batch_windows):
        yield torch.from_numpy(block.tokens)


def loss_of(model: MistralForCausalLM, tokens: Tensor) -> Tensor:
    """Return the mean next-token loss in nats; predicting a BOS counts as the end of a document."""
    return model(input_ids=tokens, labels=tokens).loss


@torch.no_grad()
def held_out_loss(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> float:
    """Return the mean loss of 20 batches that training does not see."""
    model.eval()
    losses = [loss_of(model, tokens).item() for tokens in islice(batches(tokenizer, recipe, "heldout"), 20)]
    model.train()
    return sum(losses) / len(losses)


def train(recipe: Recipe) -> tuple[MistralForCausalLM, PreTrainedTokenizerFast, list[dict[str, float]]]:
    """Train tokenizer and model; return them with the losses, every 250 steps."""
    documents = islice(iter_documents("micro-italiano", "train"), recipe.tokenizer_documents)
    tokenizer = train_tokenizer((document.text for document in documents), recipe.vocab_size)
    model = build_model(recipe)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)

    def schedule(step: int) -> float:
        warm = min(1.0, (step + 1) / recipe.warm_up_steps)
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    curve: list[dict[str, float]] = []
    bar = tqdm(islice(batches(tokenizer, recipe, "train"), recipe.steps), total=recipe.steps, desc="mini model")
    for step, tokens in enumerate(bar, 1):
        with torch.autocast("cpu", torch.bfloat16):  # half again as fast here, same loss to the third digit
            loss = loss_of(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 250 == 0 or step == recipe.steps:
            held_out = held_out_loss(model, tokenizer, recipe)
            curve.append({"step": step, "train_loss": round(loss.item(), 4), "held_out_loss": round(held_out, 4)})
            bar.set_postfix(held_out=f"{held_out:.3f}")
    return model.eval(), tokenizer, curve


def main(
    *,
    out: Path = Path(__file__).parents[2] / "sae_italian" / "models" / "mini",
    steps: int = 3_000,
    seed: int = 0,
    threads: int = 2,
) -> None:
    """Train the embedded model and write its weights in half precision, its tokenizer and the training record.

    Args:
        out: Folder for the model.
        steps: Optimizer steps.
        seed: Seed of the first weights.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    recipe = Recipe(steps=steps, seed=seed)
    started = time.time()
    model, tokenizer, curve = train(recipe)
    record = {
        "command": " ".join(["python -m tests.bench.train_mini", *sys.argv[1:]]),
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": steps * recipe.batch_windows * recipe.context_size,
        "minutes": round((time.time() - started) / 60, 1),
        "threads": threads,
        "held_out_loss_nats": curve[-1]["held_out_loss"],
        "curve": curve,
        "recipe": asdict(recipe),
        "versions": package_versions(),
    }
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{out}: {record['parameters']:,} parameters, held-out loss {record['held_out_loss_nats']} nats")


if __name__ == "__main__":
    cyclopts.run(main)
