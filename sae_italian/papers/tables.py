"""The tables of the papers' comparisons, from their JSON results."""

from __future__ import annotations

from typing import Any

from sae_italian.papers.document import Table, markdown_table, shown

NAMES = {
    "sae": "SAE",
    "pca": "PCA",
    "ica": "ICA",
    "nmf": "NMF",
    "random": "random directions",
    "identity": "neurons",
}
_HEAD = (
    "dictionary",
    "latents",
    "L0",
    "explained variance",
    "perplexity",
    "simulation, top and random",
    "simulation, random only",
    "shuffled explanations",
    "scored",
)


def dictionary_name(name: str) -> str:
    """Return what a table calls a dictionary."""
    kind, _, suffix = name.partition("-")
    return NAMES.get(kind, kind) + (", top-k" if suffix else "")


def layer_table(layer: dict[str, Any]) -> Table:
    """Return the comparison at one layer; intervals are 95 %, over documents for the first, over latents for scores."""
    rows = []
    for row in layer["rows"]:
        name = dictionary_name(row["dictionary"]) + ("" if row["converged"] is not False else " (not converged)")
        rows.append(
            (
                name,
                shown(row["d_sae"]),
                shown(row["l0"]["value"], 1),
                shown(row["explained_variance"]),
                shown(row["perplexity"], 2),
                shown(row["simulation"]),
                shown(row["simulation_random"]),
                shown(row["shuffled_simulation"]["value"]),
                f"{row['n_explained']} of {row['n_latents']}",
            )
        )
    model = shown(layer["rows"][0]["perplexity_of_model"]["value"], 2)
    caption = f"{layer['hook_name']} (top-k at {layer['top_k']}; the model's own perplexity is {model})"
    return Table(caption, _HEAD, rows)


def baselines_markdown(result: dict[str, Any]) -> str:
    """Return the whole comparison as Markdown."""
    settings = result["settings"]
    lines = [
        f"# Baselines: {result['model']}",
        "",
        f"Text: {result['corpus']}. Baselines fitted on {settings['fit_tokens']:,} tokens of training text; the rest is "
        f"held-out text: {settings['card_tokens']:,} tokens for L0, explained variance (centred) and perplexity, "
        f"{settings['cache_tokens']:,} for explanations and simulations of up to {settings['latents']} live latents drawn "
        "at random. Simulation: correlation of simulated and true activations, mean over latents (Cunningham et al. "
        "2023); shuffled: with another latent's explanation.",
        "",
    ]
    for layer in result["layers"]:
        lines += [*markdown_table(layer_table(layer)), ""]
    return "\n".join([*lines, "![baselines](baselines.svg)", ""])
