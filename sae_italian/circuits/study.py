"""Graphs of many prompts: scores with intervals over them, beside random transcoders and what is known of their latents.

Cases are pairs of prompts of equal length that want opposite tokens, so a graph explains the difference of two logits:
agreement over an attractor, in a relative clause or not, the gender of a participle, indirect-object identification; or
a file of your own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_italian import micro_italiano
from sae_italian.analysis.tasks import ioi_pairs, number_pairs, words_for
from sae_italian.base import pictures
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import paced
from sae_italian.base.report import shown, table
from sae_italian.base.statistics import Estimate, mean_interval
from sae_italian.circuits.check import check, random_graph
from sae_italian.circuits.edges import attribute, layers_of
from sae_italian.circuits.graph import Graph, influence
from sae_italian.circuits.planted import carriers, found_among, patching_effects

# The cases, and what the grammar's latents must carry.
CASES = {"agreement": "number", "attractor": "number", "participle": "gender", "ioi": ""}
TOP = 10  # nodes that a graph names
CHECKED = 20  # latents of each prompt that are taken away in the real model
PEOPLE = "ragazzo ragazza|nonno nonna|zio zia|figlio figlia|maestro maestra|bambino bambina|amico amica|cugino cugina"
SUBJECTS = "La ragazza Le ragazze|Il ragazzo I ragazzi|La donna Le donne|Il bambino I bambini|La signora Le signore"
SEEING = "vede vedono|cerca cercano|ama amano|guarda guardano|sente sentono|conosce conoscono"
SEEN = "il cane i cani|il gatto i gatti|la casa le case|il libro i libri"
DOING = "corre corrono|ride ridono|parla parlano|canta cantano|dorme dormono|è sono"
PARTICIPLES = "andato arrivato tornato partito uscito entrato nato morto stato caduto"
_OTHER = {  # a determiner in the other number, in the other gender
    "number": "il i|la le|questo questi|questa queste|quel quei|quella quelle",
    "gender": "il la|i le|un una|questo questa|questi queste|quel quella|quei quelle",
}


class Case(NamedTuple):
    """A prompt and its counterfactual, equally long in tokens; the right next token and the wrong one."""

    prompt: str
    counterfactual: str  # "" where there is none
    right: int
    wrong: int  # -1: the graph explains the right token alone


class Studied(NamedTuple):
    """One prompt: of its graph and of the random transcoders' one; NaN where it was not measured."""

    prompt: str
    numbers: tuple[dict[str, float], dict[str, float]]


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
    rows: tuple[Studied, ...]

    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """Return by number, where it was measured, its mean of these, of random transcoders, and of the difference."""
        rows = {name: [[each.get(name, np.nan) for each in row.numbers] for row in self.rows] for name in NUMBERS}
        sides = {name: np.array(pairs).T for name, pairs in rows.items()}
        return {
            name: {"these": mean_interval(mine), "random": mean_interval(random), "gain": mean_interval(mine - random)}
            for name, (mine, random) in sides.items()
            if np.isfinite(mine).any()
        }

    def text(self) -> str:
        rows = [
            (name.replace("_", " "), *(shown(each) for each in found.values()))
            for name, found in self.estimates().items()
        ]
        return f"{self.case}, {len(self.rows)} prompts\n\n{table('mean over prompts | these | random | gain', rows)}"

    def svg(self) -> str:
        """Return the means with their intervals, these transcoders beside random ones."""
        found = self.estimates()

        def draw(axes: Any) -> None:
            for row, pair in enumerate(found.values()):
                for key, shift, colour in (("these", -0.15, pictures.OURS), ("random", 0.15, pictures.REFERENCE)):
                    axes[0].plot([pair[key].lo, pair[key].hi], [row + shift] * 2, color=colour)
                    axes[0].plot([pair[key].value], [row + shift], "o", color=colour, label=key if row == 0 else None)
            axes[0].set_yticks(range(len(found)), [name.replace("_", " ") for name in found])
            axes[0].invert_yaxis()
            axes[0].axvline(0, color="black", linewidth=0.5)
            axes[0].legend(fontsize=8)
            axes[0].set_xlabel("mean over prompts, 95 % interval")

        return pictures.svg(draw, 1, (6, 0.4 * len(found) + 1.2))


