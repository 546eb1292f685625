"""What holds in the real model, nothing frozen: of a graph when latents are taken away, of transcoders that replace its MLPs.

With all layers replaced, each transcoder reads what the earlier ones wrote: errors add up, which no layer by itself shows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_italian.analysis.latent import codes, special
from sae_italian.base.errors import check_whole
from sae_italian.base.labels import Language, label
from sae_italian.base.pace import paced, progress, time_bound
from sae_italian.base.report import OURS, REFERENCE, shown, svg, table
from sae_italian.base.statistics import Estimate, bootstrap, correlation, slope
from sae_italian.circuits.edges import Prompt, attribute, layers_of
from sae_italian.circuits.graph import Graph, scores
from sae_italian.evaluation.diagnosis import blocks_of
from sae_italian.evaluation.evaluate import by_document
from sae_italian.models.activations import logits_at, read_many, replaced
from sae_italian.saes import hooks_of
from sae_italian.saes.baselines import random_twin
from sae_italian.saes.fit import decoded, fit

N_LATENTS, REPLAYED = 40, 5
AT_ONCE = 16  # of which each is taken away in a row of a batch
WINDOWS = 8  # of a pass that is read
LOGITS = 2**26  # numbers of logits that are held at once


class Agreement(NamedTuple):
    """How the logit's real change goes with what the graph foretells, over latents that are taken away one at a time."""

    what: str
    n: int
    direct: Estimate  # correlation with the edge to the logit
    paths: Estimate  # correlation with all paths through latents
    slope: Estimate  # of the real change on that of all paths; 1 where it is foretold in size too
    points: tuple[tuple[float, float], ...]  # of each latent: what all paths foretell, and the real change


class Checked(NamedTuple):
    """A graph's agreement with the model, and that of graphs of random transcoders on the same prompt."""

    graph: tuple[Agreement, ...]
    random: tuple[Agreement, ...]
    scores: dict[str, tuple[float, float]]  # replacement, completeness: the graph's and the random one's
    replayed: float  # largest difference of constrained patching from an edge, as a share of the largest

    def text(self) -> str:
        rows = [(a.what, a.n, shown(a.direct), shown(a.paths), shown(a.slope)) for a in (*self.graph, *self.random)]
        found = table("latents taken away | n | edge against change | all paths against change | slope", rows)
        rows = [(name, *(f"{score:.2f}" for score in pair)) for name, pair in self.scores.items()]
        told = f"written twice, all else frozen, latents move the others by their edges to {self.replayed:.1e}"
        found += f"\n\n{table('transcoders | replacement score | completeness', rows)}"
        return f"{found}\n\n{told}\n\n{self.verdict()}"

    def verdict(self, language: Language = "en") -> str:
        """Return in a sentence whether the graph foretells more than one of random transcoders does."""
        mine, control = self.graph[0].paths, self.random[0].paths
        found = "better" if mine.lo > control.hi else "alone" if mine.lo > 0 else "nothing"
        return label(f"graph.verdict.{found}", language)


def random_graph(
    model: Any, transcoders: Sequence[Any], graph: Graph, *, batch: int | None = None, seed: int = 0
) -> tuple[list[Any], Graph]:
    """Return random twins of the transcoders, and the graph of the same prompt, as large, that they make: the control."""
    both = zip(transcoders, Prompt(model, transcoders, graph.prompt).read().values(), strict=True)
    twins = [random_twin(sae, seed, lambda sae=sae, x=x: x[1:].to(sae.dtype)) for sae, x in both]
    logits = graph.nodes.index[graph.of_kind("logit")].tolist()
    how: dict[str, Any] = {"logits": logits, "against": graph.against, "batch": batch}
    with time_bound():  # whole, however little time the graph has left
        return twins, attribute(model, twins, graph.prompt, max_nodes=max(1, len(graph.latents)), **how)


