"""The geometry of some SAEs as one result, and which latents another seed finds again.

Of the geometry every pair is compared, and written as JSON, Markdown, Parquet, pictures and a page.

Seeds: mutual nearest neighbours of decoder rows, beside directions drawn at random. A latent counts as found in another seed
when each is the other's nearest and their cosine is 0.7 or more (Paulo and Belrose 2025, arXiv 2501.16615, match by Hungarian;
a match above 0.71 is the same where the other rows are orthogonal). No share is told without that of random directions of the
same mean and covariance as each seed's rows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file

from sae_italian.analysis import directions, treebank
from sae_italian.analysis.directions import EDGES, Comparison, MapMethod, Set, compare, map_of
from sae_italian.analysis.latent import named
from sae_italian.analysis.treebank import Words
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import paced
from sae_italian.base.report import COLOURS, MARKERS, OURS, REFERENCE, WARNING, plain, save_result, shown, svg, table
from sae_italian.base.statistics import Estimate, shares_by_document, wilson
from sae_italian.base.storage import atomic_path, read_json, write_json, write_text
from sae_italian.evaluation.card import SEEDS_FILE
from sae_italian.models import load_model
from sae_italian.saes import load_sae
from sae_italian.training.run import seed_folders

MOST_PANELS = 6
BEGAN_AS_ONE = 0.05  # share of latents whose nearest has their number: by chance one in d_sae
BEGAN = (
    "{2:.0%} of the latents of {0} have their nearest in {1} at their own number: the two began as one "
    "(rows of one seed, or one trained from the other), so a match need not be what training found"
)
NEVER = -9.0  # log10 of a firing rate; SAELens writes -10 for a latent that never fired
_HEAD = (
    "latents of | against | D | sqrt(12 ln F / D) | largest random | median cosine | (random) | "
    "neighbours | new | above random | mutual | splits"
)


@dataclass(frozen=True)
class Geometry:
    """What `geometry` found: each SAE within itself, each ordered pair, and the map of all latents that took part."""

    within: list[Comparison]
    between: list[Comparison]
    seeds: dict[str, float]  # means over pairs of SAEs of one width, {} without any
    notes: list[str]
    map: MapMethod
    sets: list[Set] = field(repr=False)
    points: list[Float[np.ndarray, "n 2"]] = field(repr=False)
    texts: Mapping[str, dict[int, str]] = field(repr=False)

    @property
    def comparisons(self) -> list[Comparison]:
        return [*self.within, *self.between]

    def table(self) -> str:
        """Return a Markdown table, one row per comparison."""
        return table(_HEAD, map(_cells, self.comparisons))

    def save(self, folder: Path) -> None:
        """Write geometry.json, geometry.md, matches.parquet, matches.svg, map.svg and map.html."""
        import pyarrow as pa
        import pyarrow.parquet

        parts = ["# Geometry of the decoder directions · Geometria delle direzioni", self.table()]
        if self.seeds:
            named = ", ".join(f"{name} {value:.3g}" for name, value in self.seeds.items())
            parts.append(f"SAEs of one width, means over ordered pairs: {named}.")
        for item in self.between:
            for split in item.splits[:5]:
                into = ", ".join(f"{i} ({c:.2f})" for i, c in zip(split.into[:6], split.cosines, strict=False))
                parts.append(f"- latent {split.latent} of {item.target} splits in {item.source}: {into}")
        parts += [f"Note: {note}." for note in self.notes]
        save_result(folder, "geometry", plain(self), parts, matches=matches_svg(self.comparisons), map=map_svg(self))
        write_text(folder / "map.html", map_html(self))
        rows = []
        for item in self.comparisons:
            names = {"source": [item.source] * item.n_source, "target": [item.target] * item.n_source}
            rows.append(pa.table({**names, **dict(item.rows.items())}))
        with atomic_path(folder / "matches.parquet") as temporary:
            pyarrow.parquet.write_table(pa.concat_tables(rows), temporary)


def _cells(item: Comparison) -> tuple[object, ...]:
    return (
        f"{item.source} ({item.n_source:,})",
        "itself" if item.within else f"{item.target} ({item.n_target:,})",
        item.d,
        f"{item.threshold:.3f}" + ("" if item.used == item.threshold else f" (used {item.used:.3f})"),
        f"{item.random.largest:.3f}",
        f"{item.matches.quantiles['50 %']:.3f}",
        f"{item.random.quantiles['50 %']:.3f}",
        shown(item.neighbours, ".1%"),
        "-" if item.within else shown(item.new, ".1%"),
        shown(item.above_random, ".1%"),
        shown(item.mutual, ".1%"),
        "-" if item.within else shown(item.split, ".1%"),
    )


def geometry(
    saes: Mapping[str, Any],
    *,
    alive: Mapping[str, Bool[np.ndarray, " d_sae"] | None] | None = None,
    texts: Mapping[str, dict[int, str]] | None = None,
    method: MapMethod = "pca",
    seed: int = 0,
    **settings: Any,
) -> Geometry:
    """Return the geometry of some SAEs by name: each within itself, each ordered pair, and one map of all.

    `alive` says per SAE which latents take part (default: all; a dead latent keeps its random start, see `fired`),
    `texts` what is known of latents, for the map; `method` as in `map_of`, `seed` and the other settings as in `compare`.
    Raises: UsageError as `named`, or when their decoders write into spaces of different dimensions.
    """
    notes = _check(saes)
    sets = [Set.of(name, sae, (alive or {}).get(name)) for name, sae in saes.items()]
    pairs = paced(product(sets, repeat=2), "geometry", len(sets) ** 2, "pair of SAE")
    found = [compare(a, b, seed=seed, **settings) for a, b in pairs]
    within, between = ([item for item in found if item.within == own] for own in (True, False))
    for item in between:
        same = float((item.rows.latent == item.rows.nearest).mean())
        if same > BEGAN_AS_ONE:
            notes.append(BEGAN.format(item.source, item.target, same))
    width = {name: sae.W_dec.shape[0] for name, sae in saes.items()}
    seeds = _means([item for item in between if width[item.source] == width[item.target]])
    places = map_of(torch.cat([item.units.cpu() for item in sets]), method, seed)
    points = np.split(places, np.cumsum([len(item.latent) for item in sets])[:-1])
    return Geometry(within, between, seeds, notes, method, sets, points, texts or {})


def _check(saes: Mapping[str, Any]) -> list[str]:
    """Return what a reader should know of SAEs that are compared: other models, other hooks. Raises: as `geometry`."""
    (first, reference), *others = named(saes).items()
    notes = []
    for name, sae in others:
        d, expected = sae.W_dec.shape[1], reference.W_dec.shape[1]
        if d != expected:
            raise UsageError(
                f"{name} writes {d} dimensions (d_in), {first} {expected}: their directions cannot be "
                "compared. Compare SAEs of one model and site."
            )
        for key in ("model_name", "hook_name"):
            here, there = getattr(sae.cfg.metadata, key, None), getattr(reference.cfg.metadata, key, None)
            if here != there:
                notes.append(f"{name} has {key} {here!r}, {first} {there!r}")
    return notes


def fired(folder: str | Path) -> Bool[np.ndarray, " d_sae"] | None:
    """Return which latents fired in the last steps of an SAE's training, None where its folder does not say."""
    path = Path(folder) / "sparsity.safetensors"
    return load_file(path)["sparsity"].numpy() > NEVER if path.is_file() else None


