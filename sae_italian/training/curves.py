"""Is a training healthy? Its loss, L0, explained variance and dead latents, beside the recorded curve of its recipe.

Beside a folder of recipes lies `curves/`, with one JSON for each: the recipe trained in full, and shortened to seconds,
which is what the tests train again (tests/bench/record_curves.py writes them).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sae_italian.base.errors import UsageError
from sae_italian.base.report import OURS, REFERENCE, svg
from sae_italian.base.storage import read_json, record_in, understood
from sae_italian.evaluation.doctor import Finding
from sae_italian.training.config import configs_folder
from sae_italian.training.logging import LOSS_KEYS, METRICS_FILE, WEIGHTS, read_metrics
from sae_italian.training.run import CHANGEABLE

TITLES = {
    "loss": "loss · perdita",
    "l0": "L0",
    "explained_variance": "explained variance · varianza spiegata",
    "dead": "dead latents · latenti morti",
}
# How far a run of the same recipe may be from its curve: a share of the curve's value, and an absolute distance. Chosen,
# not estimated: wide enough for another seed or machine.
TOLERANCE = {"loss": (0.15, 0.0), "l0": (0.15, 0.5), "explained_variance": (0.0, 0.04), "dead": (0.0, 0.05)}
# The metrics of TITLES by `share`, that of the training done, in (0, 1]; `dead` is a share of the latents.
Curve = dict[str, Float[np.ndarray, " rows"]]
# Settings that leave the curve as it is.
NEUTRAL = {"seed", "seeds", "device"} | CHANGEABLE


def read_curve(folder: Path) -> Curve:
    """Return the curve of a training's folder, finished or not. Raises: UsageError where there is none."""
    spec = record_in(folder).get("spec", {})
    file = folder / METRICS_FILE
    if not file.is_file() or "sae" not in spec:
        raise UsageError(f"{folder} is not a training's folder: metrics.jsonl and run.json are expected there.")
    if not (rows := [row for row in read_metrics(file) if "losses/overall_loss" in row]):
        raise UsageError(f"{file} holds no step yet; wait for the first steps.")
    keys = ("details/n_training_samples", "metrics/l0", "metrics/explained_variance", "sparsity/dead_features")
    with understood(f"what {file} or run.json holds", "Copy the training's folder again, or train again."):
        n_tokens, l0, explained, dead = (np.array([row[key] for row in rows], float) for key in keys)
        loss = np.array([next(row[key] for key in LOSS_KEYS if key in row) for row in rows], float)
        share, dead = (n_tokens / spec["training_tokens"]).clip(max=1.0), dead / spec["sae"]["d_sae"]
        return {"share": share, "loss": loss, "l0": l0, "explained_variance": explained, "dead": dead}


def recorded_curves(size: str = "full") -> Iterator[tuple[str, dict[str, Any], Curve]]:
    """Yield recipe, settings and curve of all recipes that have one. Raises: DataError for a damaged file.

    size: "full", or "short" for the recipe of seconds.
    """
    for file in sorted(configs_folder().glob("*/curves/*.json")):
        with understood(file, "Install sae-italian again."):
            plain = read_json(file)
            curve = {name: np.array(plain[size][name], float) for name in ("share", *TITLES)}
            yield plain["recipe"], plain["spec"], curve


