"""Tables of a store: how well latents are explained beside the same numbers of the controls; and all of it for others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from sae_italian.autointerp.choose import EXPLAINER, LOOKUP
from sae_italian.autointerp.draws import FUZZING_NEGATIVES, SEGMENT_NEGATIVES
from sae_italian.autointerp.examples import RULE
from sae_italian.autointerp.run import NOTHING_SAID
from sae_italian.autointerp.scorers import SCORERS, falls_name
from sae_italian.autointerp.scorers.binary import GAIN, GROUPS, HEADLINE
from sae_italian.autointerp.scorers.budget import BUDGETS, SOURCE
from sae_italian.autointerp.scorers.simulation import RANDOM, TOP
from sae_italian.autointerp.store import JSON_COLUMNS, NOW, TABLES, Store, json_of
from sae_italian.autointerp.work import SHUFFLED, TITLE, WHOLE, stored_config
from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.hub import WandbRun
from sae_italian.base.labels import label
from sae_italian.base.report import plain, shown, table
from sae_italian.base.statistics import NOTHING, Estimate, correlation, reaches, two_way_mean, wilson
from sae_italian.base.storage import atomic_path, path_of, write_text
from sae_italian.cache.layout import MANIFEST, Manifest

GOOD = 0.8  # balanced accuracy from which a latent counts as detected
ENOUGH = 300  # latents from which a summary may stand for an SAE
COLUMNS = ("detection", "fuzzing", "simulation", "shuffled_detection", "lookup_detection", "gain_over_lookup")
_HEADLINE = {**HEADLINE, "simulation": TOP, "budget": SOURCE}  # scorer -> the negatives behind it where none are named
_LED = ("detection", "fuzzing", "simulation")
_SOURCES = {"detection": SEGMENT_NEGATIVES, "fuzzing": FUZZING_NEGATIVES}


@dataclass(frozen=True)
class AutointerpSummary:
    """One explainer's explanations under one judge. Means are over explained latents, with 95 % intervals over latents and
    documents, NaN in a store that is older than these (`by_document`).

    Numbers named without a negative source are those with random negatives (detection) and with marks on the same token
    where it is silent (fuzzing). Shares of latents are of the `n_scored` whose detection could be scored.
    """

    explainer: str
    judge: str
    n_latents: int
    n_explained: int
    n_scored: int
    n_too_few: int
    n_dead: int
    detection: Estimate
    fuzzing: Estimate
    simulation: Estimate  # correlation, strongest and random segments
    simulation_random: Estimate  # random segments alone
    share_detected: Estimate  # detection balanced accuracy of 0.8 or more
    shuffled_detection: Estimate
    shuffled_fuzzing: Estimate
    shuffled_simulation: Estimate
    lookup_detection: Estimate  # the lookup is a rule and is always judged as one
    lookup_fuzzing: Estimate
    lookup_simulation: Estimate
    lookup_share_detected: Estimate
    whole_detection: Estimate  # of the rules as they were fitted, of which the texts display a part
    by_keys: dict[str, Estimate]  # detection of a text's first 1, 2, 3, 6 and 12 keys
    by_keys_area: Estimate  # the mean of that curve over log2(1 + keys)
    saved_bits: Estimate  # per example, what a text saves over telling the answers without it, its own length paid
    lookup_saved_bits: Estimate
    whole_saved_bits: Estimate
    title_detection: Estimate  # of the titles, 60 characters at most
    gain_over_lookup: Estimate  # mean of the paired differences
    only_token: Estimate  # share that the lookup detects and the explanation explains no better
    always_yes: Estimate
    always_no: Estimate
    by_negatives: dict[str, dict[str, Estimate]]  # scorer -> negatives -> mean balanced accuracy
    gains: dict[str, dict[str, Estimate]]  # scorer -> negatives -> mean gain over the lookup
    by_decile: list[Estimate]  # mean share of positives found, weakest tenth first
    by_document: bool  # whether the store knows how all these scores fall without some of the documents
    enough: bool  # at least 300 latents were drawn at random, or all there are

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        return plain(self)


def _opened(path: str | Path) -> Store:
    """Return a store that is there; an older one gets the tables it lacks."""
    if not (path := path_of(path)).is_file():
        raise UsageError(f"{path} does not exist: run `sae-italian autointerp` on the cache first.")
    return Store(path, {})


def summarise(path: str | Path, *, explainer: str = EXPLAINER, judge: str = RULE) -> AutointerpSummary:
    """Return a store's summary for one explainer and judge (default: rules, rule judge).

    Raises: UsageError without a store, and for an explainer or a judge that it knows nothing of.
    """
    with _opened(path) as store:
        judges = [told for who, told in store.judged() if who == explainer]
        statuses = [explanation.status for explanation in store.explanations(explainer).values()]
        if (known := store.explainers()) and not statuses:
            raise UsageError(f"{path} has no explanations by {explainer!r}. {nearest(explainer, known)}")
        enough = len(statuses) >= ENOUGH or stored_config(store).latents is None
        own, lookup = _Scores(store, explainer, judge), _Scores(store, LOOKUP, RULE)
        always = {f"always_{answer}": _Scores(store, EXPLAINER, f"always-{answer}") for answer in ("yes", "no")}
    if judges and not own.found:
        raise UsageError(f"{path} has no scores of {explainer} by {judge!r}. {nearest(judge, judges)}")
    detected, looked_up = own.values("detection"), lookup.values("detection")
    better = {latent for latent, lo in own.values("detection", "", GAIN, end=1).items() if lo > 0}
    # not told from the lookup where the interval of the gain reaches below 0
    both = [latent for latent in detected if latent in looked_up]
    no_better = [0.0 if latent in better else looked_up[latent] for latent in both]
    return AutointerpSummary(
        explainer=explainer,
        judge=judge,
        n_latents=len(statuses),
        n_explained=statuses.count("ok"),
        n_scored=len(detected),
        n_too_few=statuses.count("too few activations"),
        n_dead=statuses.count("dead"),
        **{name: own.mean(name) for name in _LED},
        simulation_random=own.mean("simulation", RANDOM),
        share_detected=_share(detected.values()),
        **{f"shuffled_{name}": own.mean(name, control=SHUFFLED) for name in _LED},
        **{f"lookup_{name}": lookup.mean(name) for name in _LED},
        lookup_share_detected=_share(looked_up.values()),
        whole_detection=own.mean("detection", control=WHOLE),
        by_keys={str(n): own.mean("budget", "", f"balanced_accuracy_{n}") for n in BUDGETS},
        by_keys_area=own.mean("budget", "", "area"),
        saved_bits=own.mean("budget"),
        lookup_saved_bits=lookup.mean("budget"),
        whole_saved_bits=own.mean("budget", control=WHOLE),
        title_detection=own.mean("detection", control=TITLE),
        gain_over_lookup=own.mean("detection", lookup=lookup),
        only_token=_share(no_better),
        **{name: scores.mean("detection") for name, scores in always.items()},
        by_negatives=own.by_source(),
        gains=own.by_source(lookup),
        by_decile=[own.mean("detection", "", f"tpr_decile_{tenth}") for tenth in range(10)],
        by_document=all(scores.known for scores in (own, lookup, *always.values())),
        enough=enough,
    )


class _Scores:
    """One explainer's scores by one judge, read from the store at once, and their means.

    A score is named by its scorer, negatives and metric, by the headline's where these are left out. `known` says whether
    the store has all that the intervals of the means taken so far rest on.
    """

    def __init__(self, store: Store, explainer: str, judge: str):
        self.found, self.falls, self.known = store.scores(explainer, judge), store.falls(explainer, judge), True

    def values(self, *name: str, control: str = "", end: int = 0) -> dict[int, float]:
        """Return by latent the scores that could be made; with `end` 1 the lower ends of their intervals."""
        found = self.found.get((control, *_whole(*name)), {})
        return {latent: row[end] for latent, row in found.items() if row[end] is not None}

    def without(self, latents: Iterable[int], *name: str, control: str = "") -> Float[np.ndarray, "latents groups"]:
        """Return by how much scores fall without each group of documents, NaN where that is not known."""
        kept = falls_name(*_whole(*name))
        rows = [self.falls.get((control, latent), {}).get(kept) or [None] * GROUPS for latent in latents]
        return np.array(rows, dtype=np.float64).reshape(-1, GROUPS) / 1000

    def mean(self, *name: str, control: str = "", lookup: _Scores | None = None) -> Estimate:
        """Return the mean over latents with its interval over latents and documents, or that of the gain over `lookup`."""
        found = self.values(*((*_whole(*name)[:2], GAIN) if lookup else name), control=control)
        falls = self.without(found, *name, control=control)
        if lookup is not None:
            falls -= lookup.without(found, *name)
        self.known &= bool(np.isfinite(falls).any(axis=1).all())
        return two_way_mean(np.array([*found.values()]), falls)

    def over(self, control: str, *name: str) -> tuple[Estimate, Estimate]:
        """Return the mean of a control's scores and that of the differences from it, over the latents that have both."""
        own, theirs = self.values(*name), self.values(*name, control=control)
        both = [latent for latent in own if latent in theirs]
        mine, others = (np.array([each[latent] for latent in both]) for each in (own, theirs))
        falls, rest = self.without(both, *name), self.without(both, *name, control=control)
        return two_way_mean(others, rest), two_way_mean(mine - others, falls - rest)

    def by_source(self, lookup: _Scores | None = None) -> dict[str, dict[str, Estimate]]:
        """Return the means of detection and fuzzing by the negatives' source, or those of the gain over `lookup`."""
        found: dict[str, dict[str, Estimate]] = {}
        for scorer, sources in _SOURCES.items():
            each = {source: self.mean(scorer, source, lookup=lookup) for source in sources}
            found[scorer] = {source: mean for source, mean in each.items() if mean.value == mean.value}
        return found


