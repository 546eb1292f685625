"""Cunningham et al. 2023 (arXiv 2309.08600), the whole evaluation: baselines, sparsity, dictionary sizes, moments, IOI."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from sae_italian.autointerp.run import STORE_FILE
from sae_italian.cache import FeatureCache
from sae_italian.papers.baselines import SAE, Settings, compare_layer, perplexity
from sae_italian.papers.document import Section, Table, shown
from sae_italian.papers.job import RATIO, Job, Results, Step, variant
from sae_italian.papers.patching import PATCHING
from sae_italian.papers.pictures import baselines_svg, sweep_svg
from sae_italian.papers.scoring import card_of, correlation, moments, score_sae, simulation_scores
from sae_italian.papers.subject import layer_of
from sae_italian.papers.tables import dictionary_name, layer_table
from sae_italian.saes import load_sae
from sae_italian.saes.baselines import TOPK

MOST_LAYERS = 3


def _settings(job: Job) -> Settings:
    names = {field.name for field in fields(Settings)}
    given = {key: value for key, value in job.budget.items() if key in names}
    return Settings(**{**given, "kinds": tuple(given["kinds"])})


def middle(results: Results) -> dict[str, Any]:
    """Return the entry of the middle layer among those that have an SAE."""
    saes = results["saes"]["saes"]
    return saes[len(saes) // 2]


# --- the SAEs -------------------------------------------------------------------------------------------------------


def _saes(job: Job, _: Results) -> dict[str, Any]:
    if job.sae is not None:
        sae = load_sae(job.sae)
        folders = {layer_of(sae): job.sae}
    else:
        d_sae = RATIO * job.subject.d_in
        folders = {
            layer: str(job.train(f"L{layer}", f"blocks.{layer}.hook_resid_post", d_sae, job.budget["train_tokens"]))
            for layer in job.layers(MOST_LAYERS)
        }
    found = []
    for layer, folder in folders.items():
        cfg = load_sae(folder).cfg
        found.append(
            {
                "layer": layer,
                "folder": folder,
                "hook_name": cfg.metadata.hook_name,
                "architecture": cfg.architecture(),
                "d_in": cfg.d_in,
                "d_sae": cfg.d_sae,
            }
        )
    return {"saes": found, "given": job.sae is not None}


def _saes_section(result: dict[str, Any], _: Results) -> Section:
    rows = [
        (str(row["layer"]), row["hook_name"], row["architecture"], shown(row["d_in"]), shown(row["d_sae"]))
        for row in result["saes"]
    ]
    table = Table("", ("layer", "hook", "architecture", "d_in", "latents"), rows)
    if result["given"]:
        text = "The SAE was given; it is not one of the paper's tied L1 SAEs unless it says so.", "La SAE è stata data."
    else:
        text = (
            "Tied L1 SAEs with R = 2, trained here; the paper's recipe, scaled. Saved as SAELens' standard.",
            "SAE L1 a pesi legati con R = 2, addestrate qui con la ricetta dell'articolo, in scala.",
        )
    return Section(("The SAEs", "Le SAE"), text, [table])


# --- baselines ------------------------------------------------------------------------------------------------------


def _baselines(job: Job, results: Results) -> dict[str, Any]:
    layers = [
        compare_layer(
            load_sae(entry["folder"]),
            job.subject,
            job.out / "baselines" / f"L{entry['layer']}",
            _settings(job),
            sae_name=str(Path(entry["folder"]).resolve()) if Path(entry["folder"]).is_dir() else entry["folder"],
        )
        for entry in results["saes"]["saes"]
    ]
    return {"layers": layers, **derived(layers)}


def derived(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the paper says about its figures, of ours: best baseline, gap closed by top-k, perplexity."""
    best, factor = [], []
    closed: dict[str, list[float]] = {"pca": [], "ica": []}
    neurons: list[float] = []
    for layer in layers:
        value = {row["dictionary"]: row["simulation"]["value"] for row in layer["rows"]}
        relu = {
            name: number
            for name, number in value.items()
            if name != SAE and not name.endswith(TOPK) and number is not None
        }
        if relu and value[SAE] is not None:
            name = max(relu, key=lambda key: relu[key])
            best.append(f"layer {layer['layer']}: {dictionary_name(name)} {relu[name]:.3f}, SAE {value[SAE]:.3f}")
        for kind, shares in closed.items():
            with_relu, with_topk = value.get(kind), value.get(kind + TOPK)
            if with_relu is not None and with_topk is not None and (value[SAE] or -1.0) > with_relu:
                shares.append((with_topk - with_relu) / (value[SAE] - with_relu))
        if None not in (value.get("identity"), value.get("random")):
            neurons.append(value["identity"] - value["random"])
        row = layer["rows"][0]
        clean, put = row["perplexity_of_model"]["value"], row["perplexity"]["value"]
        factor.append(f"layer {layer['layer']}: {clean:.2f} to {put:.2f}, a factor {put / clean:.2f}")
    shares = [f"{dictionary_name(kind)} {100 * np.mean(found):.0f} %" for kind, found in closed.items() if found]
    return {
        "best_relu": "; ".join(best) or None,
        "gap_closed": ", ".join(shares) or None,
        "neurons_minus_random": float(np.mean(neurons)) if neurons else None,
        "perplexity_factor": "; ".join(factor),
    }


