"""What the results say: of every problem, task and SAE, which SAEs are not distinguishable; and their pages.

Pages are report and leaderboard (Markdown, and one HTML file that needs no network), SAEBench's JSON, tables for W&B.

The headline of a task is selectivity, AUC at k = 16 minus the better of the two form controls, and the gain over the
random twin. The match is the correlation of the best single latent with the answer, above that of the twin's best, as a
share of what is left to 1: it follows a planted truth where AUC does not. Means are over tasks, whose poolings are averaged
first. Tasks are the sample: intervals resample them. The variance of a difference between two SAEs also counts the
documents that tasks share: V = V_tasks + V_documents - V_cells, at least the larger of the first two (Cameron, Gelbach,
Miller 2011). Less than 2.8 times its root, or Student's quantile where four tasks or fewer make that larger, is not distinguishable.
"""

import re
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from sae_italian.base.errors import UsageError
from sae_italian.base.hub import WandbRun
from sae_italian.base.labels import label
from sae_italian.base.report import page, plain, save_result, shown, table
from sae_italian.base.statistics import NOTHING, Estimate, mean_interval
from sae_italian.base.storage import fingerprint, package_versions, read_json, understood, write_json, write_text
from sae_italian.benchmark.run import SETTINGS

POWER = 2.8  # standard errors of a difference found four times in five at the level of 5 %
COLUMNS = ("auc_1", "auc_16", "selectivity", "gain_1", "gain_16", "below_dense", "match")
CONTROLS = ("form", "tokens", "dense", "embedded")
# The columns of a problem.
OWN = ("auc_1", "auc_16", "lo", "hi", "selectivity", "gain_16", *CONTROLS, "permuted", "majority")

EVAL_TYPE = "sae_italian_sparse_probing"  # Italian sets are never averaged with SAEBench's English ones
# A click on a column's head sorts by its first number, the largest first.
SORT = """document.querySelectorAll('th').forEach(h=>{h.setAttribute('role','button');h.onclick=()=>{const t=h.closest('table'),
n=[...h.parentNode.children].indexOf(h),v=r=>{const x=parseFloat(r.children[n].textContent);return isNaN(x)?-9:x};
[...t.tBodies[0].rows].sort((a,b)=>v(b)-v(a)).forEach(r=>t.tBodies[0].append(r))}})"""


def means(own: Mapping[str, Any], what: str) -> dict[str, float]:
    """Return by k the mean over the seeds of an SAE's `auc`, or its `twin`'s, from its file of a problem."""
    return {k: float(np.mean(values)) for k, values in own[what].items()}


