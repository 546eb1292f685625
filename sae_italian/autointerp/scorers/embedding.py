"""Embedding score: are the latent's segments nearer to the explanation than silent ones, to a sentence encoder?

The explanation is put as the query of a retrieval task, the segments are the documents, the score is AUROC of the
cosines (Paulo et al. 2024). The encoder must know Italian. Encoders agree only weakly with people on Italian
explanations, so this comes beside the behavioural scores, never in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from sae_italian.autointerp.protocols import Example, Score, Verdicts
from sae_italian.autointerp.scorers.binary import answers_by_source, binary_metrics
from sae_italian.base.errors import UsageError

Encode = Callable[[Sequence[str]], Float[np.ndarray, "texts d"]]
QUERIES = {
    "it": "Instruct: Trova le frasi che potrebbero avere a che fare con la spiegazione.\nQuery:",
    "en": "Instruct: Retrieve sentences that could be related to the explanation.\nQuery:",
}


def embedding(encode: Encode, explanation: str, examples: Sequence[Example], language: str = "it") -> list[Score]:
    """Return AUROC of the cosine between the explanation and each segment, by negative source."""
    vectors = np.asarray(encode([QUERIES[language] + explanation, *(example.text for example in examples)]))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
    return ranking("embedding", unit[1:] @ unit[0], examples)


def ranking(scorer: str, strength: Float[np.ndarray, " n"], examples: Sequence[Example]) -> list[Score]:
    """Return AUROC of a strength of each example, by negative source; NaN strengths count as failed."""
    said = np.where(np.isfinite(strength), 1, -1)
    answers = answers_by_source(Verdicts(said, np.asarray(strength, dtype=np.float64)), examples)
    scores = []
    for (source, own), metrics in zip(answers.items(), binary_metrics(list(answers.values())), strict=True):
        failed = int((own.positive < 0).sum() + (own.negative < 0).sum())
        counts = (len(own.positive), len(own.negative), failed)
        scores.append(Score(scorer, source, {"auroc": metrics["auroc"]}, *counts))
    return scores


class Encoder:
    """A local sentence encoder: any Hugging Face encoder's folder, mean of the last hidden states over the tokens."""

    def __init__(self, folder: str | Path, *, batch_size: int = 32):
        """Raises: UsageError when the folder holds no model."""
        from transformers import AutoModel, AutoTokenizer

        if not (Path(folder) / "config.json").is_file():
            raise UsageError(
                f"{folder} holds no sentence encoder (no config.json). Give the folder of a multilingual one, "
                "such as a downloaded paraphrase-multilingual-mpnet-base-v2."
            )
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()
        self.batch_size = batch_size
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "texts d"]:
        """Return one vector per text; texts longer than the encoder's context are cut."""
        import torch

        vectors = []
        limit = min(getattr(self.model.config, "max_position_embeddings", 512), 512)
        for first in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                list(texts[first : first + self.batch_size]),
                padding=True,
                truncation=True,
                max_length=limit,
                return_tensors="pt",
                return_token_type_ids=False,
            )
            with torch.no_grad():
                hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][:, :, None].to(hidden.dtype)
            vectors.append(((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).float().numpy())
        return np.concatenate(vectors) if vectors else np.zeros((0, self.model.config.hidden_size))
