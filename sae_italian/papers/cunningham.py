"""Cunningham et al. 2023 (arXiv 2309.08600), the whole evaluation: baselines, sparsity, dictionary sizes, moments, IOI.

IOI (section 4): the paper compares dictionaries of four latents per dimension and four L1 coefficients with PCA, on 50
pairs at layer 11 of 24: what a sparse dictionary does not reconstruct keeps it from the target, however many latents are
patched. Here it is the middle one of the SAEs there are, and those of smaller L1 coefficients, once the model is known to
do the task.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sae_italian.analysis import check_able, ioi_pairs, ioi_score, patch_saes, thresholds, words_for
from sae_italian.autointerp.run import STORE_FILE
from sae_italian.base.pace import time_bound
from sae_italian.base.report import plain
from sae_italian.base.statistics import correlation
from sae_italian.cache import FeatureCache
from sae_italian.papers import measure
from sae_italian.papers.job import RATIO, Reproduction, Results, Step, facts_of
from sae_italian.papers.measure import SAE, Settings, card_of, compare_layer, score_sae
from sae_italian.papers.report import baselines_svg, dictionary_name, shown, sweep_svg
from sae_italian.saes import full_name, load_sae
from sae_italian.saes.baselines import TOPK
from sae_italian.training import read_values

MOST_LAYERS = 3
LEAST_CHECKED = 30  # of how many sentences the skill is asked, however few are patched
CLOSED = ("pca", "ica")  # baselines whose gap to the SAE top-k may close
_RATIO_SCORES = ("simulation", "simulation_random", "n_explained", "n_latents")


def _saes(job: Reproduction, _: Results) -> dict[str, Any]:
    """Train a tied L1 SAE at each layer, or take the one that was given."""
    sizes, layers = (RATIO * job.subject.d_in, job.budget["train_tokens"]), job.layers(MOST_LAYERS)
    folders = (
        [job.sae]
        if job.sae is not None
        else [str(job.train(f"L{layer}", f"blocks.{layer}.hook_resid_post", *sizes)) for layer in layers]
    )
    return {"saes": list(map(facts_of, folders)), "given": job.sae is not None}


def middle(results: Results) -> dict[str, Any]:
    """Return the entry of the middle layer among those that have an SAE."""
    saes = results["saes"]["saes"]
    return saes[len(saes) // 2]


def _baselines(job: Reproduction, results: Results) -> dict[str, Any]:
    """Set each SAE beside its baselines."""
    given = {field.name: job.budget[field.name] for field in fields(Settings) if field.name in job.budget}
    given["kinds"] = tuple(given["kinds"])
    settings, layers = Settings(**given), []
    for entry in results["saes"]["saes"]:
        folder, out = entry["folder"], job.out / "baselines" / f"L{entry['layer']}"
        layers.append(compare_layer(load_sae(folder), job.subject, out, settings, sae_name=full_name(folder)))
    return {"layers": layers, **derived(layers), "svg": baselines_svg(layers)}


def derived(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the paper says about its figures, of ours: best baseline, gap closed by top-k, perplexity."""
    rows: Any = pd.DataFrame([{**row, "at": at} for at, layer in enumerate(layers) for row in layer["rows"]])
    for key in ("simulation", "perplexity", "perplexity_of_model"):
        rows[key] = [np.nan if estimate["value"] is None else estimate["value"] for estimate in rows[key]]
    score = rows.pivot(index="at", columns="dictionary", values="simulation")
    relu = score.loc[score[SAE].notna(), [name for name in score if name != SAE and not name.endswith(TOPK)]]
    best = [
        f"layer {layers[at]['layer']}: {dictionary_name(name)} {relu[name][at]:.3f}, SAE {score[SAE][at]:.3f}"
        for at, name in (relu.dropna(how="all").idxmax(axis=1).items() if relu.size else ())
    ]
    score = score.reindex(columns=[SAE, "identity", "random", *(kind + top for kind in CLOSED for top in ("", TOPK))])
    gap = {kind: score[SAE] - score[kind] for kind in CLOSED}
    closed = {kind: ((score[kind + TOPK] - score[kind]) / gap[kind][gap[kind] > 0]).mean() for kind in CLOSED}
    neurons = (score["identity"] - score["random"]).mean()
    factor = [
        f"layer {layers[row['at']]['layer']}: {row['perplexity_of_model']:.2f} to {row['perplexity']:.2f}, "
        f"a factor {row['perplexity'] / row['perplexity_of_model']:.2f}"
        for row in rows[rows["dictionary"] == SAE].to_dict("records")
    ]
    shares = [f"{dictionary_name(kind)} {100 * share:.0f} %" for kind, share in closed.items() if pd.notna(share)]
    return {
        "best_relu": "; ".join(best) or None,
        "gap_closed": ", ".join(shares) or None,
        "neurons_minus_random": float(neurons) if pd.notna(neurons) else None,
        "perplexity_factor": "; ".join(factor),
    }


def variant(layer: int, ratio: float, factor: float) -> str:
    """Return the name of the SAE with so many latents per dimension and its L1 coefficient times a factor."""
    return f"L{layer}-{ratio:g}x-l1-{factor:g}"


