"""circuit-tracer's feature files, which its graph pages and Neuronpedia's read beside a graph.

<out>/features/<scan>/<Cantor pair of layer and latent>.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_italian.base.errors import DataError
from sae_italian.base.storage import read_json, write_text
from sae_italian.browser.exports.fields import Check, in_order
from sae_italian.browser.exports.latents import Latents
from sae_italian.browser.exports.names import Names, cantor
from sae_italian.browser.exports.passages import Passage, rounded


def write(folder: Path, latents: Latents, names: Names, wanted: range, bar: Any) -> None:
    """Write a file for each of the wanted latents into `folder`; files that are there already are kept."""
    for latent in wanted:
        file = folder / f"{cantor(names.layer, latent)}.json"
        if not file.is_file():
            write_text(file, json.dumps(feature(latents, latent), ensure_ascii=False, allow_nan=False))
        bar.update(1)


def feature(latents: Latents, latent: int) -> dict[str, Any]:
    logits = latents.logits(latent)
    value = latents.cache.latent(latent).value
    top = latents.passages.top(latent)
    quantiles = [{"quantile_name": "Top activations", "examples": [_example(passage) for passage in top]}]
    for interval in latents.passages.intervals(latent, {passage.text for passage in top}):
        name = f"Activations from {interval.lo:.3g} to {interval.hi:.3g}"
        quantiles.append({"quantile_name": name, "examples": [_example(passage) for passage in interval.passages]})
    row = {
        "index": latent,
        "top_logits": logits["pos_str"],
        "bottom_logits": logits["neg_str"],
        "act_min": rounded(value.min()) if len(value) else 0.0,
        "act_max": rounded(value.max()) if len(value) else 0.0,
        "examples_quantiles": [quantile for quantile in quantiles if quantile["examples"]],
    }
    return in_order("circuit_feature", row)


def _example(passage: Passage) -> dict[str, Any]:
    return {
        "tokens": passage.tokens,
        "tokens_acts_list": passage.values,
        "train_token_ind": passage.anchor,
        "is_repeated_datapoint": False,
    }


def check(folder: Path, layer: int, wanted: range) -> dict[str, int]:
    """Check the file of each wanted latent; return the rows of each table. Raises: DataError at the first that is wrong."""
    checked = Check()
    for latent in wanted:
        file = folder / f"{cantor(layer, latent)}.json"
        if not file.is_file():
            raise DataError(f"{file} is missing: the file of latent {latent}. Write the export again.")
        row = read_json(file)
        checked("circuit_feature", row, file.name)
        if row["index"] != latent:
            raise DataError(f"{file} holds latent {row['index']}, not {latent}.")
        if row["act_max"] > 0 and not row["examples_quantiles"]:
            raise DataError(f"{file}: the latent is active but has no example.")
    return checked.finish()
