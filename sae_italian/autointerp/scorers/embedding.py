"""Embedding score: are the latent's segments nearer to the explanation than silent ones, to a sentence encoder?

The explanation is put as the query of a retrieval task, the segments are the documents, the score is AUROC of the
cosines (Paulo et al. 2024). The encoder must know Italian. Encoders agree only weakly with people on Italian
explanations, so this comes beside the behavioural scores, never in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_italian.autointerp.examples import LatentExamples
from sae_italian.autointerp.scorers import Asked, Score, scorer
from sae_italian.autointerp.scorers.binary import ranking
from sae_italian.base.errors import UsageError
from sae_italian.base.labels import Language

QUERIES = {
    "it": "Instruct: Trova le frasi che potrebbero avere a che fare con la spiegazione.\nQuery:",
    "en": "Instruct: Retrieve sentences that could be related to the explanation.\nQuery:",
}


@dataclass(frozen=True)
class EncoderJudge:
    """A judge that puts texts as vectors: `encode` turns n texts into an array [n, d]."""

    encode: Callable[[Sequence[str]], Float[np.ndarray, "texts d"]]
    language: Language = "it"
    name: str = "encoder"
    concurrency: int = 1


@scorer(needs="encode", metric="auroc")
def embedding(asked: Sequence[Asked], examples: LatentExamples) -> Iterator[tuple[Asked, Score]]:
    """Score the cosine between the explanation and each test segment."""
    strengths = []
    for one in asked:
        judge: Any = one.judge
        query = QUERIES[judge.language] + one.explanation.text(judge.language)
        vectors = np.asarray(judge.encode([query, *(example.text for example in examples.test)]))
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
        strengths.append(unit[1:] @ unit[0])
    yield from ranking(asked, examples, strengths)


class Encoder:
    """A local sentence encoder: any Hugging Face encoder's folder, mean of the last hidden states over the tokens."""

    def __init__(self, folder: str | Path):
        """Raises: UsageError when the folder holds no model."""
        from transformers import pipeline

        if not (Path(folder) / "config.json").is_file():
            raise UsageError(
                f"{folder} holds no sentence encoder (no config.json). Give the folder of a multilingual one, "
                "such as a downloaded paraphrase-multilingual-mpnet-base-v2."
            )
        self.read: Any = pipeline("feature-extraction", model=str(folder), return_tensors=True)

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "texts d"]:
        """Return one vector per text; texts longer than the encoder's context are cut."""
        limit = min(getattr(self.read.model.config, "max_position_embeddings", 512), 512)
        form = {"truncation": True, "max_length": limit, "return_token_type_ids": False}
        return np.stack(
            [hidden[0].mean(dim=0).float().numpy() for hidden in self.read(list(texts), tokenize_kwargs=form)]
        )
