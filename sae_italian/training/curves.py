"""Reference curves: what loss, L0, explained variance and dead latents of a healthy run of each recipe look like.

Beside a folder of recipes lies `curves/`, with one JSON for each: the recipe trained in full, and shortened to seconds,
which is what the tests train again. A run of anyone is read from its metrics.jsonl and held against such a curve.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sae_italian.base.errors import DataError, UsageError, nearest
from sae_italian.base.pictures import OURS, REFERENCE, svg
from sae_italian.base.storage import package_versions, read_json, write_json
from sae_italian.training.config import SUITE_KEY, RunSpec, configs_folder, find_config, load_spec, read_values
from sae_italian.training.run import read_run, train
from sae_italian.training.sae_run import LOSS_KEYS

METRICS = ("loss", "l0", "explained_variance", "dead")
TITLES = {
    "loss": "loss · perdita",
    "l0": "L0",
    "explained_variance": "explained variance · varianza spiegata",
    "dead": "dead latents · latenti morti",
}
# How far a run of the same recipe may be from its curve: a share of the curve's value, and an absolute distance. Chosen,
# not estimated: wide enough for another seed or machine.
TOLERANCE = {"loss": (0.15, 0.0), "l0": (0.15, 0.5), "explained_variance": (0.0, 0.04), "dead": (0.0, 0.05)}
OTHER_RECIPE = 3.0  # times as wide for a run of another model, corpus or size
SHORT_STEPS, SHORT_BATCH = 40, 512
# Settings that leave the curve as it is.
_NEUTRAL = {
    "seed",
    "device",
    "wandb",
    "wandb_project",
    "wandb_checkpoints",
    "checkpoint_every_tokens",
    "checkpoint_every_minutes",
}


class Curve(NamedTuple):
    """Metrics by share of the training done, in (0, 1]; `dead` is a share of the latents."""

    share: Float[np.ndarray, " rows"]
    values: dict[str, Float[np.ndarray, " rows"]]

    def at(self, share: Float[np.ndarray, " points"]) -> dict[str, Float[np.ndarray, " points"]]:
        """Return the metrics at other shares of the training, interpolated."""
        return {name: np.interp(share, self.share, values) for name, values in self.values.items()}

    def as_dict(self) -> dict[str, list[float]]:
        return {name: [_rounded(x) for x in values] for name, values in {"share": self.share, **self.values}.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Curve:
        return cls(np.array(values["share"]), {name: np.array(values[name], dtype=float) for name in METRICS})


@dataclass(frozen=True)
class Reference:
    """The recorded curves of a recipe, and the settings they were recorded with."""

    recipe: str
    spec: dict[str, Any]
    full: Curve | None
    short: Curve


@dataclass(frozen=True)
class Report:
    """A run beside a reference: what is off, in words; nothing when it is healthy."""

    run: str
    recipe: str
    same_recipe: bool
    curve: Curve
    reference: Curve
    findings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        last = {name: float(values[-1]) for name, values in self.curve.values.items()}
        names = ("run", "recipe", "same_recipe", "findings")
        return {name: getattr(self, name) for name in names} | {"done": float(self.curve.share[-1]), "last": last}

    def text(self) -> str:
        expected = self.reference.at(self.curve.share[-1:])
        head = f"{self.run}: {100 * self.curve.share[-1]:.0f} % of the training; reference {self.recipe}"
        lines = [head, f"{'':20} {'run':>9} {'reference':>9}"]
        for name in METRICS:
            lines.append(f"{name:20} {self.curve.values[name][-1]:9.4g} {expected[name][0]:9.4g}")
        if not self.same_recipe:
            lines.append(
                "Another model, corpus or size than the reference's: loss is not comparable, bands are three times as wide."
            )
        lines += [f"! {finding}" for finding in self.findings] or ["healthy: nothing is off"]
        return "\n".join(lines)

    def svg(self) -> str:
        """Return the run's curves over the reference's bands."""
        panels = []
        for name in METRICS:
            low, high = band(name, self.reference.values[name], 1.0 if self.same_recipe else OTHER_RECIPE)
            panel = (TITLES[name], self.curve.share, self.curve.values[name], self.reference.share, low, high)
            panels.append(panel if self.same_recipe or name != "loss" else (*panel[:3], [], [], []))
        return curves_svg(panels, (Path(self.run).name, f"healthy · sano ({self.recipe})"), self.run)


def band(name: str, values: Float[np.ndarray, " rows"], width: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return how low and how high a metric may be where the reference has `values`."""
    relative, absolute = TOLERANCE[name]
    room = width * (relative * np.abs(values) + absolute)
    low, high = values - room, values + room
    return (low.clip(0), high.clip(max=1)) if name == "dead" else (low, high)