def _means(pairs: Sequence[Comparison]) -> dict[str, float]:
    """Return means over ordered pairs of SAEs: the share of latents that another seed finds again, and how."""
    if not pairs:
        return {}
    shares = ("neighbours", "above_random", "alike", "mutual")
    found = {name: np.mean([getattr(item, name).value for item in pairs]) for name in shares}
    found |= {"mean_cosine": np.mean([item.matches.mean for item in pairs])}
    found |= {"mean_cosine_random": np.mean([item.random.mean for item in pairs])}
    return {"pairs": len(pairs), **{name: float(value) for name, value in found.items()}}


# --- pictures --------------------------------------------------------------------------------------------------------


def matches_svg(comparisons: Sequence[Comparison]) -> str:
    """Return the cumulative distribution of best matches of each comparison, random ones beside it (the first six)."""
    panels = comparisons[:MOST_PANELS]

    def draw(axes: Any) -> None:
        for axis, item in zip(axes, panels, strict=True):
            for distribution, colour, style, label in (
                (item.matches, OURS, "-", "decoder"),
                (item.random_like, REFERENCE, "--", "random, same covariance · caso, stessa covarianza"),
                (item.random, REFERENCE, "-", "random · caso"),
            ):
                counts = np.cumsum(distribution.histogram, dtype=float)
                axis.plot(EDGES[1:], counts / counts[-1], color=colour, linestyle=style, label=label)
            label = f"threshold · soglia {item.used:.2f}"
            axis.axvline(item.used, color=WARNING, linewidth=1, linestyle=":", label=label)
            axis.set_xlim(min(0.0, float(EDGES[np.flatnonzero(item.matches.histogram)[0]])), 1)
            axis.set_title(f"{item.source} → {'itself' if item.within else item.target}", fontsize=9)
            axis.set_xlabel("cosine with the nearest · coseno col più prossimo", fontsize=8)
        axes[0].set_ylabel("share of latents · quota di latenti")
        axes[0].legend()

    return svg(draw, len(panels), (3.6 * len(panels), 3.4))