def study(
    model: Any, transcoders: Sequence[Any], case: str, n: int, *, max_nodes: int = 4096, batch: int = 16, seed: int = 0
) -> Study:
    """Return the study of `n` prompts of a case (CASES), or of a file: PROMPT, a tab, the token, and one against it.

    Raises: UsageError for a case that the model's tokens do not allow, and as `attribute`.
    """
    cases, feature = cases_of(case, model, n, seed), CASES.get(case, "") if _embedded(model) else ""
    by_layer = layers_of(transcoders, model)
    carrying: list[Any] = [{}, {}]
    rows = []
    for number, one in enumerate(paced(cases, "graphs", len(cases), "prompt")):
        wanted: dict[str, Any] = {"logits": [one.right], "against": None if one.wrong < 0 else one.wrong}
        graph = attribute(model, transcoders, one.prompt, max_nodes=max_nodes, batch=batch, **wanted)
        twins, other = random_graph(model, transcoders, graph, batch=batch, seed=seed)
        checked = check(model, transcoders, graph, control=(twins, other), n_latents=CHECKED, seed=seed)
        layers = by_layer, layers_of(twins, model)
        if feature and number == 0:
            carrying = [carriers(model, each, feature) for each in layers]
        both = zip((graph, other), layers, (checked.graph, checked.random), carrying, strict=True)
        numbers = [_numbers(model, one, *each) for each in both]
        for told, scored in zip(numbers, checked.scores.values(), strict=True):
            told |= dict(zip(("replacement", "completeness"), scored, strict=True))
        rows.append(Studied(one.prompt, (numbers[0], numbers[1])))
    return Study(case, tuple(rows))


def _numbers(model: Any, case: Case, graph: Graph, by_layer: Any, agreements: Any, carrying: Any) -> dict[str, float]:
    """Return what one graph foretells, and what it names of what patching and the grammar know."""
    told = {"direct": agreements[0].direct.value, "correlation": agreements[0].paths.value}
    told["slope"] = agreements[0].slope.value
    if case.wrong >= 0:
        told["right"] = float(graph.own[-1] > 0)
    latents = np.flatnonzero(graph.of_kind("latent"))
    order = influence(graph)[latents]
    if case.counterfactual and len(latents):
        effects = np.abs(patching_effects(model, by_layer, graph, case.counterfactual, (case.right, case.wrong)))
        largest, named = (set(np.argsort(-each, kind="stable")[:TOP].tolist()) for each in (effects[latents], order))
        told["patching"] = len(largest & named) / min(TOP, len(latents))
    if carrying:
        nodes = [graph.nodes[i] for i in latents.tolist()]
        first = _first_difference(model.tokenizer, case)
        true = [carrying[node.layer][node.index] and node.position >= first for node in nodes]
        found = found_among(order, np.array(true, dtype=bool), TOP)
        told |= {**found._asdict(), "over_chance": found.precision - found.share}
    return told


def _first_difference(tokenizer: Any, case: Case) -> int:
    """Return the first position at which the two prompts differ: no latent before it can decide between the two tokens."""
    base, other = (tokenizer(text).input_ids for text in case[:2])
    return next(i for i, pair in enumerate(zip(base, other, strict=True)) if pair[0] != pair[1])


# --- the cases ---------------------------------------------------------------------------------------------------------