def check(
    model: Any,
    transcoders: Sequence[Any],
    graph: Graph,
    *,
    control: tuple[list[Any], Graph] | None = None,
    n_latents: int = N_LATENTS,
    seed: int = 0,
) -> Checked:
    """Take latents of a graph away in the real model and compare; the same with random twins of the transcoders.

    Those looked at are the `n_latents` most influential ones, and as many at random; REPLAYED of them by constrained
    patching too. `control` is what `random_graph` returned, where it is at hand. Raises: UsageError as `attribute`.
    """
    check_whole(0, n_latents=n_latents, seed=seed)
    twins, other = control or random_graph(model, transcoders, graph, seed=seed)
    prompt, twin = (Prompt(model, saes, graph.prompt) for saes in (transcoders, twins))
    mine = _agreements(prompt, graph, n_latents, seed, "")
    random = _agreements(twin, other, n_latents, seed, ", random transcoders")
    told = {"these": scores(graph)[:2], "random": scores(other)[:2]}
    return Checked(mine, random, told, replayed(prompt, graph))


@torch.no_grad()
def replayed(prompt: Prompt, graph: Graph) -> float:
    """Return how far the edges are from constrained patching, at most, as a share of the largest edge.

    What the most influential latents write is added once more, patterns, norms and MLPs held: each target must move by
    its edge. That proves the algebra, for any transcoders; only taking latents away says whether the graph is true.
    """
    before, worst = prompt.frozen(), 0.0
    targets, first = prompt.targets(graph.nodes[graph.targets], graph.against), graph.ranked[:REPLAYED]
    for column, write in zip(first.tolist(), prompt.writes(graph.nodes[first]), strict=True):
        node, more = graph.nodes[column], torch.zeros_like(before.leaves[0][0])
        more[node.position] = write
        after = prompt.frozen(before=before, added={node.layer: more})
        change = {layer: after.reads[layer] - read for layer, read in before.reads.items()}
        moved = torch.cat([each.of(change) for each in targets]).cpu().numpy()
        worst = max(worst, float(np.abs(moved - graph.weights[:, column]).max()))
    return worst / max(float(np.abs(graph.weights).max()), 1e-10)


def _agreements(prompt: Prompt, graph: Graph, n: int, seed: int, name: str) -> tuple[Agreement, ...]:
    random = np.random.default_rng(seed).permutation(graph.latents)[:n]
    direct, paths = foretold(graph)
    told = []
    for what, some in (("most influential", graph.ranked[:n]), ("at random", random)):
        foreseen, real = paths[some], changes(prompt, graph, some)
        numbers = correlation(direct[some], real), correlation(foreseen, real), slope(foreseen, real)
        points = tuple(zip(foreseen.tolist(), real.tolist(), strict=True))
        told.append(Agreement(f"{what}{name}", len(real), *numbers, points))
    return tuple(told)


def foretold(graph: Graph) -> tuple[Float[np.ndarray, " nodes"], Float[np.ndarray, " nodes"]]:
    """Return by how much the first logit falls when each latent goes: by its edge alone, and by all paths of latents.

    Taking a latent away moves another's activation a_t by its edge, and what t writes by that share of a_t:
    d = A e + A diag(1/a) d over the latents, as long as the same latents stay active; A is triangular by their layers.
    """
    from scipy.linalg import solve_triangular

    among = graph.only(graph.of_kind("latent"))
    logit = graph.weights[len(graph.latents), graph.latents]  # rows: latents, then logits
    value = among.nodes.value
    direct, paths = np.zeros((2, len(graph.nodes)))
    onwards = solve_triangular(np.eye(len(value)) - among.weights / value, logit / value, trans=1, lower=True)
    direct[graph.latents], paths[graph.latents] = -logit, -logit - onwards @ among.weights
    return direct, paths


