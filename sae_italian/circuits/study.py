"""Graphs of many prompts: scores with intervals over them, beside random transcoders and what is known of their latents.

Cases are pairs of prompts of equal length that want opposite tokens, so a graph explains the difference of two logits:
agreement over an attractor, in a relative clause or not, the gender of a participle, indirect-object identification; or
a file of your own. What a graph names is held against two things.

A latent carries number (or gender) when MicroItaliano's gold labels say so of the words it fires on: nearly all of those that
have the feature have one value of it, over several word forms. A node's patching effect is what the logits' difference
loses, to first order in the live model, when its activation becomes that of the counterfactual prompt:

    (z' - z) W_dec . dL/d(MLP output), L = logit of the right token - logit of the wrong one
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_italian import micro_italiano
from sae_italian.analysis.latent import codes, token_of, tokens_inside
from sae_italian.analysis.tasks import ioi_pairs, number_pairs, words_for
from sae_italian.analysis.treebank import category, encode_words, label_names, micro_treebank, read_words, with_forms
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import paced, time_bound
from sae_italian.base.report import OURS, REFERENCE, shown, svg, table
from sae_italian.base.statistics import Estimate, mean_interval, wilson
from sae_italian.base.storage import read_yaml, understood
from sae_italian.circuits.check import check, random_graph
from sae_italian.circuits.edges import Prompt, attribute
from sae_italian.circuits.graph import Graph, influence, scores
from sae_italian.models.activations import logits_at, replaced

# The cases, and what the grammar's latents must carry.
CASES = {"agreement": "number", "attractor": "number", "participle": "gender", "ioi": ""}
TOP = 10  # nodes that a graph names
CHECKED = 20  # latents of each prompt that are taken away in the real model
PURE = 0.9  # share of one value among the words a latent fires on: its lower bound at 95 %
LEAST_FORMS = 3  # different words: a latent of one word knows that word
DOCUMENTS = 400


class Case(NamedTuple):
    """A prompt and its counterfactual, equally long in tokens; the right next token and the wrong one."""

    prompt: str
    counterfactual: str  # "" where there is none
    right: int
    wrong: int | None  # None: the graph explains the right token alone


NUMBERS = (
    "right",  # share of the prompts on which the model prefers the right token; no matter which transcoders
    "replacement",
    "completeness",
    "direct",  # correlation of the edge alone with the real change
    "correlation",  # of all paths
    "slope",
    "patching",  # share of the patching's largest nodes among the graph's
    "precision",
    "recall",
    "average_precision",
    "share",  # of the active latents that are true: the precision of chance
    "over_chance",  # precision less the share
)


class Study(NamedTuple):
    """Many prompts' graphs; each number is a mean over prompts with its interval."""

    case: str
    rows: list[dict[str, Any]]  # `prompt`; `numbers` of its graph, and of the random transcoders'

    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """Return by number, where it was measured, its mean of these, of random transcoders, and of the difference."""
        both = zip(*(row["numbers"] for row in self.rows), strict=True)
        mine, random = (pd.DataFrame(side).reindex(columns=NUMBERS).astype(float) for side in both)
        sides: dict[str, Any] = {"these": mine, "random": random, "gain": mine - random}
        measured = mine.dropna(axis=1, how="all").columns
        return {name: {side: mean_interval(of[name]) for side, of in sides.items()} for name in measured}

    def text(self) -> str:
        found = self.estimates().items()
        rows = [(name.replace("_", " "), *map(shown, sides.values())) for name, sides in found]
        return f"{self.case}, {len(self.rows)} prompts\n\n{table('mean over prompts | these | random | gain', rows)}"

    def svg(self) -> str:
        """Return the means with their intervals, these transcoders beside random ones."""
        found = self.estimates()

        def draw(axes: Any) -> None:
            for side, shift, colour in (("these", -0.15, OURS), ("random", 0.15, REFERENCE)):
                value, lo, hi = np.array([sides[side] for sides in found.values()]).T
                rows = np.arange(len(found)) + shift
                axes[0].hlines(rows, lo, hi, color=colour)
                axes[0].plot(value, rows, "o", color=colour, label=side)
            axes[0].set_yticks(range(len(found)), [name.replace("_", " ") for name in found])
            axes[0].set(ylim=(len(found) - 0.5, -0.5), xlabel="mean over prompts, 95 % interval")
            axes[0].axvline(0, color="black", linewidth=0.5)
            axes[0].legend(fontsize=8)

        return svg(draw, 1, (6, 0.4 * len(found) + 1.2))


