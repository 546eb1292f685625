"""Patch an SAE's latents from a counterfactual run into a base run, and find the few that matter.

As in Cunningham et al. 2023, section 4: on the base run x_i becomes x_i + sum_{j in F} (c'_ij - c_ij) f_j at every token i,
with c' the latents of the target run; the base run's reconstruction error stays. Measured is D_KL(edited || target) of the
logits at the last token.

`eliminate` is ACDC on a flat graph (Conmy et al. 2023, algorithm 4.1), several steps at a time. Start with every latent
patched; for each threshold, visit the latents still patched in random order and un-patch one if the KL to the target rises
by less than the threshold. Each step depends on the one before; here the outcomes are guessed (first from one gradient, then
from each latent's last measured rise), the steps along the guessed path run as one batch, and what lies behind the first wrong
guess is thrown away: the decisions are those of the original. A latent is run only where it differs and something has changed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_italian.analysis.latent import edit_hooks, one_place, written_directions
from sae_italian.analysis.treebank import encode_words
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import Pace, one_of, paced
from sae_italian.base.report import MARKERS, REFERENCE, plain, svg, table
from sae_italian.base.statistics import Estimate, mean_interval
from sae_italian.models.activations import begun_at, check_context, entry_and_edit, logits_at, read_many, replaced

BATCH_ROWS = 128
BATCH_LOGITS = 2**23  # of a batch: a large vocabulary must neither fill the memory nor make steps of minutes
LEAST_ROWS = 16  # of a guessed path after wrong guesses
TOP = 20
REACHED = (0.5, 0.1)  # of the KL without any patch
_HEAD = "dictionary | candidates | KL unpatched | all patched | patches (edit) for half the KL | for a tenth | Spearman"


class PatchInputs(NamedTuple):
    """Pairs of prompts of equal length in tokens, padded on the right."""

    base: Int[Tensor, "pairs pos"]
    target: Int[Tensor, "pairs pos"]
    lengths: Int[Tensor, " pairs"]
    differ: Bool[Tensor, "pairs pos"]  # from the first token in which the two differ to the prompt's last


def patch_inputs(tokenizer: Any, model: Any, pairs: Sequence[Any]) -> PatchInputs:
    """Return the tokens of pairs whose first two values are the base's text and the counterfactual's (`IoiPair`, tuples).

    Raises: UsageError when there are none, when the two of a pair have different numbers of tokens, or one is too long.
    """
    if not (pairs := list(pairs)):
        raise UsageError("there are no pairs to patch. Give at least one.")
    sides = [[torch.tensor(tokenizer(pair[side]).input_ids) for pair in pairs] for side in (0, 1)]
    for pair, one, two in zip(pairs, *sides, strict=True):
        if len(one) != len(two):
            raise UsageError(
                f"{pair[0]!r} has {len(one)} tokens, {pair[1]!r} {len(two)}; both need as many. Use names of equal length."
            )
    base, target = (torch.nn.utils.rnn.pad_sequence(side, batch_first=True) for side in sides)
    lengths = torch.tensor([len(tokens) for tokens in sides[0]])
    check_context(base.shape[1], model.config)
    differ = (base != target).cumsum(-1) > 0
    differ &= torch.arange(base.shape[1]) < lengths[:, None]
    return PatchInputs(base.to(model.device), target.to(model.device), lengths, differ)


class Patcher:
    """One SAE's latents on some pairs, and the model's answer to any edit of them; only the blocks from there on are run."""

    candidates: Int[Tensor, " n"]  # the latents that differ anywhere between the two runs
    diff: Float[Tensor, "pairs pos n"]  # c' - c of these

    @torch.no_grad()
    def __init__(self, model: Any, sae: Any, inputs: PatchInputs):
        self.model, self.sae, self.inputs = model, sae, inputs
        self.batch_rows = min(BATCH_ROWS, max(LEAST_ROWS, BATCH_LOGITS // model.config.vocab_size))
        self.hook_in, self.hook_out = edit_hooks(sae, model)
        self.entry, self.edit = entry_and_edit(model, self.hook_out)
        self.n_pairs = len(inputs.base)
        self.target_log_p: Float[Tensor, "pairs vocab"] = self._last_log_p(inputs.target, inputs.lengths)
        read = read_many(model, inputs.base, [self.hook_in, self.entry])
        target, self.residual = read_many(model, inputs.target, [self.hook_in])[self.hook_in], read[self.entry]
        self.candidates, self.diff = self._differences(read[self.hook_in], target)
        self.directions: Float[Tensor, "n d_out"] = written_directions(sae, self.candidates).to(self.diff)
        self.in_play: Bool[Tensor, "pairs n"] = (self.diff != 0).any(1).cpu()
        self.unpatched: Float[Tensor, " pairs"] = self.kl(torch.arange(self.n_pairs), torch.zeros_like(self.delta()))

    def _differences(self, base: Tensor, target: Tensor) -> tuple[Int[Tensor, " n"], Float[Tensor, "pairs pos n"]]:
        """Return the latents that differ between activations [pairs, pos, d_in], and by how much, from the first token on."""
        differ = self.inputs.differ
        before, after = (encode_words(self.sae, x[differ]) for x in (base, target))
        found = (after - before).tocsc()
        candidates = np.flatnonzero(np.diff(found.indptr))
        diff = torch.zeros(*differ.shape, len(candidates), dtype=torch.float32)
        diff[differ] = torch.from_numpy(found[:, candidates].toarray())
        return torch.from_numpy(candidates), diff.to(self.model.device)

    def _last_log_p(self, tokens: Int[Tensor, "rows pos"], lengths: Tensor) -> Float[Tensor, "rows vocab"]:
        last = torch.arange(tokens.shape[1]) == lengths[:, None] - 1
        return logits_at(self.model, tokens, last).float().log_softmax(-1)

    def kl(self, rows: Int[Tensor, " rows"], delta: Float[Tensor, "rows pos d_out"]) -> Float[Tensor, " rows"]:
        """Return D_KL(edited || target) in nats of pair `rows[r]` with `delta[r]` added; gradients pass."""
        parts = []
        for pairs, added in zip(rows.split(self.batch_rows), delta.split(self.batch_rows), strict=True):
            lengths = self.inputs.lengths[pairs]
            longest = int(lengths.max())
            begun = begun_at(self.model, self.entry, self.residual[pairs, :longest])
            with begun, replaced(self.model, self.edit, lambda x, a=added[:, :longest]: x + a.to(x)):
                log_p = self._last_log_p(self.inputs.base[pairs, :longest], lengths)
            parts.append((log_p.exp() * (log_p - self.target_log_p[pairs])).sum(-1))
        return torch.cat(parts)

    def delta(self, chosen: Bool[Tensor, " n"] | slice = slice(None)) -> Float[Tensor, "pairs pos d_out"]:
        """Return what patching the chosen candidates (default: all) adds to the activation."""
        return self.diff[..., chosen] @ self.directions[chosen]

    def one(self, rows: Int[Tensor, " rows"], columns: Int[Tensor, " rows"] | int) -> Float[Tensor, "rows pos d_out"]:
        """Return what patching candidate `columns[r]`, or the one given, alone adds to pair `rows[r]`."""
        return self.diff[rows, :, columns][..., None] * self.directions[columns].unsqueeze(-2)

    def magnitude(self, delta: Float[Tensor, "pairs pos d_out"]) -> float:
        """Return the mean over the prompts' tokens of |x' - x|, in the activation's own units."""
        counted = torch.arange(delta.shape[1]) < self.inputs.lengths[:, None]
        return float(delta.norm(dim=-1)[counted.to(delta.device)].mean())

    @torch.no_grad()
    def effects(self) -> Float[Tensor, " n"]:
        """Return by how many nats patching each candidate alone brings the base run nearer: the mean fall of the KL.

        Where the time was over, the mean is over the pairs of which all was run; NaN for a candidate that was run nowhere.
        """
        rows, columns = self.in_play.nonzero(as_tuple=True)
        falls = torch.zeros(0)
        parts = zip(rows.split(self.batch_rows), columns.split(self.batch_rows), strict=True) if len(rows) else ()
        for some, these in paced(parts, "latents one by one", len(rows), "run", size=lambda part: len(part[0])):
            falls = torch.cat([falls, (self.unpatched[some] - self.kl(some, self.one(some, these))).cpu()])
        n_pairs = self.n_pairs if len(falls) == len(rows) else max(1, int(rows[len(falls)]))
        whole = rows[: len(falls)] < n_pairs
        columns = columns[: len(falls)][whole]
        total = torch.zeros(len(self.candidates)).index_add_(0, columns, falls[whole])
        total[torch.bincount(columns, minlength=len(total)) == 0] = torch.nan
        return total / n_pairs

    def attribution(self, at: Float[Tensor, "pairs pos d_out"] | None = None) -> Float[Tensor, " n"]:
        """Return the first-order estimate of `effects`, minus the KL's gradient times each latent's difference.

        With `at`, the gradient is taken where that has been added: the rise of the KL when a candidate is taken out.
        """
        point = (torch.zeros_like(self.delta()) if at is None else at.clone()).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.kl(torch.arange(self.n_pairs), point).sum(), point)
        return (-torch.einsum("pid,nd,pin->n", gradient, self.directions, self.diff) / self.n_pairs).cpu()

    @torch.no_grad()
    def patched_kl(self, chosen: Bool[Tensor, " n"] | slice = slice(None)) -> Float[Tensor, " pairs"]:
        """Return the KL of each pair with the chosen candidates patched (default: all)."""
        return self.kl(torch.arange(self.n_pairs), self.delta(chosen))