@torch.no_grad()
def changes(prompt: Prompt, graph: Graph, latents: np.ndarray) -> Float[np.ndarray, " n"]:
    """Return the real change of the first logit, less what it is explained less, when each latent's write is taken away."""
    model, n_pos = prompt.model, prompt.tokens.shape[1]
    logit, last = graph.nodes.index[graph.of_kind("logit")][0], torch.arange(n_pos)[None] == n_pos - 1

    def difference(n: int) -> Float[Tensor, " n"]:
        logits = logits_at(model, prompt.tokens.expand(n, -1), last.expand(n, -1)).cpu().double()
        return logits[:, logit] - (logits.mean(-1) if graph.against is None else logits[:, graph.against])

    before, found = difference(1), [torch.zeros(0)]
    for at in progress("taken away", range(0, len(latents), AT_ONCE), unit="batch"):
        nodes = graph.nodes[latents[at : at + AT_ONCE]]
        writes = prompt.writes(nodes)
        with ExitStack() as stack:
            for layer in np.unique(nodes.layer).tolist():
                own = np.flatnonzero(nodes.layer == layer)
                gone = writes.new_zeros(len(nodes), n_pos, writes.shape[1])
                gone[own, nodes.position[own]] = writes[own]
                stack.enter_context(replaced(model, f"blocks.{layer}.hook_mlp_out", lambda x, w=gone: x - w.to(x)))
            found.append(difference(len(nodes)) - before)
    return torch.cat(found).numpy()


def check_svg(checked: Checked) -> str:
    """Return what was foretold against what happened, a point a latent: this graph's, and the random transcoders'."""

    def draw(axes: Any) -> None:
        sides = zip(axes, (checked.graph, checked.random), ("this graph", "random transcoders"), strict=True)
        for axis, pair, title in sides:
            for found, colour in zip(pair, (OURS, REFERENCE), strict=True):
                points = np.array(found.points).reshape(-1, 2)
                axis.scatter(*points.T, s=12, color=colour, label=found.what.split(",")[0])
            axis.axline((0, 0), slope=1, color="black", linewidth=0.5, linestyle=":")
            axis.set_xlabel("foretold change of the logit")
            axis.set_title(title, fontsize=9)
        axes[0].set_ylabel("real change")
        axes[0].legend(fontsize=8)

    return svg(draw, 2, (8, 3.6))


# --- a set of transcoders -----------------------------------------------------------------------------------------------


# The losses of a set: what stands in the place of the MLPs of all its layers.
LOSSES = {
    "ce": "the model's own",
    "ce_replaced": "these transcoders",
    "ce_random": "random transcoders",
    "ce_zero": "nothing",
}


