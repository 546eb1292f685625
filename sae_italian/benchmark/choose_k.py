"""Which k: short trainings over a grid of k and some seeds, all on one stream of activations, and what tells them apart.

The proxy of Chanin and Garriga-Alonso (Sparse but wrong, arXiv 2508.16560; `nth_decoder_projection.py` of their code):
s_N is the (N B)-th largest entry of (x - b_dec) W_dec^T over B tokens, decoder rows of length 1. Correct latents project
little on tokens that lack them; too small a k mixes correlated features into one row, too large a k gives rows that are
nothing, and both raise s_N: its minimum over k is taken for the true L0. N is an eighth and a quarter of the dictionary, half
of it is shown; where the two minima do not agree, or lie at an end of the grid, there is no recommendation.

Shapes: x [tokens, d_in], W_dec [d_sae, d_in].
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from sae_italian.analysis.detect import ProbeTask, sparse_probes
from sae_italian.analysis.treebank import Words, encode_words, micro_words
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import paced
from sae_italian.base.report import OURS, REFERENCE, plain, save_result, svg, table
from sae_italian.base.storage import claimed
from sae_italian.evaluation.diagnosis import held_out_activations
from sae_italian.models import load_model
from sae_italian.saes import load_sae
from sae_italian.saes.fit import fit
from sae_italian.training import RunSpec
from sae_italian.training.run import check_run, train_group

GRID = (8, 16, 32, 64, 128)
SHARES = {"d/8": 8, "d/4": 4, "d/2": 2}  # N of the proxy, by what the dictionary's width is divided by
DECIDING = ["d/8", "d/4"]  # N under d/2, as in their notebook: half of all projections are noise about 0
BATCH_ELEMENTS = 2**22  # projections of one batch: 4,096 tokens of 1,024 latents
PROBED = 150  # documents of MicroItaliano whose words the probes read, half of them in training
PROBES = {"sparse 1": 1, "sparse 20": 20}  # of analysis/detect: logistic on so many latents
SHOWN = {  # title and form of the means in the table, by their columns
    "l0": ("L0", ".1f"),
    "explained_variance": ("explained variance", ".3f"),
    "dead": ("dead", ".1%"),
    **{name: (f"AUROC, {name}", ".3f") for name in PROBES},
}
PANELS = {  # the lines of the picture's panels, and their columns
    "s_N": {name: name for name in SHARES},
    "AUROC": {name: name for name in PROBES},
    "explained variance · varianza spiegata": {"explained variance": "explained_variance"},
    "dead · morti": {"dead · morti": "dead"},
}


@dataclass(frozen=True)
class Choice:
    """What the trials say: a k with the interval of those that do as well, or why none is recommended.

    A trial is a short training, measured on held-out text: k, seed, l0, explained_variance (centred), dead (the share of
    latents that never fired), projections (s_N by N), auroc (by probe, the mean over labels of words of other documents).
    """

    trials: list[dict[str, Any]]
    minima: dict[str, int]  # k of the grid at which s_N is least, by N
    n_tokens: int  # of each training
    why: str
    k: float | None = None
    lo: float | None = None
    hi: float | None = None

    def table(self) -> str:
        """Return a Markdown table of means over seeds, one row for each k, and the recommendation."""
        groups = by_k(self.trials)
        mean, sd, rows = groups.mean(), groups.std(), []
        for k in mean.index:
            cells = (f"{mean.at[k, column]:{form}}" for column, (_, form) in SHOWN.items())
            rows.append((k, *cells, *(f"{mean.at[k, name]:.4g} ± {sd.at[k, name]:.2g}" for name in SHARES)))
        head = " | ".join(["k", *(title for title, _ in SHOWN.values()), *(f"s_N, N = {name}" for name in SHARES)])
        return f"{table(head, rows)}\n\n{self.why}"

    def svg(self) -> str:
        """Return the proxy (1 at its largest), the probes, the fit and the dead share over k; bars: one seed-sd."""
        groups = by_k(self.trials)
        largest = groups.mean().max().where(lambda of: of.index.isin(SHARES), 1.0)
        mean, sd = groups.mean() / largest, groups.std(ddof=0) / largest

        def draw(axes: Any) -> None:
            for axis, (title, columns) in zip(axes, PANELS.items(), strict=True):
                for (name, column), colour in zip(columns.items(), (OURS, "#d17b0f", "#3b5bdb"), strict=False):
                    axis.errorbar(
                        mean.index, mean[column], sd[column], color=colour, marker="o", markersize=3, label=name
                    )
                if self.lo is not None and self.hi is not None:
                    axis.axvspan(self.lo, self.hi, color=REFERENCE, alpha=0.2, linewidth=0)
                axis.set_xscale("log", base=2)
                axis.set(xlabel="k", title=title)
                axis.legend(frameon=False, fontsize=7)

        return svg(draw, len(PANELS), (3.2 * len(PANELS), 3.0))

    def save(self, folder: Path) -> None:
        """Write choose-k.json, choose-k.md and choose-k.svg."""
        parts = ["# Which k · Quale k", self.table()]
        save_result(folder, "choose-k", plain(self), parts, **{"choose-k": self.svg()})


def by_k(trials: Iterable[Mapping[str, Any]]) -> Any:
    """Return the numbers of trials grouped by k, a DataFrame's groups, with s_N and probes as columns of their own."""
    rows = [{**trial, **trial["projections"], **trial["auroc"]} for trial in trials]
    return pd.DataFrame(rows).drop(columns=["projections", "auroc", "seed"]).groupby("k")