def map_svg(found: Geometry) -> str:
    """Return the map of all latents, one colour per SAE; points are pixels of a picture inside, so it stays small."""

    def draw(axes: Any) -> None:
        style = {"s": 4, "alpha": 0.4, "linewidths": 0, "rasterized": True}
        for number, (item, places) in enumerate(zip(found.sets, found.points, strict=True)):
            look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            axes[0].scatter(*places.T, **look, **style)
            axes[0].scatter([], [], **look, label=item.name)  # one of full size for the legend
        axes[0].set(xticks=[], yticks=[], xlabel="first component · prima componente")
        axes[0].set_ylabel("second component · seconda componente")
        axes[0].legend()

    return svg(draw, 1, (6.5, 6.0))


def map_html(found: Geometry) -> str:
    """Return the explorable map as one HTML file that needs nothing else: move, zoom, search, read what a point is."""
    groups = []
    for item, points in zip(found.sets, found.points, strict=True):
        latents, texts, nearest = item.latent.tolist(), found.texts.get(item.name, {}), []
        for other in (other for other in found.comparisons if other.source == item.name):
            rows: Any = other.rows.itertuples()
            known = {row.latent: (row.nearest, round(row.cosine, 3)) for row in rows}
            own = [known.get(latent) for latent in latents]  # None: not compared
            nearest.append({"target": other.target, "used": other.used, "rows": own})
        x, y = np.round(points.T, 4).tolist()
        text = [texts.get(latent, "") for latent in latents] if texts else []
        groups.append({"name": item.name, "latent": latents, "x": x, "y": y, "text": text, "nearest": nearest})
    page = {"method": found.map, "groups": groups, "colours": COLOURS}
    data = json.dumps(page, ensure_ascii=False, separators=(",", ":"))
    safe = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    template = (files("sae_italian.analysis") / "data" / "map.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/null", safe)


# --- what another seed finds again -----------------------------------------------------------------------------------


CURVE = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # cosines from which a match counts
LABELLED = 0.5  # F1 from which a latent has a label
PROBED = 200  # documents of MicroItaliano whose words give labels


class Recurrence(NamedTuple):
    """Which of the first seed's live latents the other seeds find; shares with their intervals over latents."""

    seeds: list[int]
    found: list[int | None]  # in how many seeds, the first counted; None for a latent that never fired
    share: Estimate  # of the live latents that every seed finds
    random: float  # the same of random directions
    # by the least cosine: share found in another seed, mean over seeds; of random ones
    curve: dict[str, tuple[float, float]]
    labelled: int  # live latents that detect a label of words (F1 of 0.5 or more)
    same_label: Estimate  # share of these whose partner in another seed has the same label, over all pairs
    same_label_chance: float  # the same with as many partners, dealt out at random among the labelled latents

    def table(self) -> str:
        """Return the shares as Markdown, and what they say in a sentence."""
        rows = [
            (f"cosine {least} or more", f"{own:.1%}", f"{random:.1%}") for least, (own, random) in self.curve.items()
        ]
        n, labelled = len(self.seeds), shown(self.same_label, ".1%")
        said = (
            f"Found in {n} of {n} seeds: {shown(self.share, '.1%')} of the live latents (random directions {self.random:.1%}). "
            f"Of {self.labelled:,} latents with a label, {labelled} have a partner of the same label "
            f"({self.same_label_chance:.1%} by chance)."
        )
        return f"{table('mutual nearest neighbour in another seed | latents | random directions', rows)}\n\n{said}"