def _variant(job: Reproduction, entry: dict[str, Any], factor: float, ratio: float) -> Path:
    """Train an SAE with another L1 coefficient or ratio, all of these on equally many tokens; return its folder."""
    own = float(read_values(job.paper.recipe)["sae"]["l1_coefficient"])
    name = variant(entry["layer"], ratio, factor)
    d_sae, n_tokens = round(ratio * entry["d_in"]), job.budget["sweep_tokens"]
    return job.train(name, entry["hook_name"], d_sae, n_tokens, f"sae.l1_coefficient={factor * own}")


def _sparsity(job: Reproduction, results: Results) -> dict[str, Any]:
    """Train the middle layer's SAE with other L1 coefficients: L0, FVU, dead latents, perplexity (figure 6)."""
    entry, points = middle(results), []
    for factor in sorted([*job.budget["l1"], 1.0]):
        coefficient = job.values(1)["sae"]["l1_coefficient"] * factor
        folder = _variant(job, entry, factor, RATIO)
        card = card_of(load_sae(folder), job.subject, job.budget["card_tokens"], folder.name)
        kept = {key: card[key] for key in ("l0", "explained_variance", "fvu", "dead")}
        kept |= {"perplexity": measure.perplexity(card["ce_loss_with_sae"])}
        points.append({"l1": coefficient, **kept})
    layer = next(layer for layer in results["baselines"]["layers"] if layer["layer"] == entry["layer"])
    return {"layer": entry["layer"], "points": points, "svg": sweep_svg(points, layer)}


def _ratios(job: Reproduction, results: Results) -> dict[str, Any]:
    """Score the middle layer's SAE at other widths (figures 8 and 16)."""
    entry, rows = middle(results), []
    for ratio in sorted([*job.budget["ratios"], RATIO]):
        name = f"L{entry['layer']}-{ratio:g}x"
        sae = load_sae(_variant(job, entry, 1.0, ratio))
        card = card_of(sae, job.subject, job.budget["card_tokens"], name)
        scores = score_sae(sae, job, job.out / "ratios" / name, name=name)["autointerp"]
        both = ((card, ("l0", "explained_variance", "dead")), (scores, _RATIO_SCORES))
        rows.append({"ratio": ratio, "d_sae": sae.cfg.d_sae} | {key: part[key] for part, keys in both for key in keys})
    said = "; ".join(f"R = {row['ratio']:g}: {shown(row['simulation']['value'])}" for row in rows)
    alive = "; ".join(f"R = {row['ratio']:g}: {row['ratio'] * (1 - row['dead']['value']):.2f} d_in" for row in rows)
    return {"layer": entry["layer"], "rows": rows, "scores": said, "alive": alive}


def _moments(job: Reproduction, results: Results) -> dict[str, Any]:
    """Correlate each latent's score with skew and kurtosis of its activation, over the SAEs of all layers."""
    found = []
    for entry in results["saes"]["saes"]:
        folder = job.out / "baselines" / f"L{entry['layer']}" / "caches" / SAE
        cache = FeatureCache.open(folder)
        found += [
            (score, *measure.moments(cache, latent))
            for latent, score in measure.simulation_scores(folder / STORE_FILE).items()
        ]
    score, skew, kurtosis = np.array(found).reshape(-1, 3).T
    correlations = {"skew": correlation(score, skew), "kurtosis": correlation(score, kurtosis)}
    return {"n_latents": len(found), **plain(correlations)}


def _ioi(job: Reproduction, results: Results) -> dict[str, Any]:
    """Patch on pairs of Italian sentences. Raises: UsageError, which skips the step, for a model without the skill."""
    entry, budget, subject = middle(results), job.budget, job.subject
    tokenizer = subject.model.tokenizer
    n = max(LEAST_CHECKED, budget["ioi_pairs"])
    pairs = ioi_pairs(n, tokenizer, words_for(subject.name), n_name_tokens=None, seed=0)
    skill = check_able(ioi_score(subject.model, tokenizer, pairs), "indirect object", subject.name)
    accuracy = f"{100 * skill.accuracy.value:.0f} %"
    folder = job.out / "baselines" / f"L{entry['layer']}" / "dictionaries"
    dictionaries = {"SAE": load_sae(entry["folder"])}
    for factor in sorted(factor for factor in budget["l1"] if factor < 1):
        less_sparse = job.out / "saes" / variant(entry["layer"], RATIO, factor)
        if less_sparse.is_dir():
            dictionaries[f"SAE, L1 x {factor:g}"] = load_sae(less_sparse)
    if "pca" in budget["kinds"]:
        dictionaries |= {"PCA": load_sae(folder / "pca"), "PCA, top-k": load_sae(folder / ("pca" + TOPK))}
    steps = thresholds(budget["ioi_thresholds"])
    with time_bound(budget["ioi_minutes"]) as cut:
        found = patch_saes(subject.model, tokenizer, dictionaries, pairs[: budget["ioi_pairs"]], thresholds=steps)
    half = []
    for curve in found.curves:
        point = curve.reached(0.5)
        said = "never" if point is None else f"{point.n_patched} (edit {point.magnitude:.2f})"
        half.append(f"{curve.name} {said}")
    facts = {"layer": entry["layer"], "skill": plain(skill), "accuracy": accuracy, "half": "; ".join(half)}
    facts |= {**found.as_dict(), "cut_short": cut}
    return {**facts, "table": [*found.table().splitlines(), "", *cut], "svg": found.svg()}


STEPS: dict[str, Step] = {
    "saes": _saes,
    "baselines": _baselines,
    "sparsity": _sparsity,
    "ratios": _ratios,
    "moments": _moments,
    "ioi": _ioi,
}