def study(
    model: Any,
    transcoders: Sequence[Any],
    case: str,
    n: int,
    *,
    max_nodes: int = 4096,
    batch: int | None = None,
    memory: float | None = None,
    seed: int = 0,
) -> Study:
    """Return the study of `n` prompts of a case (CASES), or of a file: PROMPT, a tab, the token, and one against it.

    Raises: UsageError for a case that the model's tokens do not allow, and as `attribute`.
    """
    cases, feature = cases_of(case, model, n, seed), CASES.get(case, "") if _embedded(model) else ""
    carrying, rows = [], []
    for one in paced(cases, "graphs", len(cases), "prompt"):
        wanted: dict[str, Any] = {"logits": [one.right], "against": one.wrong, "memory": memory}
        with time_bound():  # a prompt's graph is whole; the time ends the study between prompts
            graph = attribute(model, transcoders, one.prompt, max_nodes=max_nodes, batch=batch, **wanted)
        twins, other = random_graph(model, transcoders, graph, batch=batch, seed=seed)
        checked = check(model, transcoders, graph, control=(twins, other), n_latents=CHECKED, seed=seed)
        prompts = [Prompt(model, saes, one.prompt) for saes in (transcoders, twins)]
        carrying = carrying or [carriers(model, each.by_layer, feature) if feature else {} for each in prompts]
        sides = zip(prompts, (graph, other), (checked.graph, checked.random), carrying, strict=True)
        rows.append({"prompt": one.prompt, "numbers": [_numbers(one, *side) for side in sides]})
    return Study(case, rows)


def _numbers(case: Case, prompt: Prompt, graph: Graph, agreements: Any, carrying: Any) -> dict[str, float]:
    """Return what one graph foretells, and what it names of what patching and the grammar know."""
    first, told = agreements[0], dict(zip(("replacement", "completeness"), scores(graph), strict=False))
    told |= {"direct": first.direct.value, "correlation": first.paths.value, "slope": first.slope.value}
    if case.wrong is not None:
        told["right"] = float(graph.own[-1] > 0)
    if case.wrong is not None and case.counterfactual and len(graph.latents):
        effects = np.abs(patching_effects(prompt, graph, case.counterfactual, (case.right, case.wrong)))
        largest = graph.latents[np.argsort(-effects, kind="stable")[:TOP]]
        told["patching"] = float(np.isin(graph.ranked[:TOP], largest).mean())
    if carrying:
        nodes, ids = graph.nodes[graph.latents], prompt.model.tokenizer
        # no latent before the first token in which the two prompts differ can decide between the two answers
        first = np.flatnonzero(np.not_equal(*(ids(text).input_ids for text in case[:2])))[0]
        true = [carrying[node.layer][node.index] and node.position >= first for node in nodes]
        told |= found_among(influence(graph)[graph.latents], np.array(true, dtype=bool), TOP)
    return told


# --- what is known ------------------------------------------------------------------------------------------------------