def _whole(scorer: str, negatives: str = "", metric: str = "") -> tuple[str, str, str]:
    return scorer, negatives or _HEADLINE[scorer], metric or SCORERS[scorer].metric


def _share(values: Iterable[float]) -> Estimate:
    good = [reaches(value, GOOD) for value in values]
    return wilson(sum(good), len(good))


# --- tables ------------------------------------------------------------------------------------------------------------


def side_by_side(path: Path) -> list[AutointerpSummary]:
    """Return one summary per explainer and judge of a run, in the order they came; controls are within each."""
    with Store(path, {}) as store:
        pairs = [pair for pair in store.judged() if pair[0] != LOOKUP and not pair[0].endswith(NOW)]
    return [summarise(path, explainer=explainer, judge=judge) for explainer, judge in pairs]


def comparison_table(summaries: list[AutointerpSummary], random: Sequence[AutointerpSummary] = ()) -> str:
    """Return the summaries as a Markdown table, those of the randomly initialised SAE last.

    A rule's score and an LLM's are different quantities: compare within a judge only.
    """
    rows = []
    for whose, some in (("", summaries), (", random SAE", random)):
        for one in some:
            figures = (shown(getattr(one, each)) for each in COLUMNS)
            rows.append([one.explainer + whose, one.judge, one.n_scored, *figures])
    return table(" | ".join(["explainer | judge | latents", *(name.replace("_", " ") for name in COLUMNS)]), rows)


