"""Embedding, surprisal and intervention scores of explanations, for a draw of the latents that a store explains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sae_italian.autointerp.examples import ExampleSource
from sae_italian.autointerp.explainers.choose import EXPLAINER
from sae_italian.autointerp.judged import score_rows
from sae_italian.autointerp.negatives import NegativeSource
from sae_italian.autointerp.run import AutointerpConfig
from sae_italian.autointerp.scorers import embedding, intervention, surprisal
from sae_italian.autointerp.scorers.embedding import Encode
from sae_italian.autointerp.scorers.subject import N_PROMPTS, Forward
from sae_italian.autointerp.shown import segments
from sae_italian.autointerp.store import Store
from sae_italian.cache import FeatureCache

ENCODER, SUBJECT = "encoder", "subject"
N_SEGMENTS = 20  # positives of a latent, and as many negatives of each source: each costs forward passes


def score_with_models(
    cache: FeatureCache,
    tokenizer: Any,
    store: Path,
    config: AutointerpConfig,
    *,
    latents: int,
    encode: Encode | None = None,
    forward: Forward | None = None,
    sae: Any = None,
    explainer: str = EXPLAINER,
    language: str = "it",
) -> None:
    """Add to a store what an encoder and the subject model say of some of its explanations; goes on where it stopped.

    `encode` gives the embedding score (judge `encoder`); `forward` gives surprisal, and with `sae` intervention too (judge
    `subject`). `latents` explained latents are drawn at random with the run's seed.
    """
    source = ExampleSource(cache, width=config.width, seed=config.seed)
    negatives = NegativeSource(source)
    with Store(store, {}) as opened:
        explained = {row: e for row, e in opened.explanations(explainer).items() if e[1].status == "ok"}
        drawn = np.random.default_rng(config.seed).permutation(sorted(explained))[:latents].tolist()
        for judge, wanted in ((ENCODER, encode), (SUBJECT, forward)):
            if wanted is None:
                continue
            done = opened.scored(explainer, judge)
            for latent in tqdm([n for n in drawn if n not in done], desc=judge, unit="latent", disable=None):
                row_id, explanation = explained[latent]
                text = explanation.text(language)
                activity = source.activity(latent)
                shown = segments(source, activity, negatives.draw(latent, activity, "test", N_SEGMENTS))
                if judge == ENCODER and encode is not None:
                    scores = embedding(encode, text, shown, language)
                else:
                    assert forward is not None
                    scores = surprisal(forward, tokenizer, text, shown, language=language)
                    if sae is not None:
                        prompts = [e.tokens for e in shown if e.negatives == "random"][:N_PROMPTS]
                        direction = sae.W_dec[latent].detach()
                        scores.append(intervention(forward, tokenizer, direction, text, prompts, language=language))
                opened.add_scores(list(score_rows(row_id, latent, "", judge, scores)))
