"""Train recipes anew, in full and shortened, and record their curves: `python -m tests.bench.record_curves [RECIPE ...]`.

Without names: all recipes of configs/mini. With `--short-only` the full curves recorded before are kept.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from sae_italian.base.storage import package_versions, read_json, write_json
from sae_italian.training import RunSpec, load_spec, read_values, recipes, train
from sae_italian.training.config import SUITE_KEY, find_config
from sae_italian.training.curves import TITLES, Curve, band, read_curve, same_recipe

SHORT_STEPS, SHORT_BATCH = 40, 512


def mini_recipes() -> list[str]:
    """Return the recipes on the mini model; a suite, which is several SAEs at once, is none."""
    return [name for name in recipes() if name.startswith("mini/") and SUITE_KEY not in read_values(name)]


def shortened(spec: RunSpec) -> RunSpec:
    """Return a recipe of 40 steps of 512 tokens; warm-up and decay keep their share of the training."""
    scale = SHORT_STEPS * spec.train_batch_size_tokens / spec.training_tokens
    changes = {
        "training_tokens": SHORT_STEPS * SHORT_BATCH,
        "train_batch_size_tokens": SHORT_BATCH,
        "buffer_tokens": 8 * SHORT_BATCH,
        "store_batch_size_prompts": 16,
        "lr_warm_up_steps": math.ceil(spec.lr_warm_up_steps * scale),
        "lr_decay_steps": math.ceil(spec.lr_decay_steps * scale),
        "dead_feature_window": 10,
        "evaluate_every_tokens": 0,
    }
    return spec.model_copy(update=changes)


def plain(curve: Curve) -> dict[str, list[float]]:
    """Return a curve as JSON, rounded to four digits."""
    return {name: [float(f"{x:.4g}") for x in values] for name, values in curve.items()}


def record(recipe: str, *, full: bool = True) -> Path:
    """Train a recipe shortened, then in full unless told not to, and write its curves; return their file."""
    spec, config = load_spec(recipe), find_config(recipe)
    file, settings = config.parent / "curves" / f"{config.stem}.json", spec.model_dump(mode="json")
    with tempfile.TemporaryDirectory() as folder:
        short = plain(read_curve(train(shortened(spec), Path(folder) / "short")))
        whole = plain(read_curve(train(spec, Path(folder) / "full"))) if full else kept(file, settings)
    name = f"{config.parent.name}/{config.stem}"
    curves = {"short": short, "full": whole}
    write_json(file, {"recipe": name, "spec": settings, "versions": package_versions(), **curves})
    return file


def kept(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the full curve recorded before, if it was with the same settings."""
    earlier = read_json(file) if file.is_file() else None
    return earlier["full"] if earlier and same_recipe(earlier["spec"], settings) else None


def outside(curve: Curve, reference: Curve) -> list[str]:
    """Return a sentence for each metric of a run that leaves the band of a curve of the same recipe."""
    found = []
    for name in TITLES:
        low, high = band(name, np.interp(curve["share"], reference["share"], reference[name]))
        bad = ~((curve[name] >= low - 1e-9) & (curve[name] <= high + 1e-9))
        if bad.any():
            i = int(np.argmax(bad))
            found.append(f"{name} is {curve[name][i]:.4g} at {curve['share'][i]:.0%}; {low[i]:.4g} to {high[i]:.4g}")
    return found


if __name__ == "__main__":
    words = sys.argv[1:]
    for given in [word for word in words if word != "--short-only"] or mini_recipes():
        sys.stdout.write(f"{record(given, full='--short-only' not in words)}\n")