def means(path: Path, explainer: str, judges: Sequence[str], twin: Path | None = None) -> list[dict[str, Any]]:
    """Return the mean over latents of each judge's scores, its controls', and by how much it exceeds each control's.

    Beside it the mean of the random twin, where its store is given and there, and the rank correlation over latents with
    detection by the rule judge.
    """
    random = means(twin, explainer, judges) if twin and twin.is_file() else []
    of_twin = {(row["judge"], row["scorer"], row["negatives"]): row for row in random}
    with Store(path, {}) as store:
        detected = _Scores(store, EXPLAINER, RULE).values("detection")
        by_judge = {judge: _Scores(store, explainer, judge) for judge in judges}
    rows, order = [], list(SCORERS)
    for judge, scores in by_judge.items():
        told = {(scorer, negatives) for control, scorer, negatives, _ in scores.found if not control}
        for which in sorted(told, key=lambda each: (order.index(each[0]), each[1])):
            found = scores.values(*which)
            pairs = [(found[latent], detected[latent]) for latent in sorted(found.keys() & detected.keys())]
            ranks = rankdata(pairs or np.empty((0, 2)), axis=0)
            theirs: Any = of_twin.get((judge, *which), plain(NOTHING))
            row: dict[str, Any] = {
                "judge": judge,
                "scorer": which[0],
                "metric": SCORERS[which[0]].metric,
                "negatives": which[1],
                "n": len(found),
                # texts longer than the context, divergences out of reach
                "n_failed": len(scores.found.get(("", *_whole(*which)), ())) - len(found),
                **plain(scores.mean(*which)),
                "rank_with_detection": plain(correlation(*ranks.T)),
                "random_twin": {name: theirs[name] for name in Estimate._fields},
            }
            for control in (SHUFFLED, NOTHING_SAID):
                theirs, over = scores.over(control, *which)
                row |= plain({control: theirs, f"over_{control}": over})
            rows.append(row)
    return rows