def cases_of(case: str, model: Any, n: int, seed: int = 0) -> list[Case]:
    """Return `n` cases, or those of a file. Raises: UsageError when the model's tokens allow too few."""
    tokenizer = model.tokenizer
    if Path(case).is_file():
        lines = [line.split("\t") for line in Path(case).read_text(encoding="utf-8").splitlines() if line.strip()]
        if any(len(line) < 2 for line in lines):
            raise UsageError(f"{case}: a line is PROMPT, a tab, TOKEN, and perhaps a tab and the token against it.")
        return [Case(line[0], "", *_ids(tokenizer, *line[1:3])) for line in lines[:n]]
    if case not in CASES:
        raise UsageError(f"{case!r} is no case and no file. The cases: {', '.join(CASES)}; a file has a prompt a line.")
    embedded = _embedded(model)
    if case == "ioi":
        pairs = ioi_pairs(n, tokenizer, words_for("sae-italian-mini" if embedded else "minerva-1b"), seed=seed)
        texts = [(pair.base, pair.counterfactual, pair.io, pair.new_io) for pair in pairs]
    elif embedded and case != "attractor":
        texts = _micro_pairs(CASES[case], 8 * n, seed)
    elif case == "agreement":
        texts = [
            (base, other, *(("sono", "è") if base.startswith(("I ", "Le ")) else ("è", "sono")))
            for base, other in number_pairs(n, tokenizer, seed=seed)
        ]
    else:
        texts = _attractors() if case == "attractor" else _participles()
        texts = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts)).tolist()]
    found = [
        Case(base, other, *pair) for base, other, *words in texts if (pair := _usable(tokenizer, base, other, words))
    ]
    if len(found) < n:
        raise UsageError(
            f"{case}: {len(found)} of {len(texts)} prompts suit this model's tokens, {n} wanted. Ask for fewer."
        )
    return found[:n]


def _embedded(model: Any) -> bool:
    """Whether it is the model that knows MicroItaliano, and no other Italian: the grammar's labels are its alone."""
    return getattr(model, "loaded_from", {}).get("name") == "sae-italian-mini"


def _ids(tokenizer: Any, right: str, wrong: str = "") -> tuple[int, int]:
    found = [
        tokenizer(f" {word.strip()}", add_special_tokens=False).input_ids for word in (right, wrong) if word.strip()
    ]
    if any(len(ids) != 1 for ids in found):
        raise UsageError(
            f"{right!r} and {wrong!r} have {[len(ids) for ids in found]} tokens; one of each was expected."
        )
    return found[0][0], found[1][0] if len(found) > 1 else -1


def _usable(tokenizer: Any, base: str, other: str, words: Sequence[str]) -> tuple[int, int] | None:
    """Return the first tokens of both words where these differ and the prompts are equally long, else None."""
    if len(tokenizer(base).input_ids) != len(tokenizer(other).input_ids):
        return None
    right, wrong = (tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words)
    return None if right == wrong else (right, wrong)


def _micro_pairs(kind: str, n: int, seed: int) -> list[tuple[str, str, str, str]]:
    """Return MicroItaliano's pairs, as the embedded model knows no others: a determiner, and the noun that agrees."""
    swaps = [pair.split() for pair in _OTHER[kind].split("|")]
    other = {one: two for pair in swaps for one, two in (pair, pair[::-1])}
    found = []
    for pair in micro_italiano.agreement_pairs(n, seed):
        before, _, last = pair.prefix.rpartition(" ")
        if pair.kind == kind and last in other:
            found.append((pair.prefix, f"{before} {other[last]}", pair.right, pair.wrong))
    return found


def _attractors() -> list[tuple[str, str, str, str]]:
    """Return «La ragazza che vede i cani» with corre and corrono, and the like: the object is in the other number."""
    parts = [[pair.split() for pair in told.split("|")] for told in (SUBJECTS, SEEING, SEEN, DOING)]
    found = []
    for subject, seeing, seen, doing in product(*parts):
        who, whom = ([" ".join(each[:2]), " ".join(each[2:])] for each in (subject, seen))
        for one, other in ((0, 1), (1, 0)):
            texts = [f"{who[number]} che {seeing[number]} {whom[other]}" for number in (one, other)]
            found.append((*texts, doing[one], doing[other]))
    return found


def _participles() -> list[tuple[str, str, str, str]]:
    """Return «La ragazza è» with andata and andato, and the like."""
    found = []
    for people in PEOPLE.split("|"):
        texts = [f"{the} {who} è" for the, who in zip(("Il", "La"), people.split(), strict=True)]
        texts = [
            text.replace("Il zio", "Lo zio").replace("Il amico", "L'amico").replace("La amica", "L'amica")
            for text in texts
        ]
        for participle in PARTICIPLES.split():
            words = participle, f"{participle[:-1]}a"
            found += [(*texts, *words), (*texts[::-1], *words[::-1])]
    return found
