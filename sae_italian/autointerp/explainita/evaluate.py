"""Score submissions: BERTScore for explanations, detection metrics for sequences; intervals over latents."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
from jaxtyping import Float

from sae_italian.autointerp.explainita.data import Latent, by_id
from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import bootstrap, mean_interval

DEFAULT_MODEL, DEFAULT_LAYER = "bert-base-multilingual-cased", 9  # the layer is bert-score's own choice for that model
Sums = Float[np.ndarray, "samples 4"]  # positives found and missed, negatives called active and not


def evaluate_explanations(
    predicted: Sequence[Latent], gold: Sequence[Latent], *, model: str = DEFAULT_MODEL, layer: int | None = None
) -> dict[str, Any]:
    """Return BERTScore precision, recall and F1 of explanations against the human ones (mean over latents).

    `model` is a name or a local folder, `layer` the layer that is compared (default: bert-score's choice). Not rescaled
    with a baseline: figures are comparable only within one model and layer, which the result names.

    Raises: UsageError without the extra `bertscore`, or when a latent has no explanation on either side.
    """
    texts = []
    for side, latents in zip(("the submission", "the gold file"), _paired(predicted, gold), strict=True):
        if empty := [latent.id for latent in latents if not latent.explanation]:
            raise UsageError(f"{side} has no explanation of {empty[0]}.")
        texts.append([str(latent.explanation) for latent in latents])
    layer = DEFAULT_LAYER if layer is None and model == DEFAULT_MODEL else layer
    try:
        score = import_module("bert_score").score  # an optional extra
        values = score(*texts, model_type=model, num_layers=layer, verbose=False)
    except ImportError as error:
        raise UsageError("BERTScore needs bert-score. Install it: pip install 'sae-italian[bertscore]'.") from error
    except KeyError as error:
        raise UsageError(f"bert-score does not know which layer of {model} to compare; give --layer.") from error
    except OSError as error:
        raise UsageError(f"{model} cannot be loaded here ({error}); give --bert a local folder.") from error
    same = [one.casefold().split() == other.casefold().split() for one, other in zip(*texts, strict=True)]
    named = zip(("precision", "recall", "f1"), values, strict=True)
    means = {f"bertscore_{name}": mean_interval(np.asarray(value)).as_dict() for name, value in named}
    facts = {"task": 1, "latents": len(same), "model": model, "layer": layer}
    return {**facts, **means, "identical": float(np.mean(same))}


def evaluate_sequences(predicted: Sequence[Latent], gold: Sequence[Latent]) -> dict[str, Any]:
    """Return detection metrics over all sequences, and balanced accuracy averaged over latents that have both classes.

    Intervals resample latents. Raises: UsageError where a label is missing on either side, or the sequences differ.
    """
    ours, theirs = _paired(predicted, gold)
    everything = [sequence for latent in theirs for sequence in latent.sequences]
    if everything and all(one.strengths is None and not one.activating for one in everything):
        raise UsageError("the gold file is the test split with its labels hidden (activations -1, none activating).")
    sums = np.zeros((len(ours), 4))
    for row, (mine, truth) in enumerate(zip(ours, theirs, strict=True)):
        _same_sequences(mine, truth)
        yes, positive = (np.array([s.activating for s in one.sequences], bool) for one in (mine, truth))
        sums[row] = [(said & true).sum() for true in (positive, ~positive) for said in (yes, ~yes)]
    metrics = {name: bootstrap(sums, lambda total, name=name: _rates(total)[name]) for name in _rates(sums)}
    both = (sums[:, :2].sum(1) > 0) & (sums[:, 2:].sum(1) > 0)
    metrics["balanced_accuracy_by_latent"] = mean_interval(_rates(sums[both])["balanced_accuracy"])
    counts = {"latents": len(ours), "sequences": int(sums.sum()), "positive": int(sums[:, :2].sum())}
    return {"task": 2, **counts, **{name: metric.as_dict() for name, metric in metrics.items()}}


def _same_sequences(mine: Latent, truth: Latent) -> None:
    """Raise UsageError unless both have the same sequences, each with its label."""
    if len(mine.sequences) != len(truth.sequences):
        raise UsageError(f"{mine.id} has {len(truth.sequences)} sequences, {len(mine.sequences)} answers.")
    for i, (one, other) in enumerate(zip(mine.sequences, truth.sequences, strict=True)):
        if one.tokens != other.tokens:
            raise UsageError(f"sequence {i} of {mine.id} is another one in the submission than in the gold file.")
        for side, sequence in (("the submission", one), ("the gold file", other)):
            if sequence.activating is None:
                raise UsageError(f"{side} has no label for sequence {i} of {mine.id}.")


def _rates(sums: Sums) -> dict[str, np.ndarray]:
    found, missed, false, right = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        tpr, tnr = found / (found + missed), right / (right + false)
        f1, f1_negative = (2 * n / (2 * n + missed + false) for n in (found, right))
        precision = found / (found + false)
    rates = {"balanced_accuracy": (tpr + tnr) / 2, "tpr": tpr, "tnr": tnr, "precision": precision}
    return rates | {"f1": f1, "f1_macro": (f1 + f1_negative) / 2}


def _paired(predicted: Sequence[Latent], gold: Sequence[Latent]) -> tuple[list[Latent], list[Latent]]:
    """Return both sides in the gold file's order. Raises: UsageError when one lacks latents."""
    ours, theirs = by_id(predicted), by_id(gold)
    for one, other, where in ((theirs, ours, "submission"), (ours, theirs, "gold file")):
        if missing := sorted(set(one) - set(other)):
            raise UsageError(f"the {where} lacks {len(missing)} latents, {missing[0]} first; both need the same ones.")
    return [ours[key] for key in theirs], list(theirs.values())