def numbers(control: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of the tables, by column, from a problem's file of controls and an SAE's own."""
    auc, found = means(own, "auc"), {name: control[name]["auc"] for name in CONTROLS}
    ours, theirs = np.mean(own.get("match", [[np.nan, np.nan]]), axis=0)  # older results have none
    lo, hi = np.array(own["interval"]["16"], dtype=float)  # NaN for None
    found |= {f"auc_{k}": value for k, value in auc.items()}
    found |= {f"gain_{k}": auc[k] - value for k, value in means(own, "twin").items()}
    return found | {
        "lo": lo,
        "hi": hi,
        "majority": control["majority"],
        "selectivity": auc["16"] - max(found["form"], found["tokens"]),
        "below_dense": auc["16"] - found["dense"],
        "permuted": max(own["permuted"]),
        "match": float((ours - theirs) / (1 - theirs)),
    }


@dataclass(frozen=True)
class Entry:
    """One SAE: where it was scored, and a DataFrame of its problems by name.

    Its columns: the numbers of the tables; the id of the task, its names, family, and whether it is `marked` (form gives
    the answer); what the files `own` and `control` hold, with lists over the protocol's seeds.
    """

    name: str
    facts: dict[str, Any]
    problems: Any

    def tasks(self, family: str = "") -> Any:
        """Return the problems of a family, or of all where form is not the answer."""
        return self.problems[self.problems.family == family if family else ~self.problems.marked]

    def by_task(self, column: str, family: str = "") -> Any:
        """Return a number by task, the mean over its poolings, as a Series."""
        return self.tasks(family).groupby("task", sort=False)[column].mean()

    def estimate(self, column: str, family: str = "") -> Estimate:
        """Return the mean over tasks with its interval over tasks."""
        return mean_interval(self.by_task(column, family).to_numpy())

    @cached_property
    def reseed(self) -> float:
        """The sd of the mean AUC at k = 16 over the protocol's seeds."""
        some = self.tasks()
        seeds: Any = pd.DataFrame([own["auc"]["16"] for own in some.own], index=some.task)
        return float(seeds.groupby(level=0).mean().mean().std())

    def influence(self) -> Any:
        """Return the influence on the mean AUC at k = 16, a DataFrame [tasks, documents]."""
        some = self.tasks()
        share = 1 / some.groupby("task").task.transform("size") / some.task.nunique()
        parts = pd.DataFrame([own["influence"]["16"] for own in some.own], index=some.task)
        return parts.mul(share.to_numpy(), axis=0).groupby(level=0).sum()


class Difference(NamedTuple):
    """How two SAEs differ in mean AUC at k = 16 on the same examples; a test at 5 % finds a true `least` four times in five.

    Measured beyond it is told apart: SAEs that truly differ by `least` half of the time, equal ones in 1.5 % (of twelve tasks).
    """

    value: float
    least: float

    @property
    def distinguishable(self) -> bool:
        """Whether the difference is beyond what could be told apart."""
        return abs(self.value) > self.least


def compare(a: Entry, b: Entry) -> Difference:
    """Return the difference a - b over the tasks that both have, judged by its two-way standard error."""
    differences = (a.by_task("auc_16") - b.by_task("auc_16")).dropna()
    if len(differences) < 2:
        return Difference(float("nan"), float("nan"))
    cells = a.influence().sub(b.influence(), fill_value=0.0)
    over_tasks = differences.var() / len(differences)
    over_documents, alone = (cells.sum() ** 2).sum(), (cells**2).sum().sum()
    seeds = (a.reseed**2 + b.reseed**2) / len(a.problems.own.iloc[0]["auc"]["16"])
    variance = max(over_tasks + over_documents - alone, over_tasks, over_documents) + np.nan_to_num(seeds)
    times = max(POWER, stdtrit(len(differences) - 1.0, 0.975))
    return Difference(float(differences.mean()), float(times * np.sqrt(variance)))


def ranks(entries: Sequence[Entry]) -> list[int]:
    """Return ranks of entries from best to worst; one that is not distinguishable from the first of a rank shares it."""
    found: list[int] = []
    first = 0
    for i, entry in enumerate(entries):
        if not i or compare(entries[first], entry).distinguishable:
            first = i
        found.append(first + 1)
    return found


def training_noise(entries: Iterable[Entry]) -> dict[str, tuple[float, int]]:
    """Return the sd of the mean AUC at k = 16 over trainings that differ in their seed alone: NAME, NAME-seed1, ..."""
    values: Any = pd.Series({entry.name: entry.estimate("auc_16").value for entry in entries})
    names = [re.sub(r"[-_./ ]seed[-_=]?\d+$", "", name) for name in values.index]
    groups = values.groupby(names, sort=False)
    return {name: (float(some.std()), len(some)) for name, some in groups if len(some) > 1}


def read_entries(folder: str | Path) -> list[Entry]:
    """Return the SAEs of a benchmark's folder, or of all that lie below one, best first.

    Raises: UsageError when there is none.
    """
    files = [*(folder := Path(folder).expanduser()).glob(SETTINGS)] or sorted(folder.glob(f"*/{SETTINGS}"))
    with understood(f"a result in {folder}", "Run that benchmark again with --overwrite.", OSError):
        entries = [entry for file in files for entry in _entries(file.parent, read_json(file))]
        if not entries:
            raise UsageError(f"{folder} holds no results. Run `sae-italian benchmark SAE --out {folder}`.")
        return sorted(entries, key=lambda entry: [-entry.estimate(column).value for column in ("auc_16", *COLUMNS)])


def _entries(folder: Path, value: Mapping[str, Any]) -> Iterator[Entry]:
    settings = {key: value[key] for key in ("model", "tasks", "seeds", "sources", "most")}
    for name, facts in value["saes"].items():
        rows = {}
        for problem, told in value["hooks"][facts["hook"]]["problems"].items():
            places = (folder / facts["hook"] / place for place in ("controls", facts["folder"]))
            control, own = (place / f"results.{problem}.json" for place in places)
            if own.is_file():
                files = {"control": read_json(control), "own": read_json(own)}
                task = value["tasks"][told["task"]]
                rows[problem] = {**task, "task": told["task"], "marked": task["form"], **numbers(**files), **files}
        if rows:
            yield Entry(name, {**facts, **settings}, pd.DataFrame.from_dict(rows, orient="index"))


# --- pages ----------------------------------------------------------------------------------------------------------------


class Board(NamedTuple):
    """A titled table, and sentences under it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """Return the table with its title and notes."""
        return "\n\n".join([f"## {self.title}", table(" | ".join(self.head), self.rows), *self.notes])


def both(key: str, **values: Any) -> str:
    """Return a label in English and Italian, filled in."""
    english, italian = (label(f"benchmark.{key}", language).format(**values) for language in ("en", "it"))
    return english if english == italian else f"{english} · {italian}"


def _board(title: str, columns: Sequence[str], rows: list[list[str]], notes: Iterable[str]) -> Board:
    """Return a table under its columns' English names; the Italian ones are told below it."""
    names = {lang: [label(f"benchmark.{column}", lang) for column in columns] for lang in ("en", "it")}
    return Board(title, names["en"], rows, [*notes, f"Colonne: {'; '.join(names['it'])}."])


def headline(entries: Sequence[Entry]) -> Board:
    """Return the SAEs that were scored on the same examples, best first, those not distinguishable at one rank."""
    rows = []
    for rank, entry in zip(ranks(entries), entries, strict=True):
        numbers = [shown(entry.estimate(column), ".3f") for column in COLUMNS]
        reseed = shown(NOTHING._replace(value=entry.reseed), ".4f")
        rest = reseed, str(len(entry.by_task("auc_16"))), ", ".join(entry.facts["seen"]) or "-"
        rows.append([str(rank), entry.name, *numbers, *rest])
    names = ("rank", "sae", *COLUMNS, "reseed", "tasks", "seen")
    return _board(both("headline"), names, rows, _foot(entries))


def _foot(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield what stands at the foot of a table: what differences could be told apart, and what noise there is."""
    for above, below in zip(entries, entries[1:], strict=False):
        if not np.isnan((found := compare(above, below)).value):  # one task says nothing of a difference
            what = "distinguishable" if found.distinguishable else "not_distinguishable"
            yield both(what, a=above.name, b=below.name, **found._asdict())
    for name, (sd, n) in training_noise(entries).items():
        yield both("training_noise", name=name, sd=sd, n=n)
    yield both("legend")


def families(entries: Sequence[Entry]) -> Board:
    """Return the mean AUC at k = 16 and the selectivity by family of tasks."""
    names, rows = pd.concat([entry.problems.family for entry in entries]).unique(), []
    for entry in entries:
        found = ([entry.estimate(c, family).value for c in ("auc_16", "selectivity")] for family in names)
        rows.append([entry.name, *("-" if auc != auc else f"{auc:.3f} ({less:+.3f})" for auc, less in found)])
    return Board(both("families"), ["SAE", *names], rows, [])


def problems(entry: Entry) -> Board:
    """Return every problem of one SAE with all its controls beside it."""
    rows = []
    for name, row in entry.problems.iterrows():
        marked = f"{row.en} · {row.it}" + (" *" if row.control["exploratory"] else "")
        numbers = (shown(NOTHING._replace(value=row[column]), ".3f") for column in OWN)
        rows.append([str(name), marked, *numbers, str(row.control["n_test"])])
    every = ("problem", "task", *OWN, "n_test")
    return _board(f"{entry.name}: {both('problems')}", every, rows, [both("exploratory")])


def write(folder: Path, entries: Sequence[Entry], told: Mapping[str, Any]) -> Board:
    """Write benchmark.json, .md, .html, and SAEBench's JSON of every SAE; return the headline."""
    first, notes = headline(entries), list(_notes(told))
    boards = [first._replace(notes=[*first.notes, *notes]), families(entries), *map(problems, entries)]
    _pages(folder / "benchmark", both("title"), boards)
    rows = [
        {c: entry.estimate(c) for c in COLUMNS}
        | {key: entry.facts[key] for key in ("architecture", "d_sae", "hook", "model", "seen")}
        | {"sae": entry.name, "reseed": entry.reseed, "tasks": len(entry.by_task("auc_16"))}
        for entry in entries
    ]
    save_result(folder, "benchmark", {"saes": rows, "notes": notes, "refused": told["refused"]})
    for entry in entries:
        name = re.sub("[/:]", "_", entry.name if ":" in entry.name else f"custom_{entry.name}")
        write_json(folder / "saebench" / f"results.{name}_eval_results.json", saebench(entry))
    return boards[0]


def _notes(told: Mapping[str, Any]) -> Iterator[str]:
    for hook, size in told["hooks"].items():
        yield both("size", hook=hook, **size)
    if told["n_copies"]:
        yield both("copies", n=told["n_copies"])
    beyond = (why for size in told["hooks"].values() for why in size["refused"])
    if refused := dict.fromkeys([*told["refused"], *beyond]):
        yield both("refused", tasks="; ".join(refused))


def leaderboard(folder: str | Path) -> list[Board]:
    """Write leaderboard.md and leaderboard.html over all results below a folder; return its tables.

    SAEs that were scored on other examples, which depend on all the tasks of a run, stand in a table of their own.
    Raises: UsageError when there is no result.
    """

    def examples(entry: Entry) -> str:
        same = [sorted(entry.facts["tasks"]), *(entry.facts[key] for key in ("sources", "most", "seeds"))]
        return f"{entry.facts['model']}, {fingerprint(same)[:6]}"

    entries = sorted(read_entries(folder), key=examples)  # stable: best first within
    grouped = ((name, headline(list(some))) for name, some in groupby(entries, examples))
    boards = [board._replace(title=f"{board.title}: {name}") for name, board in grouped]
    _pages(Path(folder).expanduser() / "leaderboard", both("title"), boards)
    return boards


def _pages(stem: Path, title: str, boards: Sequence[Board]) -> None:
    parts = [f"# {title}", *(board.markdown() for board in boards)]
    write_text(stem.with_suffix(".md"), "\n\n".join(parts) + "\n")
    write_text(stem.with_suffix(".html"), page(title, parts, script=SORT))


def send_to_wandb(entries: Sequence[Entry], project: str, folder: Path) -> str:
    """Log the headline and every problem as W&B tables, offline without a login; return where they are."""
    import wandb

    numbers = list(COLUMNS)
    means = pd.DataFrame([[entry.name, *(entry.estimate(column).value for column in numbers)] for entry in entries])
    every = pd.concat(
        {entry.name: entry.problems[numbers] for entry in entries}, names=["sae", "problem"]
    ).reset_index()
    mode = None if wandb.login(prompt=False, verify=False) else "offline"  # None: as WANDB_MODE says
    how: Any = {"mode": mode, "settings": wandb.Settings(console="off", silent=True)}
    with wandb.init(job_type="benchmark", **how, **WandbRun(project=project).joined(folder)) as run:
        for name, found in {"saes": means.set_axis(["sae", *numbers], axis=1), "problems": every}.items():
            run.log({f"benchmark/{name}": wandb.Table(dataframe=found)})
    if run.offline:
        sys.stderr.write(f"W&B holds this offline; send it with: wandb sync {folder}/wandb/offline-*\n")
    return f"W&B project {project}"


# --- SAEBench ---------------------------------------------------------------------------------------------------------


def saebench(entry: Entry) -> dict[str, Any]:
    """Return the results as SAEBench's JSON of `sparse_probing_sae_probes`, under a type of our own.

    Sets bear the prefix `it_`. Intervals, seeds and controls are in `eval_result_unstructured`.
    """
    details = [_detail(str(problem), row) for problem, row in entry.problems.iterrows()]
    numbers = pd.DataFrame(details).mean(numeric_only=True).to_dict()
    llm = {key: numbers.pop(key) for key in [*numbers] if str(key).startswith("llm")}
    found = [detail["sae_metrics_by_k"] for detail in details]
    by_k = {k: pd.DataFrame([one[k] for one in found]).mean().to_dict() for k in found[0]}
    (train, test), names = entry.facts["most"], [detail["dataset_name"] for detail in details]
    config = {
        **{"random_seed": 0, "dataset_names": names, "k_values": [int(k) for k in by_k]},
        **{"probe_train_set_size": train, "probe_test_set_size": test, "model_name": entry.facts["model"] or ""},
    }
    beside = {
        "headline": {column: plain(entry.estimate(column)) for column in COLUMNS},
        "problems": {problem: _beside(row) for problem, row in entry.problems.iterrows()},
    }
    release, _, sae_id = entry.name.rpartition(":")
    return {
        "eval_type_id": EVAL_TYPE,
        "eval_config": config,
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": {"llm": llm, "sae": numbers},
        "eval_result_details": details,
        "sae_metrics_by_k": by_k,
        "sae_bench_commit_hash": f"sae-italian {package_versions()['sae-italian']}",
        "sae_lens_id": sae_id,
        "sae_lens_release_id": release or "custom",
        "sae_lens_version": package_versions()["sae-lens"],
        "sae_cfg_dict": entry.facts["config"],
        "eval_result_unstructured": beside,
    }


def _detail(problem: str, row: Any) -> dict[str, Any]:
    metrics = {"accuracy": row.own["accuracy"], "auc": means(row.own, "auc"), "f1": row.own["f1"]}
    by_k = {k: {f"test_{name}": of[k] for name, of in metrics.items()} for k in metrics["auc"]}
    found = {"dataset_name": f"it_{problem}", **{f"llm_test_{name}": row.control["dense"][name] for name in metrics}}
    for k in (k for k in by_k if k in ("1", "2", "5")):  # SAEBench has no field for k = 16
        found |= {f"sae_top_{k}_{name}": value for name, value in by_k[k].items()}
    return found | {"sae_metrics_by_k": by_k}


def _beside(row: Any) -> dict[str, Any]:
    return {
        "seeds": row.own["auc"],
        "twin": means(row.own, "twin"),
        "permuted": {"mean": float(np.mean(row.own["permuted"])), "most": row.permuted},
        "interval_16": row.own["interval"]["16"],
        "controls": {key: value["auc"] for key, value in row.control.items() if isinstance(value, dict)},
        "n_test": row.control["n_test"],
        "majority": row.control["majority"],
    }