def outside(curve: Curve, reference: Curve) -> list[str]:
    """Return a sentence for each metric of a run that leaves the band of a curve of the same recipe."""
    found = []
    expected = reference.at(curve.share)
    for name in METRICS:
        low, high = band(name, expected[name])
        bad = ~((curve.values[name] >= low - 1e-9) & (curve.values[name] <= high + 1e-9))
        if bad.any():
            i = int(bad.argmax())
            found.append(
                f"{name} is {curve.values[name][i]:.4g} at {100 * curve.share[i]:.0f} % of the training; "
                f"{low[i]:.4g} to {high[i]:.4g} is expected"
            )
    return found


def read_curve(folder: Path) -> Curve:
    """Return the curve of a training's folder, finished or not. Raises: UsageError where there is none."""
    file, spec = folder / "metrics.jsonl", read_run(folder).get("spec")
    if not file.is_file() or not spec or "sae" not in spec:
        raise UsageError(f"{folder} is not a training's folder: metrics.jsonl and run.json are expected there.")
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that is being written
        if "losses/overall_loss" in row:
            rows.append(row)
    if not rows:
        raise UsageError(f"{file} holds no step yet; wait for the first steps.")
    share = np.array([row["details/n_training_samples"] for row in rows]) / spec["training_tokens"]
    keys = ("metrics/l0", "metrics/explained_variance", "sparsity/dead_features")
    columns = {name: np.array([row[key] for row in rows], float) for name, key in zip(METRICS[1:], keys, strict=True)}
    # The reconstruction's own loss where it is told apart: the sparsity term grows by plan while its coefficient warms up.
    columns["loss"] = np.array([next(row[key] for key in LOSS_KEYS if key in row) for row in rows], float)
    columns["dead"] = columns["dead"] / spec["sae"]["d_sae"]
    return Curve(share.clip(max=1.0), columns)


def recipes() -> list[str]:
    """Return the names of the recipes on the mini model; a suite, which is several SAEs at once, is none."""
    files = sorted((configs_folder() / "mini").glob("*.yaml"))
    return [f"mini/{file.stem}" for file in files if SUITE_KEY not in read_values(file)]


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


def reference_file(recipe: str) -> Path:
    file = find_config(recipe)
    return file.parent / "curves" / f"{file.stem}.json"


def load_reference(recipe: str) -> Reference:
    """Return the recorded curves of a recipe. Raises: UsageError where there are none, DataError for a damaged file."""
    file = reference_file(recipe)
    if not file.is_file():
        raise UsageError(f"recipe {recipe!r} has no recorded curve. {nearest(recipe, recorded())}")
    try:
        values = read_json(file)
        full = Curve.from_dict(values["full"]) if values["full"] else None
        return Reference(values["recipe"], values["spec"], full, Curve.from_dict(values["short"]))
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{file} is not a recorded curve ({error}); record it again: curves --record {recipe}"
        ) from error


def recorded() -> list[str]:
    """Return the recipes that have a full curve."""
    return [name for name in recipes() if reference_file(name).is_file() and read_json(reference_file(name))["full"]]


def record(recipe: str, *, full: bool = True) -> Path:
    """Train a recipe shortened, then in full unless told not to, and write its curves; return their file.

    A full curve recorded before is kept when only the short one is made again with the same settings.
    """
    spec, file = load_spec(recipe), reference_file(recipe)
    plain = spec.model_dump(mode="json")
    with tempfile.TemporaryDirectory() as folder:
        short = read_curve(train(shortened(spec), Path(folder) / "short"))
        whole = read_curve(train(spec, Path(folder) / "full")).as_dict() if full else _kept(file, plain)
    name = find_config(recipe)
    write_json(
        file,
        {
            "recipe": f"{name.parent.name}/{name.stem}",
            "spec": plain,
            "versions": package_versions(),
            "short": short.as_dict(),
            "full": whole,
        },
    )
    return file


def _kept(file: Path, spec: dict[str, Any]) -> dict[str, Any] | None:
    earlier = read_json(file) if file.is_file() else {}
    return earlier.get("full") if earlier and same_recipe(earlier["spec"], spec) else None