def recurrence(folder: Path) -> Recurrence:
    """Compare the seeds that were trained into a folder, and leave what was found in it as seeds.json.

    Raises: UsageError when the folder holds one seed.
    """
    folders = {read_json(each / "run.json")["spec"]["seed"]: each for each in seed_folders(folder)}
    if len(folders) < 2:
        raise UsageError(f"{folder} holds one seed; train it with seeds=3.")
    saes = [load_sae(each) for each in folders.values()]
    spec = read_json(folder / "run.json")["spec"]
    model, context = load_model(spec["model"]), spec["context_size"]
    words = treebank.micro_words(model, spec["hook_name"], PROBED, context_size=context)
    labels = [labels_of(sae, words) for sae in saes]
    found = compared(list(folders), saes, [fired(each) for each in folders.values()], labels)
    write_json(folder / SEEDS_FILE, plain(found))
    return found


def compared(
    seeds: Sequence[int],
    saes: Sequence[Any],
    alive: Sequence[Bool[np.ndarray, " d_sae"] | None],
    labels: Sequence[Int[np.ndarray, " d_sae"]],
) -> Recurrence:
    """Return which live latents of the first SAE the others find; `labels` numbers each one's label, -1 for none."""
    sets = [Set.of(str(seed), sae, live) for seed, sae, live in zip(seeds, saes, alive, strict=True)]
    first, *others = sets
    drawn = [directions.random_directions(*own.units.shape, seed=i, like=own.units) for i, own in enumerate(sets)]
    pairs = [mutual(first.units, other.units) for other in others]
    chance = np.stack([mutual(drawn[0], other)[0] for other in drawn[1:]])
    cosines = np.stack([cosine for cosine, _ in pairs])
    counts = 1 + (cosines >= directions.ALIKE).sum(axis=0)
    counted = dict(zip(first.latent.tolist(), counts.tolist(), strict=True))
    own, *theirs = (numbers[each.latent] for numbers, each in zip(labels, sets, strict=True))
    partners = np.stack([numbers[index] for numbers, (_, index) in zip(theirs, pairs, strict=True)])
    matched, labelled = (cosines >= directions.ALIKE)[:, own >= 0], own[own >= 0]
    same = matched & (partners[:, own >= 0] == labelled)
    known = [numbers[numbers >= 0] for numbers in theirs]
    alike = np.stack([(labelled[:, None] == each).sum(axis=1) / max(1, len(each)) for each in known])
    return Recurrence(
        seeds=list(seeds),
        found=[counted.get(latent) for latent in range(len(labels[0]))],
        share=wilson(int((counts == len(seeds)).sum()), len(counts)),
        random=float((chance >= directions.ALIKE).all(axis=0).mean()),
        curve={str(least): (float((cosines >= least).mean()), float((chance >= least).mean())) for least in CURVE},
        labelled=len(labelled),
        same_label=Estimate(
            *shares_by_document(same.sum(axis=0)[None], 0.0 * labelled[None] + len(others))[:, 0].tolist()
        ),
        same_label_chance=float((matched * alike).sum() / max(1, matched.size)),
    )


def mutual(
    rows: Float[torch.Tensor, "n d"], others: Float[torch.Tensor, "m d"]
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return each row's cosine with its nearest of the others, -1 where it is not that one's nearest in turn, and which."""
    there, back = directions.nearest_directions(rows, others), directions.nearest_directions(others, rows)
    nearest = there.nearest.to_numpy()
    return np.where(back.nearest.to_numpy()[nearest] == np.arange(len(rows)), there.cosine, -1.0), nearest


def labels_of(sae: Any, words: Words) -> Int[np.ndarray, " d_sae"]:
    """Return the number of the label that each latent detects best, by F1 at its best threshold; -1 below LABELLED."""
    acts = treebank.encode_words(sae, words.x)
    best = treebank.best_thresholds(acts, words.labels, np.asarray(acts.max(axis=0).todense()).ravel())[0]
    return np.where(best.max(axis=1) >= LABELLED, best.argmax(axis=1), -1)
