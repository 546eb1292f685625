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
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
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
DECIDING = ("d/8", "d/4")  # N under d/2, as in their notebook: half of all projections are noise about 0
BATCH_ELEMENTS = 2**22  # projections of one batch: 4,096 tokens of 1,024 latents
PROBED = 150  # documents of MicroItaliano whose words the probes read, half of them in training
PROBES = {"sparse 1": 1, "sparse 20": 20}  # of analysis/detect: logistic on so many latents


@dataclass(frozen=True)
class Trial:
    """One short training, measured on held-out text; probes: mean AUROC over the labels of words, on other documents."""

    k: int
    seed: int
    l0: float
    explained_variance: float  # centred
    dead: float  # share of latents that never fired
    projections: dict[str, float]  # s_N by N
    auroc: dict[str, float]


@dataclass(frozen=True)
class Choice:
    """What the trials say: a k with the interval of those that do as well, or why none is recommended."""

    trials: list[Trial]
    minima: dict[str, int]  # k of the grid at which s_N is least, by N
    n_tokens: int  # of each training
    why: str
    k: float | None = None
    lo: float | None = None
    hi: float | None = None

    def table(self) -> str:
        """Return a Markdown table of means over seeds, one row for each k, and the recommendation."""
        rows = []
        for k, some in by_k(self.trials).items():
            cells = [np.mean([getattr(t, name) for t in some]) for name in ("l0", "explained_variance", "dead")]
            shown = f"{cells[0]:.1f}", f"{cells[1]:.3f}", f"{cells[2]:.1%}"
            aurocs = (f"{np.mean([t.auroc[name] for t in some]):.3f}" for name in PROBES)
            of_name = ([t.projections[name] for t in some] for name in SHARES)
            proxies = (f"{np.mean(s):.4g} ± {np.std(s, ddof=1) if len(s) > 1 else np.nan:.2g}" for s in of_name)
            rows.append((k, *shown, *aurocs, *proxies))
        heads = [f"s_N, N = {name}" for name in SHARES]
        head = " | ".join(["k", "L0", "explained variance", "dead", *(f"AUROC, {name}" for name in PROBES), *heads])
        return f"{table(head, rows)}\n\n{self.why}"

    def svg(self) -> str:
        """Return the proxy (1 at its largest), the probes, the fit and the dead share over k; bars: one seed-sd."""
        groups = by_k(self.trials)
        proxy = {name: [[t.projections[name] for t in some] for some in groups.values()] for name in SHARES}
        proxy = {name: np.array(of) / np.mean(of, axis=1).max() for name, of in proxy.items()}
        probes = {name: [[t.auroc[name] for t in some] for some in groups.values()] for name in PROBES}
        fits = {"explained variance": [[t.explained_variance for t in some] for some in groups.values()]}
        dead = {"dead · morti": [[t.dead for t in some] for some in groups.values()]}
        panels = {"s_N": proxy, "AUROC": probes, "explained variance · varianza spiegata": fits, "dead · morti": dead}

        def draw(axes: Any) -> None:
            for axis, (title, lines) in zip(axes, panels.items(), strict=True):
                for (name, of), colour in zip(lines.items(), (OURS, "#d17b0f", "#3b5bdb"), strict=False):
                    mean, sd = np.mean(of, axis=1), np.std(of, axis=1)
                    axis.errorbar(list(groups), mean, sd, color=colour, marker="o", markersize=3, label=name)
                if self.lo is not None and self.hi is not None:
                    axis.axvspan(self.lo, self.hi, color=REFERENCE, alpha=0.2, linewidth=0)
                axis.set_xscale("log", base=2)
                axis.set(xlabel="k", title=title)
                axis.legend(frameon=False, fontsize=7)

        return svg(draw, len(panels), (3.2 * len(panels), 3.0))

    def save(self, folder: Path) -> None:
        """Write choose-k.json, choose-k.md and choose-k.svg."""
        parts = ["# Which k · Quale k", self.table()]
        save_result(folder, "choose-k", plain(self), parts, **{"choose-k": self.svg()})


def by_k(trials: Iterable[Trial]) -> dict[int, list[Trial]]:
    """Return the trials of each k, smallest k first."""
    in_order = sorted(trials, key=lambda t: (t.k, t.seed))
    return {k: list(some) for k, some in groupby(in_order, lambda t: t.k)}