def same_recipe(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two specs ask for the same curve, settings apart that do not touch it."""
    return all(one[key] == other[key] for key in (set(one) & set(other)) - NEUTRAL)


def band(name: str, values: Float[np.ndarray, " rows"]) -> tuple[np.ndarray, np.ndarray]:
    """Return how low and how high a metric may be where the recorded curve has `values`."""
    relative, absolute = TOLERANCE[name]
    room = relative * np.abs(values) + absolute
    low, high = values - room, values + room
    return (low.clip(0), high.clip(max=1)) if name == "dead" else (low, high)


def look_at_training(folder: Path) -> tuple[list[Finding], str]:
    """Return what the metrics of a training say of it, and a picture of its curves as SVG.

    They are held against the recorded curve of the recipe the run was started with; where there is none, only what needs
    no other run is judged. Raises: UsageError for a folder without a training.
    """
    curve, spec = read_curve(folder), record_in(folder)["spec"]
    same = ((recipe, healthy) for recipe, other, healthy in recorded_curves() if same_recipe(other, spec))
    recipe, healthy = next(same, ("", None))
    done = "finished" if (folder / WEIGHTS).is_file() else f"{100 * curve['share'][-1]:.0f} % done"
    beside = f"beside a healthy run of {recipe}" if healthy else "no curve of this recipe is recorded"
    checks = [Finding("training", "pass", f"{done}; {beside}"), *_checks(curve, healthy, spec)]
    return checks, _picture(
        curve, healthy, f"tolerated around a healthy run · tollerato attorno a una prova sana ({recipe})", folder.name
    )


def _checks(curve: Curve, healthy: Curve | None, spec: dict[str, Any]) -> Iterator[Finding]:
    """Yield divergence, L0, dead latents and explained variance, each judged on the last tenth of the rows."""
    n = max(1, len(curve["share"]) // 10)
    last = {name: float(curve[name][-n:].mean()) for name in TITLES}
    k, n_warm = spec["sae"].get("k"), max(spec["sae"].get(f"l{norm}_warm_up_steps", 0) for norm in (0, 1))
    warm = n_warm * spec["train_batch_size_tokens"] / spec["training_tokens"]
    # before, fewer latents fire with every step, and the loss grows by plan
    settled = curve["share"] > max(spec.get("k_anneal_share", 0.0), warm)
    yield _loss_check(curve["loss"], settled, last["loss"], spec["lr"])
    if k is not None:
        good = not settled[-n] or abs(last["l0"] - k) <= 0.05 * k
        yield _judged("l0", good, f"{last['l0']:.4g}, k = {k}", "look at the activations' scale and at the threshold")
    if healthy is None:
        return
    at = {name: float(np.interp(curve["share"][-n:], healthy["share"], healthy[name]).mean()) for name in TITLES}
    if k is None:
        key = next((key for key in ("l1_coefficient", "l0_coefficient") if key in spec["sae"]), "its coefficient")
        remedy = f"{'raise' if last['l0'] > at['l0'] else 'lower'} sae.{key}"
        good = at["l0"] / 2 <= last["l0"] <= at["l0"] * 2
        yield _judged("l0", good, f"{last['l0']:.4g} where {at['l0']:.4g} is healthy", remedy)
    earlier = float(np.mean(curve["dead"][: max(1, len(curve["share"]) // 2)][-n:]))
    rising = " and rising" if last["dead"] > earlier + 0.01 else ""
    found = f"{100 * last['dead']:.1f} %{rising} where {100 * at['dead']:.1f} % is healthy"
    good = last["dead"] <= band("dead", np.array([at["dead"]]))[1][0]
    yield _judged("dead latents", good, found, "lower lr, warm up longer, or set sae.aux_loss_coefficient (TopK)")
    explained, least = last["explained_variance"], at["explained_variance"]
    good = explained >= band("explained_variance", np.array([least]))[0][0]
    remedy = "look at lr, at the input scale (sae.normalize_activations) and at the hook"
    yield _judged("explained variance", good, f"{explained:.3f} where {least:.3f} is healthy", remedy)


def _judged(name: str, good: bool | np.bool_, found: str, remedy: str) -> Finding:
    return Finding(f"training: {name}", "pass" if good else "warn", found, "" if good else remedy)


def _loss_check(values: np.ndarray, settled: Bool[np.ndarray, " rows"], last: float, lr: float) -> Finding:
    wrong, judged = "", values[settled]
    if len(judged) >= 3:
        judged = np.convolve(judged, np.ones(3) / 3, "valid")
    if not np.isfinite(values).all():
        wrong = "it is not finite any more"
    elif last > 2 * (smallest := float(judged.min(initial=np.inf))):
        wrong = f"it is diverging: {last:.4g} now, {smallest:.4g} before"
    status = "fail" if wrong else "pass"
    return Finding("training: loss", status, wrong or f"{last:.4g}", f"lower lr (now {lr})" if wrong else "")


def _picture(curve: Curve, healthy: Curve | None, label: str, name: str) -> str:
    """Return the run's curves, over the bands of the recorded ones, as SVG."""

    def draw(axes: Any) -> None:
        for axis, (metric, words) in zip(axes, TITLES.items(), strict=True):
            if healthy:
                low, high = band(metric, healthy[metric])
                axis.fill_between(healthy["share"], low, high, color=REFERENCE, alpha=0.35, linewidth=0, label=label)
            axis.plot(curve["share"], curve[metric], color=OURS, linewidth=1.5, label=name)
            axis.set_title(words, fontsize=10)
            axis.set_xlabel("share of the training\nquota dell’addestramento")
        axes[0].legend()

    return svg(draw, len(TITLES), (3.4 * len(TITLES), 3.2))
