"""What explainers and judges that read text are shown of a latent: the draws of the cache as examples with their text."""

from __future__ import annotations

import numpy as np

from sae_italian.autointerp.examples import Activity, Draw, ExampleSource
from sae_italian.autointerp.negatives import MARK_SHARE, NegativeSource
from sae_italian.autointerp.protocols import FUZZING_NEGATIVES, SEGMENT_NEGATIVES, Example, LatentExamples

N_SIMULATED = 5  # strongest segments of the simulation, and as many random ones (Cunningham et al. 2023)


def latent_examples(
    negatives: NegativeSource,
    latent: int,
    *,
    n_train: int = 40,
    n_val: int = 20,
    n_test: int = 50,
    promoted: tuple[str, ...] = (),
) -> LatentExamples:
    """Return the examples of one latent. The same seed and sizes give the same ones, whoever asks."""
    source = negatives.source
    activity = source.activity(latent)
    train = negatives.draw(latent, activity, "train", n_train)
    val = negatives.draw(latent, activity, "val", n_val)
    test = negatives.draw(latent, activity, "test", n_test)
    in_train = activity.value[source.position_part[activity.position] == 0]
    return LatentExamples(
        latent=latent,
        maximum=float(in_train.max(initial=0.0)),
        train=tuple(_train(source, activity, train)),
        val=tuple(segments(source, activity, val)),
        test=tuple(segments(source, activity, test)),
        marked=tuple(marked(negatives, latent, activity, test)),
        simulation=tuple(simulated(source, latent, activity)),
        promoted=promoted,
    )


def _train(source: ExampleSource, activity: Activity, draw: Draw) -> list[Example]:
    values = source.values(activity, source.grid(draw.positive))
    marks = (values > 0) & (values >= MARK_SHARE * values.max(axis=1, keepdims=True, initial=0.0))
    shown = [
        source.example(activity, int(segment), marks=marks[row], decile=int(draw.decile[row]), pair=row)
        for row, segment in enumerate(draw.positive)
    ]
    _, silent = draw.pairs("random")
    return shown + [source.example(activity, int(segment), negatives="random") for segment in silent]


def segments(source: ExampleSource, activity: Activity, draw: Draw) -> list[Example]:
    """Return a draw's positives and then the negatives of each source, tied to their positives by `pair`."""
    shown = [
        source.example(activity, int(segment), decile=int(draw.decile[row]), pair=row)
        for row, segment in enumerate(draw.positive)
    ]
    for name in SEGMENT_NEGATIVES:
        for row, segment in enumerate(draw.negative.get(name, ())):
            if segment >= 0:
                shown.append(source.example(activity, int(segment), negatives=name, pair=row))
    return shown


def marked(negatives: NegativeSource, latent: int, activity: Activity, draw: Draw) -> list[Example]:
    """Return a draw's positives with their marks, and then each source's negatives with as many."""
    source = negatives.source
    marks = negatives.marked(latent, activity, draw)
    usable = np.any([own.rows for own in marks.values()], axis=0)
    shown = [
        source.example(activity, int(draw.positive[row]), marks=marks["silent-token"].positive[row], pair=row)
        for row in np.flatnonzero(usable).tolist()
    ]
    for name in FUZZING_NEGATIVES:
        if name not in marks:
            continue
        other = draw.positive if name == "silent-token" else draw.negative[name]
        shown += [
            source.example(activity, int(other[row]), negatives=name, marks=marks[name].negative[row], pair=row)
            for row in np.flatnonzero(marks[name].rows).tolist()
        ]
    return shown


def simulated(source: ExampleSource, latent: int, activity: Activity, n: int = N_SIMULATED) -> list[Example]:
    """Return the strongest test segments (decile -1), then as many random others on which the latent is active."""
    top, drawn, decile = simulated_segments(source, latent, activity, n)
    return [source.example(activity, int(segment)) for segment in top] + [
        source.example(activity, int(segment), decile=int(tenth)) for segment, tenth in zip(drawn, decile, strict=True)
    ]


def simulated_segments(
    source: ExampleSource, latent: int, activity: Activity, n: int = N_SIMULATED
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the strongest test segments, as many random others, and the tenth of each of these."""
    top, _ = source.positives(latent, activity, "test", n, "top")
    drawn, decile = source.positives(latent, activity, "test", 3 * n, "random")
    others = ~np.isin(drawn, top)
    return top, drawn[others][:n], decile[others][:n]