def same_recipe(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two specs ask for the same curve, settings apart that do not touch it."""
    keys = (set(one) & set(other)) - _NEUTRAL
    return all(one[key] == other[key] for key in keys)


def nearest_reference(spec: dict[str, Any]) -> str:
    """Return the recipe to compare a run with: the same one, else one of the same architecture, nearest in k.

    Raises: UsageError when no recipe of that architecture has a curve.
    """
    alike = []
    for name in recorded():
        recipe = read_json(reference_file(name))["spec"]
        if same_recipe(recipe, spec):
            return name
        if _kind(recipe["sae"]["architecture"]) == _kind(spec["sae"]["architecture"]):
            alike.append((abs((recipe["sae"].get("k") or 0) - (spec["sae"].get("k") or 0)), name))
    if not alike:
        raise UsageError(
            f"no recipe with architecture {spec['sae']['architecture']!r} has a recorded curve; "
            f"give --reference, one of {', '.join(recorded())}."
        )
    return min(alike)[1]


def _kind(architecture: str) -> str:
    return architecture.removeprefix("sparse_")  # the same numbers, faster


def compare(folder: Path, reference: str | None = None) -> Report:
    """Return how a run's curves stand to those of a healthy run of a recipe.

    Raises: UsageError for a folder without a training, and for a recipe without a full curve.
    """
    curve, spec = read_curve(folder), read_run(folder)["spec"]
    recipe = reference or nearest_reference(spec)
    known = load_reference(recipe)
    if known.full is None:
        raise UsageError(f"recipe {recipe!r} has no full curve. {nearest(recipe, recorded())}")
    same = same_recipe(known.spec, spec)
    findings = tuple(_findings(curve, known.full, spec, 1.0 if same else OTHER_RECIPE))
    return Report(str(folder), recipe, same, curve, known.full, findings)


def _findings(curve: Curve, reference: Curve, spec: dict[str, Any], width: float) -> list[str]:
    """Return what is off: divergence, L0, dead latents, explained variance, each judged on the last tenth of the rows."""
    n = max(1, len(curve.share) // 10)
    last = {name: float(np.mean(values[-n:])) for name, values in curve.values.items()}
    at = {name: float(np.mean(values)) for name, values in reference.at(curve.share[-n:]).items()}
    found = _diverging(curve.values["loss"], last["loss"], spec["lr"])
    k = spec["sae"].get("k")
    settled = curve.share[-n] > spec.get("k_anneal_share", 0.0)
    if k is not None and settled and abs(last["l0"] - k) > 0.05 * k:
        found.append(f"L0 is {last['l0']:.4g}, off k = {k}: look at the activations' scale and at the threshold.")
    if k is None and not at["l0"] / (1 + width) <= last["l0"] <= at["l0"] * (1 + width):
        coefficient = next(
            (key for key in ("l1_coefficient", "l0_coefficient") if key in spec["sae"]), "its coefficient"
        )
        way = "raise" if last["l0"] > at["l0"] else "lower"
        found.append(f"L0 is {last['l0']:.4g} where {at['l0']:.4g} is healthy: {way} sae.{coefficient}.")
    earlier = float(np.mean(curve.values["dead"][: max(1, len(curve.share) // 2)][-n:]))
    if last["dead"] > band("dead", np.array([at["dead"]]), width)[1][0]:
        rising = " and rising" if last["dead"] > earlier + 0.01 else ""
        found.append(
            f"dead latents are {100 * last['dead']:.1f} %{rising}, {100 * at['dead']:.1f} % is healthy: "
            "lower lr, warm up longer, or set sae.aux_loss_coefficient (TopK)."
        )
    low = band("explained_variance", np.array([at["explained_variance"]]), width)[0][0]
    if not last["explained_variance"] >= low:
        found.append(
            f"explained variance is {last['explained_variance']:.3f}, below the {low:.3f} of a healthy run at this point: "
            "look at lr, at the input scale (sae.normalize_activations) and at the hook."
        )
    return found


def _diverging(loss: Sequence[float] | np.ndarray, last: float, lr: float) -> list[str]:
    values = np.asarray(loss, float)
    if not np.isfinite(values).all():
        return [f"the loss is not finite any more: lower lr (now {lr})."]
    smallest = float(np.min(np.convolve(values, np.ones(3) / 3, "valid"))) if len(values) >= 3 else float(values.min())
    if last > 2 * smallest:
        return [f"the loss is diverging: {last:.4g} now, {smallest:.4g} before; lower lr (now {lr})."]
    return []


def plain_svg(curve: Curve, name: str) -> str:
    """Return the curves of a run that no recipe can be held against."""
    panels = [(TITLES[metric], curve.share, curve.values[metric], [], [], []) for metric in METRICS]
    return curves_svg(panels, (name, ""), name)


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")


def curves_svg(panels: Sequence[tuple[str, Any, Any, Any, Any, Any]], labels: tuple[str, str], title: str) -> str:
    """Return panels of (title, x and y of the run, x, low and high of the reference) as one SVG; arrays or lists."""

    def draw(axes: Any) -> None:
        for axis, (name, x, y, x_reference, low, high) in zip(axes, panels, strict=True):
            if len(x_reference):
                axis.fill_between(x_reference, low, high, color=REFERENCE, alpha=0.35, linewidth=0, label=labels[1])
            if len(x):
                axis.plot(x, y, color=OURS, linewidth=1.5, label=labels[0])
            axis.set_title(name, fontsize=10)
            axis.set_xlabel("share of the training · quota dell'addestramento", fontsize=8)
        axes[0].legend(frameon=False, fontsize=8)
        axes[0].figure.suptitle(title, fontsize=10)

    return svg(draw, len(panels), (3.4 * len(panels), 3.2))