def means_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the means as a Markdown table."""

    def cell(numbers: dict[str, Any], form: str) -> str:
        known = (numbers[name] for name in Estimate._fields)
        return shown(Estimate(*(float("nan") if value is None else value for value in known)), form)

    lines = []
    for row in rows:
        beside = (row, row[SHUFFLED], row[NOTHING_SAID], row["random_twin"])
        values = [cell({**each, "lo": None}, ".3f") for each in beside]
        n = f"{row['n']}" + (f" ({row['n_failed']} could not be scored)" if row["n_failed"] else "")
        name = f"{label('scorer.' + row['scorer'])}, {label('metric.' + row['metric'])}"
        over, ranks = cell(row[f"over_{SHUFFLED}"], "+.3f"), cell(row["rank_with_detection"], ".2f")
        lines.append([row["judge"], name, label("negatives." + row["negatives"]), *values, over, ranks, n])
    head = "judge | score | negatives | own | another's, or shuffled | empty | random SAE | over another's"
    return table(f"{head} | rank correlation with detection | latents", lines)


# --- for others --------------------------------------------------------------------------------------------------------


def export(path: Path, out: Path, to: str, *, project: str | None = None) -> list[Path]:
    """Write every table of a store into the folder `out`, `to` parquet, jsonl or wandb; return the files (of wandb the run's folder).

    `wandb` logs one table per table, with the Parquet files as an artifact, beside the run that trained the cache's SAE;
    with WANDB_MODE=offline nothing leaves the machine until `wandb sync`.

    Raises: UsageError when there is no store.
    """
    import pyarrow
    import pyarrow.parquet

    files, tables = [out / f"{name}.{'jsonl' if to == 'jsonl' else 'parquet'}" for name in TABLES], {}
    with _opened(path) as store:
        for name, file in zip(TABLES, files, strict=True):
            cursor = store.connection.execute(f"SELECT * FROM {name}")
            rows = cursor.fetchall()
            cells = {column: [row[i] for row in rows] for i, (column, *_) in enumerate(cursor.description)}
            for key in cells.keys() & JSON_COLUMNS:
                cells[key] = [kept and json_of(kept) for kept in cells[key]]
            tables[name] = pyarrow.table(cells)
            if to == "jsonl":
                write_text(file, "".join(map(_line, tables[name].to_pylist())))
            else:
                with atomic_path(file) as temporary:
                    pyarrow.parquet.write_table(tables[name], temporary)
    if to != "wandb":
        return files
    import wandb

    manifest = path.parent / MANIFEST
    trained = WandbRun.of(Manifest.load(path.parent).sae if manifest.is_file() else path.parent)
    with wandb.init(job_type="autointerp", **trained._replace(project=project or trained.project).joined(out)) as run:
        for name in ("explanation", "score"):
            run.log({name: wandb.Table(dataframe=tables[name].to_pandas())})
        artifact = wandb.Artifact("autointerp", type="autointerp")
        for file in files:
            artifact.add_file(str(file))
        run.log_artifact(artifact)
        return [Path(run.dir).parent]


def _line(row: dict[str, Any]) -> str:
    told = {name: json.loads(row[name]) for name in JSON_COLUMNS if row.get(name)}
    return json.dumps(row | told, ensure_ascii=False) + "\n"