@torch.no_grad()
def projections(sae: Any, x: Float[Tensor, "tokens d_in"]) -> dict[str, float]:
    """Return s_N for N an eighth, a quarter and half of the dictionary: means over batches of tokens."""
    rows, found = normalize(sae.W_dec.float(), dim=-1), []
    for part in x.split(max(1, BATCH_ELEMENTS // len(rows))):
        projected = ((part.to(rows) - sae.b_dec.float()) @ rows.T).flatten()
        above = (len(rows) // of * len(part) for of in SHARES.values())
        found.append([projected.kthvalue(max(1, len(projected) - n)).values.item() for n in above])
    return dict(zip(SHARES, np.mean(found, axis=0).tolist(), strict=True))


def recommend(trials: list[dict[str, Any]], n_tokens: int) -> Choice:
    """Return the k at which the proxy is least, by a parabola through its neighbours on the grid (of log k).

    The interval holds the k of the grid whose mean is within one seed-sd of the minimum, and at least half a step to each
    side.
    """
    groups: Any = by_k(trials)[DECIDING]
    mean: Any = groups.mean()
    sd: Any = np.sqrt(groups.var().fillna(0.0).mean())  # of a single seed no noise is known
    grid, minima = list(mean.index), mean.idxmin().to_dict()
    said, steps = ", ".join(f"{name}: {k}" for name, k in minima.items()), [grid.index(k) for k in minima.values()]
    at_an_end = {0, len(grid) - 1} & set(steps)
    if at_an_end or max(steps) - min(steps) > 1:
        what = "s_N is least at an end of it" if at_an_end else "the minima of s_N do not agree"
        why = f"Not found, widen the grid: {what} ({said}). More tokens (share=1) and more seeds make the curves steadier."
        return Choice(trials, minima, n_tokens, why)
    vertices, los, his = zip(*(_vertex(np.log2(grid), mean[n].to_numpy(), sd[n]) for n in DECIDING), strict=True)
    k, lo, hi = (float(2**value) for value in (np.median(vertices), min(los), max(his)))
    return Choice(trials, minima, n_tokens, f"Recommended: k = {k:.0f} ({lo:.0f} to {hi:.0f}).", k, lo, hi)


def _vertex(
    place: Float[np.ndarray, " grid"], mean: Float[np.ndarray, " grid"], sd: float
) -> tuple[float, float, float]:
    """Return where a parabola through the least mean and its neighbours is least, and the interval around it."""
    i = int(mean.argmin())
    x, y = place[i - 1 : i + 2], mean[i - 1 : i + 2]
    a, b, _ = np.polyfit(x, y, 2)
    half = (x[0] + x[1]) / 2, (x[1] + x[2]) / 2
    vertex = float(np.clip(-b / (2 * a), *half)) if a > 0 else float(x[1])
    worse = np.flatnonzero(mean > mean[i] + sd)  # between the nearest of these the means stay within one sd
    lo, hi = worse[worse < i].max(initial=-1) + 1, worse[worse > i].min(initial=len(mean)) - 1
    return vertex, float(min(half[0], place[lo])), float(max(half[1], place[hi]))


# --- trainings ------------------------------------------------------------------------------------------------------------


def members(spec: RunSpec, grid: Sequence[int], seeds: int, share: float) -> dict[str, RunSpec]:
    """Return the short runs by name (k8-seed42): `share` of the tokens and of the steps of warm-up and decay.

    Raises: UsageError for a grid of fewer than three k, a k that is not in (0, d_sae), a share outside (0, 1], a transcoder.
    """
    if len(set(grid)) < 3 or len(set(grid)) < len(grid):
        raise UsageError(
            f"--grid is {','.join(map(str, grid))}; three or more different k were expected, as in 8,16,32."
        )
    if spec.hook_name_out is not None:
        raise UsageError("the config is a transcoder's; k is chosen for SAEs. Give a config without hook_name_out.")
    if not 0 < share <= 1:
        raise UsageError(
            f"share is {share:g}; a part of the config's training_tokens was expected, above 0 and at most 1."
        )
    short = {name: round(share * getattr(spec, name)) for name in ("lr_warm_up_steps", "lr_decay_steps")}
    short["training_tokens"] = max(spec.train_batch_size_tokens, round(share * spec.training_tokens))
    found = {}
    for k, seed in product(sorted(grid), range(spec.seed, spec.seed + seeds)):
        update = {"sae": {**spec.sae, "k": k}, "seed": seed, "seeds": 1, **short}
        found[f"k{k}-seed{seed}"] = spec.model_copy(update=update)
    for k in (min(grid), max(grid)):
        check_run(found[f"k{k}-seed{spec.seed}"])
    return found


def choose_k(
    spec: RunSpec,
    out: Path,
    grid: Sequence[int] = GRID,
    *,
    seeds: int = 3,
    share: float = 0.25,
    n_tokens: int = 20_000,
    resume: bool = False,
    overwrite: bool = False,
) -> Choice:
    """Train every k of the grid with every seed on one pass into `out`, measure on held-out text, and recommend.

    Raises: UsageError as `members` and `training.train`; KeyboardInterrupt after a signal, once the state is saved.
    """
    runs = members(spec, grid, seeds, share)
    settings = {"grid": sorted(grid), "seeds": seeds, "share": share, "spec": spec.model_dump(mode="json")}
    with claimed(out, "choose-k", settings, resume=resume, overwrite=overwrite):
        folders = dict(zip(runs, train_group(out, ("group", runs)), strict=True))
        model = load_model(spec.model, dtype=spec.dtype, device=spec.device)
        reading = {"context_size": spec.context_size, "text_column": spec.text_column}
        first = load_sae(next(iter(folders.values())), device=spec.device)
        x, *_ = held_out_activations(first, model, spec.evaluate_corpus or spec.corpus, n_tokens, **reading)
        words = micro_words(model, spec.hook_name, PROBED, context_size=spec.context_size)
        found = recommend(_measured(runs, folders, x, words), next(iter(runs.values())).training_tokens)
        found.save(out)
    return found


def _measured(
    runs: Mapping[str, RunSpec], folders: Mapping[str, Path], x: Tensor, words: Words
) -> list[dict[str, Any]]:
    """Return what each training has come to."""
    task, trials = ProbeTask(words, words), []
    for name in paced(runs, "measure", len(runs), "SAE"):
        spec = runs[name]
        sae = load_sae(folders[name], device=spec.device)
        how, acts = fit(sae, x, x), encode_words(sae, words.x)
        found = list(sparse_probes(task, acts, acts, name, PROBES.values()))
        auroc = {kind: float(np.mean([d["auroc"].value for d in found if d["method"] == kind])) for kind in PROBES}
        numbers = {"l0": how.l0, "explained_variance": how.explained_variance, "dead": how.dead}
        named = {"k": spec.sae["k"], "seed": spec.seed}
        trials.append({**named, **numbers, "projections": projections(sae, x), "auroc": auroc})
    return trials
