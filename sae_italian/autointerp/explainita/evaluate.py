"""Score submissions: BERTScore for explanations, detection metrics for sequences; intervals over latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_italian.autointerp.explainita.data import Latent, by_id
from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import Estimate, bootstrap, mean_interval

DEFAULT_MODEL = "bert-base-multilingual-cased"
DEFAULT_LAYER = 9  # bert-score's own choice for that model


def evaluate_explanations(
    predicted: Sequence[Latent], gold: Sequence[Latent], *, model: str = DEFAULT_MODEL, layer: int | None = None
) -> dict[str, Any]:
    """Return BERTScore precision, recall and F1 of explanations against the human ones (mean over latents).

    `model` is a name or a local folder, `layer` the layer that is compared (default: bert-score's choice). Not rescaled
    with a baseline: figures are comparable only within one model and layer, which the result names.

    Raises: UsageError without the extra `bertscore`, or when a latent has no explanation on either side.
    """
    ours, theirs = _paired(predicted, gold)
    for side, latents in (("the submission", ours), ("the gold file", theirs)):
        empty = next((latent.id for latent in latents if not latent.explanation), None)
        if empty:
            raise UsageError(f"{side} has no explanation of {empty}.")
    try:
        bert_score = import_module("bert_score")  # an optional extra
    except ImportError as error:
        raise UsageError("BERTScore needs bert-score. Install it: pip install 'sae-italian[bertscore]'.") from error
    layer = DEFAULT_LAYER if layer is None and model == DEFAULT_MODEL else layer
    try:
        scores = bert_score.score(
            [str(latent.explanation) for latent in ours],
            [str(latent.explanation) for latent in theirs],
            model_type=model,
            num_layers=layer,
            verbose=False,
        )
    except KeyError as error:
        raise UsageError(f"bert-score does not know which layer of {model} to compare; give --layer.") from error
    except OSError as error:
        raise UsageError(f"{model} cannot be loaded here ({error}); give --bert a local folder.") from error
    values = dict(zip(("precision", "recall", "f1"), (np.asarray(score) for score in scores), strict=True))
    same = np.array([_same(a, b) for a, b in zip(ours, theirs, strict=True)])
    return {
        "task": 1,
        "latents": len(ours),
        "model": model,
        "layer": layer,
        **{f"bertscore_{name}": mean_interval(value).as_dict() for name, value in values.items()},
        "identical": float(same.mean()),
    }


def _same(one: Latent, other: Latent) -> bool:
    return str(one.explanation).casefold().split() == str(other.explanation).casefold().split()


def evaluate_sequences(predicted: Sequence[Latent], gold: Sequence[Latent]) -> dict[str, Any]:
    """Return detection metrics over all sequences, and balanced accuracy averaged over latents that have both classes.

    Intervals resample latents. Raises: UsageError where a label is missing on either side, or the sequences differ.
    """
    ours, theirs = _paired(predicted, gold)
    everything = [sequence for latent in theirs for sequence in latent.sequences]
    if everything and all(one.strengths is None and not one.activating for one in everything):
        raise UsageError("the gold file is the test split with its labels hidden (activations -1, none activating).")
    sums = np.zeros((len(ours), 4))
    per_latent = []
    for row, (mine, truth) in enumerate(zip(ours, theirs, strict=True)):
        if len(mine.sequences) != len(truth.sequences):
            raise UsageError(f"{mine.id} has {len(truth.sequences)} sequences and {len(mine.sequences)} answers.")
        for i, (one, other) in enumerate(zip(mine.sequences, truth.sequences, strict=True)):
            if one.tokens != other.tokens:
                raise UsageError(f"sequence {i} of {mine.id} is another one in the submission than in the gold file.")
        said = [sequence.activating for sequence in mine.sequences]
        labels = [sequence.activating for sequence in truth.sequences]
        for side, values in (("the submission", said), ("the gold file", labels)):
            if None in values:
                raise UsageError(f"{side} has no label for sequence {values.index(None)} of {mine.id}.")
        yes, positive = np.array(said, dtype=bool), np.array(labels, dtype=bool)
        sums[row] = (yes & positive).sum(), positive.sum(), (yes & ~positive).sum(), (~positive).sum()
        if positive.any() and not positive.all():
            per_latent.append((yes[positive].mean() + 1 - yes[~positive].mean()) / 2)
    metrics = {name: bootstrap(sums, function) for name, function in _METRICS.items()}
    metrics["balanced_accuracy_by_latent"] = mean_interval(np.array(per_latent))
    counts = {
        "latents": len(ours),
        "sequences": int(sums[:, 1].sum() + sums[:, 3].sum()),
        "positive": int(sums[:, 1].sum()),
    }
    return {"task": 2, **counts, **{name: metric.as_dict() for name, metric in metrics.items()}}


Sums = Float[np.ndarray, "samples 4"]  # true positives, positives, false positives, negatives


def _f1(hits: np.ndarray, said: np.ndarray, there: np.ndarray) -> np.ndarray:
    return 2 * hits / (said + there)


def _f1_positive(sums: Sums) -> np.ndarray:
    return _f1(sums[:, 0], sums[:, 0] + sums[:, 2], sums[:, 1])


def _f1_negative(sums: Sums) -> np.ndarray:
    right = sums[:, 3] - sums[:, 2]
    return _f1(right, right + sums[:, 1] - sums[:, 0], sums[:, 3])


_METRICS: dict[str, Callable[[Sums], np.ndarray]] = {
    "balanced_accuracy": lambda sums: (sums[:, 0] / sums[:, 1] + 1 - sums[:, 2] / sums[:, 3]) / 2,
    "tpr": lambda sums: sums[:, 0] / sums[:, 1],
    "tnr": lambda sums: 1 - sums[:, 2] / sums[:, 3],
    "precision": lambda sums: sums[:, 0] / (sums[:, 0] + sums[:, 2]),
    "f1": _f1_positive,
    "f1_macro": lambda sums: (_f1_positive(sums) + _f1_negative(sums)) / 2,
}


def _paired(predicted: Sequence[Latent], gold: Sequence[Latent]) -> tuple[list[Latent], list[Latent]]:
    ours, theirs = by_id(predicted), by_id(gold)
    for missing, where in (
        (sorted(set(theirs) - set(ours)), "submission"),
        (sorted(set(ours) - set(theirs)), "gold file"),
    ):
        if missing:
            raise UsageError(f"the {where} lacks {len(missing)} latents, {missing[0]} first; both need the same ones.")
    return [ours[key] for key in theirs], list(theirs.values())


def table(result: dict[str, Any]) -> str:
    """Return a result as lines of text."""
    lines = []
    for name, value in result.items():
        if isinstance(value, dict):
            shown = Estimate(*(float("nan") if value[key] is None else value[key] for key in ("value", "lo", "hi")))
            value = f"{shown.value:.3f} [{shown.lo:.3f}, {shown.hi:.3f}]"
        lines.append(f"{name:28} {value}")
    return "\n".join(lines)