class Point(NamedTuple):
    """The state after one threshold."""

    threshold: float
    n_patched: int
    kl: Estimate  # mean over pairs, in nats
    magnitude: float


class _State:
    """The patched set: what it adds to each pair, each pair's KL, and every KL measured so far that still holds."""

    def __init__(self, patcher: Patcher):
        self.patcher, self.delta = patcher, patcher.delta()
        self.kl = patcher.patched_kl().cpu()
        self.rise = patcher.attribution(self.delta)  # of the mean KL when one is taken out, as last seen
        self.rows = [column.nonzero()[:, 0] for column in patcher.in_play.T]  # pairs in which it differs
        # KL with the candidate taken out; NaN where that was not measured since the pair changed
        self.without = torch.full_like(patcher.in_play, torch.nan, dtype=self.kl.dtype)
        self.removed: list[int] = []

    def change(self, column: int) -> float:
        """Return by how much the mean KL over all pairs rises with the candidate taken out; NaN where a pair's is not known."""
        rows = self.rows[column]
        rises = self.without[rows, column].double() - self.kl[rows].double()
        return float(rises.sum()) / self.patcher.n_pairs

    def visit(self, columns: Sequence[int], threshold: float, most_rows: int) -> tuple[int, bool]:
        """Visit the next candidates, as many as fill a batch, up to and with the first whose outcome was guessed wrong.

        Returns how many were visited, and whether all guesses were right. Where nothing has to be measured, the guess is
        certain.
        """
        steps, n_rows, delta = [], 0, self.delta.clone()
        changed = torch.zeros(self.patcher.n_pairs, dtype=torch.bool)
        for column in columns:
            rows = self.rows[column]
            unknown = self.without[rows, column].isnan() | changed[rows]
            if n_rows and n_rows + int(unknown.sum()) > most_rows:
                break
            out = (float(self.rise[column]) if unknown.any() else self.change(column)) < threshold
            edited = delta[rows] - self.patcher.one(rows, column)
            steps.append((column, out, rows[unknown], edited[unknown]))
            if out:
                delta[rows] = edited
                changed[rows] = True
            n_rows += int(unknown.sum())
        pairs, edits = ([step[part] for step in steps] for part in (2, 3))
        kl = self.patcher.kl(torch.cat(pairs), torch.cat(edits)).cpu() if n_rows else torch.zeros(0)
        measured = kl.split([len(some) for some in pairs])
        for number, ((column, guess, some, _), found) in enumerate(zip(steps, measured, strict=True), 1):
            self.without[some, column] = found
            self.rise[column] = change = self.change(column)
            if change < threshold:
                rows = self.rows[column]
                self.delta[rows] -= self.patcher.one(rows, column)
                self.kl[rows] = self.without[rows, column]
                self.without[rows] = torch.nan
                self.removed.append(column)
            if (change < threshold) != guess:
                return number, False
        return len(steps), True

    def point(self, threshold: float, n_patched: int) -> Point:
        return Point(threshold, n_patched, mean_interval(self.kl.double().numpy()), self.patcher.magnitude(self.delta))