@torch.no_grad()
def examine_set(
    saes: Sequence[Any],
    model: Any,
    corpus: str,
    *,
    n_tokens: int = 8192,
    context_size: int | None = None,
    text_column: str = "text",
    seed: int = 0,
) -> tuple[dict[str, Any], str]:
    """Return what a set of transcoders is worth on held-out text, for JSON and as tables.

    By layer, each transcoder by itself: L0, centred explained variance, the share of latents that are never active. Of all
    together the LOSSES in nats per token and what share of (ce_zero - ce) the transcoders recover, and random twins of
    them, with intervals over documents.
    Raises: UsageError as `layers_of`, and for a corpus that is too short.
    """
    by_layer = layers_of(saes, model)
    context = int(context_size or saes[0].cfg.metadata.context_size or 128)
    blocks = blocks_of(model, corpus, "heldout", n_tokens, context, text_column)
    windows = torch.from_numpy(np.concatenate([block.tokens for block in blocks])).to(model.device)
    silent = special(windows, model.tokenizer)
    layers, twins = [], {}
    hooks = [hook for sae in by_layer.values() for hook in hooks_of(sae)]
    parts = [read_many(model, tokens, hooks) for tokens in windows.split(WINDOWS)]  # one pass for all
    for layer, sae in sorted(by_layer.items()):
        x, y = (torch.cat([part.pop(hook) for part in parts])[~silent].to(sae.dtype) for hook in hooks_of(sae))
        found = fit(sae, x, y)._asdict()
        layers.append({"layer": layer, **{name: found[name] for name in ("l0", "explained_variance", "dead")}})
        twins[layer] = random_twin(sae, seed, lambda x=x: x)
    ways, losses = ({}, by_layer, twins, dict.fromkeys(by_layer)), []
    size = max(1, LOGITS // (context * model.config.vocab_size))
    for some in paced(torch.arange(len(windows)).split(size), "losses", len(windows), "window", size=len):
        losses.append(torch.stack([_losses(model, windows[some], silent[some], way) for way in ways], 1))
    loss = torch.cat(losses).double().numpy()  # [tokens, ways]
    doc = np.concatenate([block.doc for block in blocks])[_counted(silent).cpu().numpy()][: len(loss)]
    sums = by_document(doc, [loss, np.ones(len(loss))])[1]  # the windows of a document are alike
    value: dict[str, Any] = {"layers": layers, "n_tokens": len(loss)}
    for way, name in enumerate(LOSSES):
        value[name] = bootstrap(sums[:, [way, 4]], lambda s: s[:, 0] / s[:, 1])
    for way, name in ((1, "recovered"), (2, "recovered_random")):
        value[name] = bootstrap(sums[:, [0, way, 3]], lambda s: (s[:, 2] - s[:, 1]) / (s[:, 2] - s[:, 0]))
    return value, _set_text(value)


def _set_text(told: Mapping[str, Any]) -> str:
    layers = [
        (n["layer"], f"{n['l0']:.1f}", f"{n['explained_variance']:.3f}", f"{n['dead']:.1%}") for n in told["layers"]
    ]
    shares = "", shown(told["recovered"], ".3f"), shown(told["recovered_random"], ".3f"), "0"
    losses = [
        (what, shown(told[name], ".3f"), share) for (name, what), share in zip(LOSSES.items(), shares, strict=True)
    ]
    return (
        f"{table('layer | L0 | explained variance | never active', layers)}\n\n"
        f"{table('MLPs of all these layers at once | CE loss | recovered', losses)}\n\n{told['n_tokens']:,} tokens"
    )


def _counted(silent: Bool[Tensor, "windows pos"]) -> Bool[Tensor, "windows pos"]:
    """Return from which tokens the next one's loss counts: neither of the two is special."""
    return ~silent & ~silent.roll(-1, 1) & (torch.arange(silent.shape[1]) < silent.shape[1] - 1).to(silent.device)


def _losses(
    model: Any, tokens: Int[Tensor, "windows pos"], silent: Bool[Tensor, "windows pos"], way: Mapping[int, Any]
) -> Float[Tensor, " counted"]:
    """Return the loss of each token that counts."""
    wanted = _counted(silent)
    with with_transcoders(model, way, silent):
        logits = logits_at(model, tokens, wanted).float()
    return torch.nn.functional.cross_entropy(logits, tokens.roll(-1, 1)[wanted], reduction="none").cpu()


@contextmanager
def with_transcoders(model: Any, by_layer: Mapping[int, Any], silent: Bool[Tensor, "windows pos"]) -> Iterator[None]:
    """Put each layer's transcoder in the place of its MLP (None: nothing), but at special tokens, where the MLP stays."""
    reads: dict[int, Tensor] = {}

    def write(layer: int, sae: Any, out: Tensor) -> Tensor:
        told = torch.zeros_like(out)
        if sae is not None:
            told = decoded(sae, codes(sae, reads[layer]), reads[layer].to(sae.dtype)).to(out)
        return torch.where(silent[..., None], out, told)

    with ExitStack() as stack:
        for layer, sae in by_layer.items():
            if sae is not None:
                stack.enter_context(replaced(model, hooks_of(sae)[0], partial(reads.__setitem__, layer)))
            stack.enter_context(replaced(model, f"blocks.{layer}.hook_mlp_out", partial(write, layer, sae)))
        yield