def _baselines_section(result: dict[str, Any], _: Results) -> Section:
    text = (
        "Each dictionary with ReLU alone and with top-k at the SAE's own mean L0; simulation by the rule judge, mean over "
        "live latents drawn at random with 95 % intervals; perplexity with the reconstruction in place of the activation.",
        "Ogni dizionario con sola ReLU e con top-k all'L0 medio della SAE; simulazione del giudice a regole, media sui "
        "latenti vivi estratti a caso con intervalli al 95 %; perplessità con la ricostruzione al posto dell'attivazione.",
    )
    tables = [layer_table(layer) for layer in result["layers"]]
    title = ("Baselines (figures 2 and 9, appendix G)", "Termini di confronto")
    return Section(title, text, tables, [("baselines", baselines_svg(result))])


# --- sparsity and size ----------------------------------------------------------------------------------------------


def _sparsity(job: Job, results: Results) -> dict[str, Any]:
    """Train the middle layer's SAE with other L1 coefficients: L0, FVU, dead latents, perplexity (figure 6)."""
    job.only_trained()
    entry = middle(results)
    points = []
    for factor in sorted([*job.budget["l1"], 1.0]):
        coefficient = job.values(1)["sae"]["l1_coefficient"] * factor
        folder = _variant(job, entry, factor, RATIO)
        card = card_of(load_sae(folder), job.subject, job.budget["card_tokens"], folder.name).as_dict()
        kept = {key: card[key] for key in ("l0", "explained_variance", "fvu", "dead")}
        points.append({"l1": coefficient, **kept, "perplexity": perplexity(card["ce_loss_with_sae"])})
    return {"layer": entry["layer"], "points": points}


def _variant(job: Job, entry: dict[str, Any], factor: float, ratio: float) -> Path:
    """Train an SAE with another L1 coefficient or ratio, all of these on equally many tokens; return its folder."""
    from sae_italian.training.config import read_values

    own = float(read_values(job.paper.recipe)["sae"]["l1_coefficient"])
    name = variant(entry["layer"], ratio, factor)
    d_sae, n_tokens = round(ratio * entry["d_in"]), job.budget["sweep_tokens"]
    return job.train(name, entry["hook_name"], d_sae, n_tokens, f"sae.l1_coefficient={factor * own}")


def _sparsity_section(result: dict[str, Any], results: Results) -> Section:
    rows = [
        (
            f"{point['l1']:.3g}",
            shown(point["l0"], 1),
            shown(point["fvu"]),
            shown(point["dead"], percent=True),
            shown(point["perplexity"], 2),
        )
        for point in result["points"]
    ]
    table = Table(f"layer {result['layer']}", ("L1 coefficient", "L0", "FVU", "dead latents", "perplexity"), rows)
    layer = next(layer for layer in results["baselines"]["layers"] if layer["layer"] == result["layer"])
    text = (
        "The same SAE with other L1 coefficients, and the baselines with their k strongest latents kept.",
        "La stessa SAE con altri coefficienti L1, e i termini di confronto con i soli k latenti più forti.",
    )
    title = ("Sparsity against variance unexplained (figure 6)", "Sparsità e varianza non spiegata")
    return Section(title, text, [table], [("sparsity", sweep_svg(result["points"], layer))])


