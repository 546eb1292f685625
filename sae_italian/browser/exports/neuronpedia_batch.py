"""Neuronpedia's batch JSON: the folder that SAEDashboard's runner writes, and that their converter and importer read.

    <out>/<model>_<set>_<hook_name>_<d_sae>[_<suffix>]/batch-<k>.json, run_settings.json, skipped_indexes.json

Left out: `tokens_<n>.pt`, a pickle that only their runner reads. Token strings come from character offsets, intervals
hold no zeros, and no passage of a latent is there twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_italian.base.errors import DataError
from sae_italian.base.storage import read_json, write_text
from sae_italian.browser.exports.fields import Check, in_order
from sae_italian.browser.exports.latents import Latents
from sae_italian.browser.exports.names import Names
from sae_italian.browser.exports.passages import Interval, Passage, rounded

BATCH = 128  # latents per file, as the runner's default


def folder_name(names: Names, manifest: Any) -> str:
    ending = f"_{names.suffix}" if names.suffix else ""
    return f"{names.model}_{names.source_set}_{manifest.hook_name}_{manifest.d_sae}{ending}"


def write(folder: Path, latents: Latents, names: Names, wanted: range, bar: Any) -> None:
    """Write the batches of the wanted latents into `folder`; batches that are there already are kept."""
    for number, first in enumerate(range(wanted.start, wanted.stop, BATCH)):
        batch = range(first, min(first + BATCH, wanted.stop))
        file = folder / f"batch-{number}.json"
        if not file.is_file():
            row = {
                "model_id": names.model,
                "layer": names.layer,
                "sae_set": names.source_set,
                "sae_id_suffix": names.suffix,
                "features": [feature(latents, latent) for latent in batch],
            }
            write_text(file, json.dumps(row, ensure_ascii=False, allow_nan=False))
        bar.update(len(batch))
    n_batches = len(range(wanted.start, wanted.stop, BATCH))
    settings = _settings(latents, names, folder, n_batches)
    write_text(folder / "run_settings.json", json.dumps(settings, ensure_ascii=False, indent=2))
    skipped = {
        "model_id": names.model,
        "layer": str(names.layer),
        "sae_set": names.source_set,
        "log_sparsity": 0,
        "skipped_indexes": [],
    }
    write_text(folder / "skipped_indexes.json", json.dumps(skipped, ensure_ascii=False))


def feature(latents: Latents, latent: int) -> dict[str, Any]:
    """Return one element of `features`."""
    manifest = latents.cache.manifest
    largest = rounded(latents.stats["max"][latent])
    row = {
        "feature_index": latent,
        **latents.numbers(latent),
        "n_prompts_total": manifest.n_windows,
        "n_tokens_in_prompt": manifest.context_size,
        "dataset": manifest.corpus,
        "activations": [_activation(interval, passage, largest) for interval, passage in latents.groups(latent)],
    }
    return in_order("batch_feature", row)


def bounds(interval: Interval | None, largest: float) -> tuple[float, float, float]:
    """Return bin_min, bin_max and bin_contains; the strongest passages have -1 where an interval has its own."""
    if interval is None:
        return -1.0, largest, -1.0
    return rounded(interval.lo), rounded(interval.hi), rounded(interval.share)


def _activation(interval: Interval | None, passage: Passage, largest: float) -> dict[str, Any]:
    low, high, share = bounds(interval, largest)
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": passage.tokens,
        "values": passage.values,
        "qualifying_token_index": passage.anchor,
        "dfa_values": [],
        "dfa_maxValue": 0.0,
        "dfa_targetIndex": -1,
    }


def _settings(latents: Latents, names: Names, folder: Path, n_batches: int) -> dict[str, Any]:
    manifest = latents.cache.manifest
    return {
        "sae_set": names.source_set,
        "sae_path": manifest.sae,
        "np_set_name": names.source_set,
        "np_sae_id_suffix": names.suffix,
        "model_id": names.model,
        "layer": names.layer,
        "hf_model_path": manifest.model,
        "prompts_huggingface_dataset_path": manifest.corpus,
        "n_prompts_total": manifest.n_windows,
        "n_tokens_in_prompt": manifest.context_size,
        "n_features_at_a_time": BATCH,
        "start_batch": 0,
        "end_batch": n_batches,
        "outputs_dir": str(folder.parent),
    }


def check(folder: Path) -> dict[str, int]:
    """Check every file of an export against the table of fields; return the rows of each table.

    Raises: DataError naming the first thing that does not fit.
    """
    checked = Check()
    for file, batch in read(folder):
        checked("batch", batch, file.name)
        for row in batch["features"]:
            check_activity(f"{file.name}, feature {row['feature_index']}", row["frac_nonzero"], row["activations"])
    for name in ("run_settings", "skipped_indexes"):
        checked(name, read_json(folder / f"{name}.json"))
    return checked.finish()


def read(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield every batch of a folder with its file, in order. Raises: DataError when one is missing."""
    n = read_json(folder / "run_settings.json")["end_batch"]
    for number in range(n):
        file = folder / f"batch-{number}.json"
        if not file.is_file():
            raise DataError(f"{file} is missing; the export has {n} batches. Write it again.")
        yield file, read_json(file)


def check_activity(where: str, density: float, activations: list[dict[str, Any]]) -> None:
    """Raise DataError for a latent that is active but shows nothing, and for a passage in which it is silent."""
    if density > 0 and not activations:
        raise DataError(f"{where}: it is active but has no passage.")
    for row in activations:
        if max(row["values"], default=0.0) <= 0:
            raise DataError(f"{where}: a passage in which it is silent: {''.join(row['tokens'])[:60]!r}.")
