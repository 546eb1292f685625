"""Tables of a store: how well latents are explained beside the same numbers of the controls; and all of it for others."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from sae_italian.autointerp.choose import EXPLAINER, LOOKUP
from sae_italian.autointerp.database import json_of
from sae_italian.autointerp.draws import FUZZING_NEGATIVES, SEGMENT_NEGATIVES
from sae_italian.autointerp.examples import RULE
from sae_italian.autointerp.run import NOTHING_SAID
from sae_italian.autointerp.scorers import SCORERS, falls_name
from sae_italian.autointerp.scorers.binary import GAIN, GROUPS, HEADLINE
from sae_italian.autointerp.scorers.budget import BUDGETS, SOURCE
from sae_italian.autointerp.scorers.simulation import RANDOM, TOP
from sae_italian.autointerp.store import NOW, TABLES, Store
from sae_italian.autointerp.work import SHUFFLED, TITLE, WHOLE, stored_config
from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.hub import WandbRun
from sae_italian.base.labels import label
from sae_italian.base.report import plain, shown, table
from sae_italian.base.statistics import NOTHING, Estimate, correlation, reaches, two_way_mean, wilson
from sae_italian.base.storage import atomic_path, write_text
from sae_italian.cache.layout import MANIFEST, Manifest

GOOD = 0.8  # balanced accuracy from which a latent counts as detected
ENOUGH = 300  # latents from which a summary may stand for an SAE
FORMATS = ("parquet", "jsonl", "wandb")  # of an export
COLUMNS = ("detection", "fuzzing", "simulation", "shuffled_detection", "lookup_detection", "gain_over_lookup")
_HEADLINE = {**HEADLINE, "simulation": TOP}
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


def summarise(path: Path, *, explainer: str = EXPLAINER, judge: str = RULE) -> AutointerpSummary:
    """Return the summary of a store for one explainer and judge, the rules and the rule judge by default."""
    with Store(path, {}) as store:
        statuses = [explanation.status for _, explanation in store.explanations(explainer).values()]

        scores, lookup = _Scores(store, explainer, judge), dict[str, Any](explainer=LOOKUP, judge=RULE)
        values, mean = scores.values, scores.mean
        means = {name: mean(name) for name in _HEADLINE}
        means |= {f"shuffled_{name}": mean(name, control=SHUFFLED) for name in _HEADLINE}
        means |= {f"lookup_{name}": mean(name, **lookup) for name in _HEADLINE}
        means["whole_detection"] = mean("detection", control=WHOLE)
        means["by_keys_area"] = mean("budget", SOURCE, "area")
        for name, others in {"": {}, "lookup_": lookup, "whole_": {"control": WHOLE}}.items():
            means[f"{name}saved_bits"] = mean("budget", SOURCE, **others)
        means["title_detection"] = mean("detection", control=TITLE)
        for answer in ("yes", "no"):
            means[f"always_{answer}"] = mean("detection", explainer=EXPLAINER, judge=f"always-{answer}")
        detected, looked_up = values("detection"), values("detection", **lookup)
        both = {latent: looked_up[latent] for latent in detected if latent in looked_up}
        gains = values("detection", metric=GAIN, column="lo")
        better = {latent for latent, low in gains.items() if low > 0}  # the interval of the gain is above 0
        return AutointerpSummary(
            explainer=explainer,
            judge=judge,
            n_latents=len(statuses),
            n_explained=statuses.count("ok"),
            n_scored=len(detected),
            n_too_few=statuses.count("too few activations"),
            n_dead=statuses.count("dead"),
            **means,
            simulation_random=mean("simulation", RANDOM),
            share_detected=_share(list(detected.values())),
            lookup_share_detected=_share(list(looked_up.values())),
            gain_over_lookup=mean("detection", gain=True),
            only_token=_share([0.0 if latent in better else value for latent, value in both.items()]),
            by_keys={str(n): mean("budget", SOURCE, f"balanced_accuracy_{n}") for n in BUDGETS},
            by_negatives=scores.by_source(),
            gains=scores.by_source(gain=True),
            by_decile=[mean("detection", metric=f"tpr_decile_{tenth}") for tenth in range(10)],
            by_document=scores.known,
            enough=len(statuses) >= ENOUGH or stored_config(store).latents is None,
        )


class _Scores:
    """The scores in a store by latent, of one explainer and judge where nothing else is said, and their means."""

    def __init__(self, store: Store, explainer: str, judge: str):
        self.store, self.falls, self.known = store, cache(store.falls), True
        self.who: dict[str, Any] = {"explainer": explainer, "judge": judge, "control": ""}

    def values(self, scorer: str, negatives: str = "", metric: str = "", **where: Any) -> dict[int, float]:
        negatives, metric = negatives or _HEADLINE[scorer], metric or SCORERS[scorer].metric
        return self.store.values(scorer=scorer, negatives=negatives, metric=metric, **self.who | where)

    def mean(self, scorer: str, negatives: str = "", metric: str = "", *, gain: bool = False, **where: Any) -> Estimate:
        """Return the mean over latents with its interval over latents and documents, none where the store lacks these."""
        negatives = negatives or _HEADLINE[scorer]
        found = self.values(scorer, negatives, GAIN if gain else metric, **where)
        name = falls_name(scorer, negatives, metric or SCORERS[scorer].metric)
        rows = self._rows(found, name, **self.who | where) - (
            self._rows(found, name, LOOKUP, RULE, "") if gain else 0.0
        )
        self.known &= bool(np.isfinite(rows).any(axis=1).all())
        return two_way_mean(np.array([*found.values()]), rows)

    def _rows(self, latents: Iterable[int], name: str, *who: str, **where: str) -> Float[np.ndarray, "latents groups"]:
        """Return by how much scores fall without each group of documents, NaN where that is not known."""
        falls = self.falls(*who, **where)
        rows = [falls.get(latent, {}).get(name) or [None] * GROUPS for latent in latents]
        return np.array(rows, dtype=np.float64).reshape(-1, GROUPS) / 1000

    def over(self, control: str, scorer: str, negatives: str) -> tuple[Estimate, Estimate]:
        """Return the mean of a control's scores and that of the differences from it, over the latents that have both."""
        own, theirs = (self.values(scorer, negatives, **where) for where in ({}, {"control": control}))
        both, name = (
            [latent for latent in own if latent in theirs],
            falls_name(scorer, negatives, SCORERS[scorer].metric),
        )
        mine, others = (np.array([each[latent] for latent in both]) for each in (own, theirs))
        rows, rest = (self._rows(both, name, **self.who | where) for where in ({}, {"control": control}))
        return two_way_mean(others, rest), two_way_mean(mine - others, rows - rest)

    def by_source(self, gain: bool = False) -> dict[str, dict[str, Estimate]]:
        """Return the means of detection and fuzzing by the negatives' source."""
        each = {scorer: {name: self.mean(scorer, name, gain=gain) for name in own} for scorer, own in _SOURCES.items()}
        return {scorer: {k: v for k, v in own.items() if v.value == v.value} for scorer, own in each.items()}