def _ratios(job: Job, results: Results) -> dict[str, Any]:
    """Score the middle layer's SAE at other widths (figures 8 and 16)."""
    job.only_trained()
    entry = middle(results)
    rows = []
    for ratio in sorted([*job.budget["ratios"], RATIO]):
        name = f"L{entry['layer']}-{ratio:g}x"
        folder = _variant(job, entry, 1.0, ratio)
        sae = load_sae(folder)
        card = card_of(sae, job.subject, job.budget["card_tokens"], name).as_dict()
        scores = score_sae(
            sae,
            job.subject,
            job.out / "ratios" / name,
            name=name,
            n_tokens=job.budget["cache_tokens"],
            latents=job.budget["latents"],
        )["autointerp"]
        rows.append(
            {
                "ratio": ratio,
                "d_sae": sae.cfg.d_sae,
                **{key: card[key] for key in ("l0", "explained_variance", "dead")},
                **{key: scores[key] for key in ("simulation", "simulation_random", "n_explained", "n_latents")},
            }
        )
    said = "; ".join(f"R = {row['ratio']:g}: {shown(row['simulation']['value'])}" for row in rows)
    alive = "; ".join(f"R = {row['ratio']:g}: {row['ratio'] * (1 - row['dead']['value']):.2f} d_in" for row in rows)
    return {"layer": entry["layer"], "rows": rows, "scores": said, "alive": alive}


def _ratios_section(result: dict[str, Any], _: Results) -> Section:
    head = ("R", "latents", "L0", "explained variance", "dead", "simulation, top and random", "random only")
    rows = [
        (
            f"{row['ratio']:g}",
            shown(row["d_sae"]),
            shown(row["l0"]["value"], 1),
            shown(row["explained_variance"]),
            shown(row["dead"], percent=True),
            shown(row["simulation"]),
            shown(row["simulation_random"]),
        )
        for row in result["rows"]
    ]
    text = (
        "Dictionary ratios R = d_sae / d_in at one layer.",
        "Rapporti R = d_sae / d_in in uno strato.",
    )
    table = Table(f"layer {result['layer']}", head, rows)
    return Section(("Dictionary size (figures 8 and 16)", "Ampiezza del dizionario"), text, [table])


# --- scores and the shape of activations ----------------------------------------------------------------------------


def _moments(job: Job, results: Results) -> dict[str, Any]:
    """Correlate each latent's score with skew and kurtosis of its activation, over the SAEs of all layers."""
    score, skew, kurtosis = [], [], []
    for entry in results["saes"]["saes"]:
        folder = job.out / "baselines" / f"L{entry['layer']}" / "caches" / SAE
        cache = FeatureCache.open(folder)
        for latent, value in simulation_scores(folder / STORE_FILE).items():
            shape = moments(cache, latent)
            score.append(value)
            skew.append(shape[0])
            kurtosis.append(shape[1])
    columns = [np.array(column) for column in (score, skew, kurtosis)]
    return {
        "n_latents": len(score),
        "skew": correlation(columns[0], columns[1]).as_dict(),
        "kurtosis": correlation(columns[0], columns[2]).as_dict(),
    }


def _moments_section(result: dict[str, Any], _: Results) -> Section:
    rows = [("skew", shown(result["skew"])), ("kurtosis", shown(result["kurtosis"]))]
    text = (
        f"Correlation of simulation score and shape of the activation over {result['n_latents']} latents.",
        f"Correlazione tra punteggio di simulazione e forma dell'attivazione su {result['n_latents']} latenti.",
    )
    table = Table("", ("moment", "correlation with the score"), rows)
    return Section(("Scores and moments (section 3)", "Punteggi e momenti"), text, [table])


STEPS = (
    Step("saes", ("The SAEs", "Le SAE"), _saes, _saes_section),
    Step("baselines", ("Baselines", "Termini di confronto"), _baselines, _baselines_section),
    Step("sparsity", ("Sparsity", "Sparsità"), _sparsity, _sparsity_section, True),
    Step("ratios", ("Dictionary size", "Ampiezza del dizionario"), _ratios, _ratios_section, True),
    Step("moments", ("Scores and moments", "Punteggi e momenti"), _moments, _moments_section),
    *PATCHING,
)