def carriers(
    model: Any, by_layer: Mapping[int, Any], feature: str, *, documents: int = DOCUMENTS, seed: int = 7
) -> dict[int, Bool[np.ndarray, " d_sae"]]:
    """Return by layer which latents carry a feature (`number`, `gender`) of MicroItaliano's words."""
    bank, forms = with_forms(micro_treebank(documents, seed))
    values = [name for name in label_names([bank]) if category(name) == feature.capitalize()]
    found, context = {}, getattr(model.config, "max_position_embeddings", 512)
    for layer, sae in by_layer.items():
        words = read_words(model, sae.cfg.metadata.hook_name, bank, [*values, *forms], context_size=context)
        have = words.labels[:, : len(values)].sum(axis=1) > 0
        fired = (encode_words(sae, words.x[have]) > 0).astype(int)  # pyright: ignore[reportAttributeAccessIssue]
        counts = (words.labels[have].T @ fired).toarray()  # [values and forms, d_sae]
        most, told = counts[: len(values)].max(axis=0), counts[: len(values)].sum(axis=0)
        pure = [wilson(*pair).lo > PURE for pair in zip(most.tolist(), told.tolist(), strict=True)]
        found[layer] = ((counts[len(values) :] > 0).sum(axis=0) >= LEAST_FORMS) & np.array(pure)
    return found


def patching_effects(
    prompt: Prompt, graph: Graph, counterfactual: str, pair: tuple[int, int]
) -> Float[np.ndarray, " latents"]:
    """Return what patching each latent of a graph, from a counterfactual of as many tokens, does to a difference of logits."""
    other = Prompt(prompt.model, list(prompt.by_layer.values()), counterfactual).read()
    own, last = prompt.read(), torch.arange(prompt.tokens.shape[1])[None] == prompt.tokens.shape[1] - 1
    with torch.no_grad():
        moves = {layer: codes(sae, other[layer]) - codes(sae, own[layer]) for layer, sae in prompt.by_layer.items()}
    leaves = {layer: torch.zeros_like(move).requires_grad_() for layer, move in moves.items()}

    def moved(sae: Any, leaf: Tensor, out: Tensor) -> Tensor:
        z = leaf.to(sae.device, sae.dtype)
        return out + (sae.decode(z) - sae.decode(torch.zeros_like(z))).to(out)

    with ExitStack() as stack, torch.enable_grad():
        for layer, leaf in leaves.items():
            write = partial(moved, prompt.by_layer[layer], leaf)
            stack.enter_context(replaced(prompt.model, f"blocks.{layer}.hook_mlp_out", write))
        logits = logits_at(prompt.model, prompt.tokens, last)[0]
        gradients = torch.autograd.grad(logits[pair[0]] - logits[pair[1]], list(leaves.values()))
    told = zip(moves.items(), gradients, strict=True)
    found = {layer: (move * gradient).cpu().double().numpy() for (layer, move), gradient in told}
    latents = graph.nodes[graph.latents]
    places = zip(latents.layer.tolist(), latents.position.tolist(), latents.index.tolist(), strict=True)
    return np.array([found[layer][position, index] for layer, position, index in places])


def found_among(order: Float[np.ndarray, " n"], true: Bool[np.ndarray, " n"], k: int) -> dict[str, float]:
    """Return how well an order (largest first) finds what is true: of the first k, and over the whole order.

    `share` is how much is true, the precision of chance; without anything true, or false, it is all that is returned.
    """
    from sklearn.metrics import average_precision_score

    share = float(true.mean()) if len(true) else float("nan")
    if not true.any() or true.all():
        return {"share": share}
    named = true[np.argsort(-order, kind="stable")[:k]]
    told = {"precision": named.mean(), "recall": named.sum() / true.sum(), "share": share}
    told["over_chance"] = told["precision"] - share
    return {name: float(value) for name, value in told.items()} | {
        "average_precision": float(average_precision_score(true, order))
    }


# --- the cases ---------------------------------------------------------------------------------------------------------