def _share(values: Sequence[float]) -> Estimate:
    return wilson(sum(reaches(value, GOOD) for value in values), len(values))


# --- tables ------------------------------------------------------------------------------------------------------------


def side_by_side(path: Path) -> list[AutointerpSummary]:
    """Return one summary per explainer and judge of a run, in the order they came; controls are within each.

    Of those who judge examples one by one: an encoder and the subject model only rank them.
    """
    with Store(path, {}) as store:
        pairs = store.connection.execute(
            """SELECT explainer, judge FROM score JOIN explanation ON explanation.id = score.explanation_id
               WHERE control = '' AND judge NOT LIKE 'always-%' AND explainer != ? AND scorer = 'detection'
                 AND explainer NOT LIKE ?
               GROUP BY explainer, judge ORDER BY min(explanation_id), judge != ?, judge""",
            (LOOKUP, "%" + NOW, RULE),
        ).fetchall()
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
    rows, named = [], ("judge", "scorer", "negatives")
    random = means(twin, explainer, judges) if twin and twin.is_file() else []
    of_twin = {tuple(row[key] for key in named): {key: row[key] for key in Estimate._fields} for row in random}
    with Store(path, {}) as store:
        detected = _Scores(store, EXPLAINER, RULE).values("detection")
        asked = store.connection.execute(
            """SELECT judge, scorer, negatives FROM score JOIN explanation ON explanation.id = score.explanation_id
               WHERE control = '' AND explainer = ? GROUP BY judge, scorer, negatives""",
            (explainer,),
        ).fetchall()
        known, order = [row for row in asked if row[0] in judges], list(SCORERS)
        for judge, scorer, negatives in sorted(known, key=lambda row: (judges.index(row[0]), order.index(row[1]))):
            where = {"judge": judge, "scorer": scorer, "metric": SCORERS[scorer].metric, "negatives": negatives}
            scores = _Scores(store, explainer, judge)
            every = scores.values(scorer, negatives, failed=True)
            n = sum(value is not None for value in every.values())
            # what failed: texts longer than the context, divergences out of reach
            row = {**where, "n": n, "n_failed": len(every) - n, **scores.mean(scorer, negatives).as_dict()}
            pairs = [(every[latent], detected[latent]) for latent in sorted(every.keys() & detected.keys())]
            ranks = rankdata([pair for pair in pairs if pair[0] is not None] or np.empty((0, 2)), axis=0)
            row["rank_with_detection"] = correlation(*ranks.T).as_dict()
            row["random_twin"] = of_twin.get((judge, scorer, negatives), NOTHING.as_dict())
            for control in (SHUFFLED, NOTHING_SAID):
                theirs, over = scores.over(control, scorer, negatives)
                row |= {control: theirs.as_dict(), f"over_{control}": over.as_dict()}
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
    """Write every table of a store into the folder `out`; return the files (for `wandb` the run's folder).

    `wandb` logs one table per table, with the Parquet files as an artifact, beside the run that trained the cache's SAE;
    with WANDB_MODE=offline nothing leaves the machine until `wandb sync`.

    Raises: UsageError for an unknown format or when there is no store.
    """
    import pyarrow
    import pyarrow.parquet

    if to not in FORMATS:
        raise UsageError(f"{to!r} is no format for an export. {nearest(to, FORMATS)}")
    if not path.is_file():
        raise UsageError(f"{path} does not exist: run `sae-italian autointerp` on the cache first.")
    files, tables = [], {}
    with Store(path, {}) as store:
        for name, table in TABLES.items():
            cursor = store.connection.execute(f"SELECT * FROM {name}")
            names, columns = [column[0] for column in cursor.description], zip(*cursor.fetchall(), strict=True)
            cells = dict(zip(names, list(columns) or [()] * len(names), strict=True))
            cells |= {key: [kept and json_of(kept) for kept in cells[key]] for key in table.json_columns}
            tables[name] = pyarrow.table(cells)
            files.append(out / f"{name}.{'jsonl' if to == 'jsonl' else 'parquet'}")
            if to == "jsonl":
                rows = tables[name].to_pylist()
                for row in rows:
                    row |= {key: row[key] and json.loads(row[key]) for key in table.json_columns}
                write_text(files[-1], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            else:
                with atomic_path(files[-1]) as temporary:
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