@torch.no_grad()
def projections(sae: Any, x: Float[Tensor, "tokens d_in"]) -> dict[str, float]:
    """Return s_N for N an eighth, a quarter and half of the dictionary: means over batches of tokens."""
    rows = normalize(sae.W_dec.float(), dim=-1)
    size = max(1, BATCH_ELEMENTS // len(rows))
    found: dict[str, list[float]] = {name: [] for name in SHARES}
    for part in x.split(size):
        projected = ((part.to(rows) - sae.b_dec.float()) @ rows.T).flatten()
        for name, of in SHARES.items():
            place = max(1, len(projected) - len(rows) // of * len(part))  # the rest lies above it
            found[name].append(projected.kthvalue(place).values.item())
    return {name: float(np.mean(values)) for name, values in found.items()}


def recommend(trials: Sequence[Trial], n_tokens: int) -> Choice:
    """Return the k at which the proxy is least, by a parabola through its neighbours on the grid (of log k).

    The interval holds the k of the grid whose mean is within one seed-sd of the minimum, and at least half a step to each
    side.
    """
    groups = by_k(trials)
    grid, found = list(groups), {}
    for name in DECIDING:
        values = [[t.projections[name] for t in some] for some in groups.values()]
        spread = np.var(values, axis=1, ddof=min(1, len(values[0]) - 1)).mean()
        found[name] = np.mean(values, axis=1), float(np.sqrt(spread))
    minima = {name: grid[int(mean.argmin())] for name, (mean, _) in found.items()}
    said, steps = ", ".join(f"{name}: {k}" for name, k in minima.items()), [grid.index(k) for k in minima.values()]
    at_an_end = {0, len(grid) - 1} & set(steps)
    if at_an_end or max(steps) - min(steps) > 1:
        what = "s_N is least at an end of it" if at_an_end else "the minima of s_N do not agree"
        why = f"Not found, widen the grid: {what} ({said}). More tokens (share=1) and more seeds make the curves steadier."
        return Choice(list(trials), minima, n_tokens, why)
    vertices, los, his = zip(*(_vertex(np.log2(grid), mean, sd) for mean, sd in found.values()), strict=True)
    k, lo, hi = (float(2**value) for value in (np.median(vertices), min(los), max(his)))
    return Choice(list(trials), minima, n_tokens, f"Recommended: k = {k:.0f} ({lo:.0f} to {hi:.0f}).", k, lo, hi)


def _vertex(
    place: Float[np.ndarray, " grid"], mean: Float[np.ndarray, " grid"], sd: float
) -> tuple[float, float, float]:
    """Return where a parabola through the least mean and its neighbours is least, and the interval around it."""
    i = int(mean.argmin())
    x, y = place[i - 1 : i + 2], mean[i - 1 : i + 2]
    a, b, _ = np.polyfit(x, y, 2)
    half = (x[0] + x[1]) / 2, (x[1] + x[2]) / 2
    vertex = float(np.clip(-b / (2 * a), *half)) if a > 0 else float(x[1])
    lo = hi = i  # as far as the means stay within one sd
    while lo > 0 and mean[lo - 1] <= mean[i] + sd:
        lo -= 1
    while hi < len(mean) - 1 and mean[hi + 1] <= mean[i] + sd:
        hi += 1
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


def _measured(runs: Mapping[str, RunSpec], folders: Mapping[str, Path], x: Tensor, words: Words) -> list[Trial]:
    """Return what each training has come to."""
    task, trials = ProbeTask(words, words), []
    for name in paced(runs, "measure", len(runs), "SAE"):
        spec = runs[name]
        sae = load_sae(folders[name], device=spec.device)
        how, acts = fit(sae, x, x), encode_words(sae, words.x)
        probes: dict[str, list[float]] = {method: [] for method in PROBES}
        for found in sparse_probes(task, acts, acts, name, PROBES.values()):
            probes[found.method].append(found.auroc.value)
        auroc = {method: float(np.mean(values)) for method, values in probes.items()}
        numbers = how.l0, how.explained_variance, how.dead, projections(sae, x), auroc
        trials.append(Trial(spec.sae["k"], spec.seed, *numbers))
    return trials