def cases_of(case: str, model: Any, n: int, seed: int = 0) -> list[Case]:
    """Return `n` cases, or those of a file. Raises: UsageError when the model's tokens allow too few."""
    if Path(case).is_file():
        return _read(Path(case), model.tokenizer, n)
    if case not in CASES:
        raise UsageError(f"{case!r} is no case and no file. The cases: {', '.join(CASES)}; a file has a prompt a line.")
    found: dict[str, Case] = {}  # by prompt: no two of them are one prompt with other answers
    for base, other, *words in _texts(case, model, n, seed):
        one, two = (len(model.tokenizer(text).input_ids) for text in (base, other))
        right, wrong = (ids[0] for ids in tokens_inside(model.tokenizer, words))
        if one == two and right != wrong:
            found.setdefault(base, Case(base, other, right, wrong))
    if len(found) < n:
        raise UsageError(f"{case}: {len(found)} different prompts suit this model's tokens, {n} wanted. Ask for fewer.")
    return list(found.values())[:n]


def _read(file: Path, tokenizer: Any, n: int) -> list[Case]:
    """Return the first `n` cases of a file: a line is PROMPT, a tab, TOKEN, perhaps a tab and the token against it."""
    with understood(file, "Save it as UTF-8."):
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    lines = [line.split("\t") for line in lines if line.strip()]
    if not lines or any(len(line) < 2 or not line[1].strip() for line in lines):
        raise UsageError(f"{file}, {len(lines)} lines: each is PROMPT, a tab, TOKEN, perhaps a tab and one more.")
    ids: list[Any] = [[token_of(tokenizer, text) for text in line[1:3] if text.strip()] for line in lines[:n]]
    return [Case(line[0], "", *(own + [None])[:2]) for line, own in zip(lines, ids, strict=False)]


def _embedded(model: Any) -> bool:
    """Whether it is the model that knows MicroItaliano, and no other Italian: the grammar's labels are its alone."""
    return getattr(model, "loaded_from", {}).get("name") == "sae-italian-mini"


def _texts(case: str, model: Any, n: int, seed: int) -> Iterable[tuple[str, str, str, str]]:
    """Return prompts and their counterfactuals, with the right word and the wrong one: more than are wanted."""
    embedded = _embedded(model)
    if case == "ioi":
        words = words_for("sae-italian-mini" if embedded else "minerva-1b")
        pairs = ioi_pairs(2 * n, model.tokenizer, words, seed=seed)
        return [(pair.base, pair.counterfactual, pair.io, pair.new_io) for pair in pairs]
    if embedded and case != "attractor":
        return _micro_pairs(CASES[case], 16 * min(n, 4096), seed)  # it has no more than so many
    if case == "agreement":
        verbs = {True: ("sono", "è"), False: ("è", "sono")}
        pairs = number_pairs(2 * n, model.tokenizer, seed=seed)
        return [(base, other, *verbs[base.startswith(("I ", "Le "))]) for base, other in pairs]
    texts = _made(case)
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts)).tolist()]


def _micro_pairs(kind: str, n: int, seed: int) -> Iterable[tuple[str, str, str, str]]:
    """Yield MicroItaliano's pairs, as the embedded model knows no others: a determiner, and the noun that agrees."""
    other = {one: two for pair in _words()[kind] for one, two in (pair, pair[::-1])}
    for pair in micro_italiano.agreement_pairs(n, seed):
        before, _, last = pair.prefix.rpartition(" ")
        if pair.kind == kind and last in other:
            yield pair.prefix, f"{before} {other[last]}", pair.right, pair.wrong


@cache
def _words() -> dict[str, list[list[str]]]:
    told = read_yaml(Path(__file__).with_name("cases.yaml"))
    return {name: [pair.split("/") for pair in pairs] for name, pairs in told.items()}


def _made(case: str) -> list[tuple[str, str, str, str]]:
    """Return «La ragazza che vede i cani», corre, corrono (the object in the other number), or «La ragazza è», andata, andato."""
    over = case == "attractor"
    names, found = ("subjects", "seeing", "seen", "doing") if over else ("people", "participles"), []
    for who, *more, answers in product(*(_words()[name] for name in names)):
        for one, other in ((0, 1), (1, 0)):
            ends = [f"che {more[0][i]} {more[1][other]}" if over else "è" for i in (one, other)]
            found.append((f"{who[one]} {ends[0]}", f"{who[other]} {ends[1]}", answers[one], answers[other]))
    return found