@torch.no_grad()
def eliminate(patcher: Patcher, thresholds: Sequence[float], *, seed: int = 0) -> tuple[list[Point], list[int]]:
    """Return the curve over rising thresholds (nats), and the latents: first those un-patched never, or last."""
    rng, state, left = np.random.default_rng(seed), _State(patcher), list(range(len(patcher.candidates)))
    points, most_rows, over = [state.point(0.0, len(left))], patcher.batch_rows, False
    pace = Pace("elimination", len(left) * len(thresholds), "visit", "at most")
    for number, threshold in enumerate(thresholds, 1):
        order = rng.permutation(left).tolist()
        while order and not over:
            n_visited, all_right = state.visit(order, threshold, most_rows)
            order = order[n_visited:]
            most_rows = min(patcher.batch_rows, 2 * most_rows) if all_right else max(LEAST_ROWS, most_rows // 2)
            over = pace.step(n_visited)
        left = sorted({*left} - {*state.removed})
        points.append(state.point(float(threshold), len(left)))
        if over:
            break
        pace.skip(number * len(patcher.candidates))
    pace.bar.close()
    order = sorted(left, key=lambda column: -float(state.rise[column])) + state.removed[::-1]
    return points, patcher.candidates[torch.tensor(order, dtype=torch.int64)].tolist()


def thresholds(n: int = 50) -> tuple[float, ...]:
    """Return n thresholds in nats, from 1e-5 to 1 evenly in the logarithm: the paper's code has 50."""
    return tuple(np.logspace(-5, 0, n).tolist())


class Effect(NamedTuple):
    """By how many nats patching one latent alone lowers the mean KL."""

    latent: int
    exact: float
    attribution: float  # gradient times difference


class PatchingCurve(NamedTuple):
    """What patching one dictionary's latents does. KL in nats, means over pairs with intervals over pairs."""

    name: str
    hook_name: str
    d_sae: int
    n_candidates: int  # latents that differ between the runs
    unpatched: Estimate
    all_patched: Estimate  # what is left is the difference of the two reconstruction errors
    points: list[Point]
    order: list[int]  # latents, the most important first
    effects: list[Effect]  # the largest exact ones
    spearman: float | None  # of exact effects and attributions, all candidates; None where one is constant

    def reached(self, share: float) -> Point | None:
        """Return the point with the fewest patches whose KL is at most `share` of the unpatched one."""
        enough = (point for point in self.points if point.kl.value <= share * self.unpatched.value)
        return min(enough, key=lambda point: point.n_patched, default=None)


class Patching(NamedTuple):
    """The curves of several dictionaries on one task."""

    n_pairs: int
    curves: list[PatchingCurve]

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON, with the number of patches and the edit's size at which a share is reached."""
        value = plain(self)
        for found, curve in zip(value["curves"], self.curves, strict=True):
            points = ((str(share), curve.reached(share)) for share in REACHED)
            found["reached"] = {share: point and [point.n_patched, point.magnitude] for share, point in points}
        return value

    def table(self) -> str:
        """Return a Markdown table, a row per dictionary."""
        rows = []
        for curve in self.curves:
            points = [curve.reached(share) for share in REACHED]
            patches = [f"{each.n_patched} ({each.magnitude:.2f})" if each else "never" for each in points]
            spearman = "" if curve.spearman is None else f"{curve.spearman:.2f}"
            kl = f"{curve.unpatched.value:.2f}", f"{curve.all_patched.value:.3f}"
            rows.append((curve.name, curve.n_candidates, *kl, *patches, spearman))
        return table(_HEAD, rows)

    def svg(self) -> str:
        """Return the paper's figure 3: KL against the number of patches and against the edit's size, and the effects."""

        def draw(axes: Any) -> None:
            for number, curve in enumerate(self.curves):
                colour, marker = f"C{number}", MARKERS[number % len(MARKERS)]
                points = [point for point in curve.points if point.n_patched]
                kl, low, high = np.array([point.kl for point in points]).reshape(-1, 3).T
                for axis, field in zip(axes, ("n_patched", "magnitude"), strict=False):
                    x = [getattr(point, field) for point in points]
                    axis.plot(x, kl, marker=marker, markersize=3, color=colour, label=curve.name)
                    axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
                label = curve.name if curve.spearman is None else f"{curve.name}: {curve.spearman:.2f}"
                _, exact, attribution = np.reshape(curve.effects, (-1, 3)).T
                axes[2].scatter(attribution, exact, s=10, color=colour, marker=marker, label=label)
            for axis, label in zip(axes, ("patched latents", "mean edit |x' - x|"), strict=False):
                axis.axhline(self.curves[0].unpatched.value, color=REFERENCE, linestyle=":", linewidth=1)
                axis.set(xlabel=label, ylabel="KL(patched || counterfactual), nats")
            axes[0].set_xscale("log" if any(curve.n_candidates for curve in self.curves) else "linear")  # 0 has no log
            axes[0].legend()
            axes[2].set(xlabel="gradient times difference, nats", ylabel="exact fall of the KL, nats")
            axes[2].legend(title="Spearman, all latents")

        return svg(draw, 3, (13, 4))


def patch_saes(
    model: Any,
    tokenizer: Any,
    saes: Mapping[str, Any],
    pairs: Sequence[Any],
    *,
    thresholds: Sequence[float] = thresholds(),  # noqa: B008
    seed: int = 0,
) -> Patching:
    """Return what patching each named dictionary does on the pairs (`IoiPair`, or tuples of base and counterfactual).

    Anything with SAELens' `encode`, `decode` and `cfg` is a dictionary: SAEs, and the baselines of `saes.baselines`.
    Raises: UsageError for thresholds that are none or not above 0, and as `one_place` and `patch_inputs`.
    """
    one_place(saes, model)
    steps: Any = np.unique(np.asarray(thresholds, dtype=float))  # rising, each once
    if not (steps.size and steps.min() > 0):
        raise UsageError(f"thresholds is {thresholds!r}; numbers above 0, in nats, were expected.")
    inputs, curves = patch_inputs(tokenizer, model, pairs), []
    for number, (name, sae) in enumerate(saes.items()):
        with one_of(len(saes) - number):
            curves.append(_curve(name, Patcher(model, sae, inputs), steps.tolist(), seed))
    return Patching(len(inputs.base), curves)


def _curve(name: str, patcher: Patcher, thresholds: Sequence[float], seed: int) -> PatchingCurve:
    with one_of(2, alike=False):
        exact, attribution = patcher.effects().numpy(), patcher.attribution().numpy()
    points, order = eliminate(patcher, thresholds, seed=seed)
    largest = [i for i in np.argsort(-exact, kind="stable")[:TOP] if np.isfinite(exact[i])]
    varies = len(exact) > 1 and np.ptp(exact) > 0 and np.ptp(attribution) > 0  # NaN, where one was not run, is not
    return PatchingCurve(
        name=name,
        hook_name=patcher.hook_out,
        d_sae=int(patcher.sae.cfg.d_sae),
        n_candidates=len(exact),
        unpatched=mean_interval(patcher.unpatched.cpu().double().numpy()),
        all_patched=points[0].kl,
        points=points,
        order=order,
        effects=[Effect(int(patcher.candidates[i]), float(exact[i]), float(attribution[i])) for i in largest],
        spearman=float(np.asarray(scipy.stats.spearmanr(exact, attribution))[0]) if varies else None,
    )
