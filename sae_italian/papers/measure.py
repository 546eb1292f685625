"""What the papers measure of one SAE: its card, explanations and their scores, moments, examples, variance against L0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sae_italian.autointerp import AutointerpConfig, random_sae_control, run_autointerp, summarise
from sae_italian.autointerp.run import EXPLAINER, STORE_FILE
from sae_italian.autointerp.store import Store
from sae_italian.base.report import plain
from sae_italian.cache import FeatureCache, build_caches
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.evaluation import evaluate
from sae_italian.evaluation.diagnosis import held_out_activations
from sae_italian.papers.job import Reproduction, Subject
from sae_italian.saes.baselines import rescaled, with_top_k
from sae_italian.saes.fit import fit

WIDTH = 32  # tokens of a shown example
FIT_SHARE = 0.5  # of the tokens of a curve, for the one factor of random directions
_SIMULATION: dict[str, Any] = {"scorer": "simulation", "metric": "correlation", "negatives": "top-and-random"}
_DETECTION: dict[str, Any] = {"scorer": "detection", "metric": "balanced_accuracy", "negatives": "random"}
_PLAIN = ("standard", "topk", "jumprelu")  # architectures of one encoder and one decoder matrix


def card_of(sae: Any, subject: Subject, n_tokens: int, name: str, loss_tokens: int | None = None) -> dict[str, Any]:
    """Return the evaluation card of an SAE on held-out text of the subject, as JSON has it."""
    sizes = {"n_tokens": n_tokens, "loss_tokens": loss_tokens, **subject.reading}
    return plain(evaluate(sae, subject.model, subject.corpus, name=name, **sizes))


def held_out(sae: Any, subject: Subject, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Return what the SAE reads and what it is to give, [tokens, d_in] each, on held-out text."""
    return held_out_activations(sae, subject.model, subject.corpus, n_tokens, **subject.reading)[:2]


def scored(
    saes: Sequence[Any],
    subject: Subject,
    folders: list[Path],
    n_tokens: int,
    config: AutointerpConfig,
    names: list[str],
) -> list[dict[str, Any]]:
    """Explain and score the latents of SAEs by rule on the same held-out text, cached in a folder each; as JSON has it."""
    build_caches(
        list(saes),
        subject.model,
        subject.corpus,
        folders,
        n_tokens=n_tokens,
        split="heldout",
        sae_names=names,
        resume=True,
        **subject.reading,
    )
    opened = [(FeatureCache.open(folder), sae) for folder, sae in zip(folders, saes, strict=True)]
    stores = [run_autointerp(cache, subject.model.tokenizer, config, sae=sae) for cache, sae in opened]
    return [summarise(store).as_dict() for store in stores]


def score_sae(sae: Any, job: Reproduction, folder: Path, *, name: str, random_control: bool = False) -> dict[str, Any]:
    """Score an SAE's latents as `scored` does; return `autointerp` and, with the control, `random`.

    The cache stays in `folder` with its store, for `sae-italian browse`.
    """
    config = AutointerpConfig(latents=job.budget["latents"])
    (auto,) = scored([sae], job.subject, [folder], job.budget["cache_tokens"], config, [name])
    found = {"cache": str(folder), "autointerp": auto}
    if random_control:
        twin = random_sae_control(FeatureCache.open(folder), sae, job.subject.model, config)
        found["random"] = summarise(twin).as_dict()
    return found


def simulation_scores(store: Path) -> dict[int, float]:
    """Return the simulation score of each latent that has one, of its own explanation."""
    with Store(store, {}) as opened:
        return opened.values(explainer=EXPLAINER, control="", **_SIMULATION)


def moments(cache: FeatureCache, latent: int) -> tuple[float, float]:
    """Return skew and excess kurtosis of a latent's activation over all tokens, those on which it is silent included."""
    n = int((cache.doc != NO_DOCUMENT).sum())
    value = np.asarray(cache.latent(latent).value, dtype=np.float64)
    mean = value.sum() / n
    silent = n - len(value)
    second, third, fourth = (((value - mean) ** p).sum() + silent * (-mean) ** p for p in (2, 3, 4))
    if second <= 0:
        return float("nan"), float("nan")
    variance = second / n
    return float(third / n / variance**1.5), float(fourth / n / variance**2 - 3)


def examples(folder: Path, tokenizer: Any, n: int) -> list[dict[str, Any]]:
    """Return latents with explanation, scores and their strongest segment, by detection score: best, middling, worst.

    A third each; text between « » is where the latent is active.
    """
    cache = FeatureCache.open(folder, tokenizer=tokenizer)
    with Store(folder / STORE_FILE, {}) as store:
        said = {latent: found for latent, (_, found) in store.explanations(EXPLAINER).items() if found.status == "ok"}
        detection = store.values(explainer=EXPLAINER, control="", **_DETECTION)
    simulated = simulation_scores(folder / STORE_FILE)
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
            "example": strongest(cache, latent),
        }
        for latent in chosen
    ]


def strongest(cache: FeatureCache, latent: int) -> str:
    """Return the segment with a latent's largest activation, its active tokens between « »."""
    shown = cache.latent(latent).windows("top", 1, width=WIDTH).shown()[0]
    parts, at = [], 0
    for (start, end), value in zip(shown.spans.tolist(), shown.values.tolist(), strict=True):
        token = shown.text[start:end]
        parts += [shown.text[at:start], token.replace(token.strip(), f"«{token.strip()}»") if value > 0 else token]
        at = max(at, end)
    return " ".join("".join([*parts, shown.text[at:]]).split())


# --- explained variance against L0 (Cunningham et al. 2023, figure 6) --------------------------------------------------


def curves(dictionaries: dict[str, Any], subject: Subject, n_tokens: int) -> dict[str, list[dict[str, float]]]:
    """Return for each dictionary {k, l0, explained_variance (centred)} with its k = 1, 2, 4 ... strongest latents kept.

    Random directions get for each k the factor that reconstructs best on other tokens. An SAE with more than an encoder
    and a decoder (gated) has no curve.
    """
    rows, _ = held_out(next(iter(dictionaries.values())), subject, n_tokens)
    fitted, others = rows[: int(FIT_SHARE * len(rows))], rows[int(FIT_SHARE * len(rows)) :]
    found = {}
    for name, sae in dictionaries.items():
        if sae.cfg.architecture() not in _PLAIN:
            continue
        found[name] = []
        for power in range(min(sae.cfg.d_sae, sae.cfg.d_in).bit_length()):
            kept = with_top_k(sae, 2**power)
            kept = rescaled(kept, fitted) if name == "random" else kept
            fitted_to = fit(kept, others, others)
            found[name].append({"k": 2**power, "l0": fitted_to.l0, "explained_variance": fitted_to.explained_variance})
    return found
