"""Explanations and their scores of one SAE inside a reproduction, and what the papers derive from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_italian.autointerp import AutointerpConfig, random_sae_control, run_autointerp, summarise
from sae_italian.autointerp.run import EXPLAINER, STORE_FILE
from sae_italian.autointerp.store import Store
from sae_italian.base.statistics import NOTHING, Estimate, bootstrap
from sae_italian.cache import FeatureCache, build_cache
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.evaluation import EvaluationCard, evaluate
from sae_italian.papers.subject import Subject

WIDTH = 32  # tokens of a shown example


def card_of(sae: Any, subject: Subject, n_tokens: int, name: str, loss_tokens: int | None = None) -> EvaluationCard:
    """Return the evaluation card of an SAE on held-out text of the subject."""
    return evaluate(
        sae,
        subject.model,
        subject.corpus,
        n_tokens=n_tokens,
        loss_tokens=loss_tokens,
        context_size=subject.context_size,
        text_column=subject.text_column,
        name=name,
    )


def score_sae(
    sae: Any,
    subject: Subject,
    folder: Path,
    *,
    name: str,
    n_tokens: int,
    latents: int | None,
    random_control: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Explain and score latents by rule on held-out text; return `autointerp` and, with the control, `random`.

    The cache stays in `folder` with its store, for `sae-italian browse`.
    """
    build_cache(
        sae,
        subject.model,
        subject.corpus,
        folder,
        n_tokens=n_tokens,
        split="heldout",
        context_size=subject.context_size,
        text_column=subject.text_column,
        sae_name=name,
        resume=folder.is_dir(),
    )
    cache = FeatureCache.open(folder)
    config = AutointerpConfig(latents=latents, seed=seed)
    store = run_autointerp(cache, subject.model.tokenizer, config, sae=sae)
    found = {"cache": str(folder), "autointerp": summarise(store).as_dict()}
    if random_control:
        found["random"] = summarise(random_sae_control(cache, sae, subject.model, config)).as_dict()
    return found


def simulation_scores(store: Path, draw: str = "top-and-random") -> dict[int, float]:
    """Return the simulation score of each latent that has one, of its own explanation."""
    with Store(store, {}) as opened:
        return opened.values(explainer=EXPLAINER, control="", scorer="simulation", metric="correlation", negatives=draw)


def moments(cache: FeatureCache, latent: int) -> tuple[float, float]:
    """Return skew and excess kurtosis of a latent's activation over all tokens, those on which it is silent included."""
    n = int((cache.doc != NO_DOCUMENT).sum())
    value = np.asarray(cache.latent(latent).value, dtype=np.float64)
    mean = value.sum() / n
    silent = n - len(value)
    second, third, fourth = (((value - mean) ** p).sum() + silent * (-mean) ** p for p in (2, 3, 4))
    if second <= 0:
        return float("nan"), float("nan")
    spread = second / n
    return float(third / n / spread**1.5), float(fourth / n / spread**2 - 3)


def correlation(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Estimate:
    """Return Pearson's correlation with its interval over the pairs (latents); NaN for fewer than three."""
    both = np.isfinite(x) & np.isfinite(y)
    x, y = np.asarray(x, dtype=np.float64)[both], np.asarray(y, dtype=np.float64)[both]
    if len(x) < 3:
        return NOTHING
    x, y = x - x.mean(), y - y.mean()
    sums = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)

    def pearson(total: Float[np.ndarray, "samples 6"]) -> Float[np.ndarray, " samples"]:
        n, a, b, aa, bb, ab = total.T
        return (ab / n - a * b / n**2) / np.sqrt((aa / n - (a / n) ** 2) * (bb / n - (b / n) ** 2))

    return bootstrap(sums, pearson)


def examples(folder: Path, tokenizer: Any, n: int) -> list[dict[str, Any]]:
    """Return latents with explanation, scores and their strongest segment, by detection score: best, middling, worst.

    A third each; text between « » is where the latent is active.
    """
    cache = FeatureCache.open(folder, tokenizer=tokenizer)
    with Store(folder / STORE_FILE, {}) as store:
        said = {latent: found for latent, (_, found) in store.explanations(EXPLAINER).items() if found.status == "ok"}
        detection = store.values(
            explainer=EXPLAINER, control="", scorer="detection", metric="balanced_accuracy", negatives="random"
        )
        simulated = store.values(
            explainer=EXPLAINER, control="", scorer="simulation", metric="correlation", negatives="top-and-random"
        )
    ranked = sorted((latent for latent in said if latent in detection), key=lambda latent: -detection[latent])
    third = max(1, n // 3)
    middle = max(0, len(ranked) // 2 - third // 2)
    chosen = dict.fromkeys([*ranked[:third], *ranked[middle : middle + third], *ranked[-third:]])
    return [
        {
            "latent": latent,
            "explanation_it": said[latent].text("it"),
            "explanation_en": said[latent].text("en"),
            "detection": detection[latent],
            "simulation": simulated.get(latent),
            "example": _strongest(cache, latent),
        }
        for latent in chosen
    ]


def _strongest(cache: FeatureCache, latent: int) -> str:
    """Return the segment with a latent's largest activation, its active tokens between « »."""
    shown = cache.latent(latent).windows("top", 1, width=WIDTH).shown()[0]
    parts, at = [], 0
    for (start, end), value in zip(shown.spans.tolist(), shown.values.tolist(), strict=True):
        token = shown.text[start:end]
        parts += [shown.text[at:start], token.replace(token.strip(), f"«{token.strip()}»") if value > 0 else token]
        at = max(at, end)
    return " ".join("".join([*parts, shown.text[at:]]).split())
