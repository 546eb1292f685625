"""What the results say in numbers: of every problem, task and SAE, and which SAEs are not distinguishable.

The headline of a task is selectivity, AUC at k = 16 minus the better of the two form controls, and the gain over the
random twin. The match is the correlation of the best single latent with the answer, above that of the twin's best, as a
share of what is left to 1: it follows a planted truth where AUC does not. Means are over tasks, whose poolings are averaged
first. Tasks are the sample: intervals resample them. The variance of a difference between two SAEs also counts the
documents that tasks share: V = V_tasks + V_documents - V_cells, at least the larger of the first two (Cameron, Gelbach,
Miller 2011). Less than 2.8 times its root is not distinguishable.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import Estimate, mean_interval
from sae_italian.base.storage import read_json, understood
from sae_italian.benchmark.run import SETTINGS

POWER = 2.8  # standard errors of a difference found four times in five at the level of 5 %
COLUMNS = ("auc_1", "auc_16", "selectivity", "gain_1", "gain_16", "below_dense", "match")
CONTROLS = ("form", "tokens", "dense", "embedded")
# The columns of a problem.
OWN = ("auc_1", "auc_16", "lo", "hi", "selectivity", "gain_16", *CONTROLS, "permuted", "majority")


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
        "permuted": float(np.quantile(own["permuted"], 0.95)),
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
        asked = self.problems.family == family if family else ~self.problems.marked
        return self.problems[asked]

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
    """How two SAEs differ in mean AUC at k = 16 on the same examples; `least` could be told apart four times in five."""

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
    return Difference(float(differences.mean()), POWER * float(np.sqrt(variance)))


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
    groups = values.groupby([re.sub(r"[-_./ ]seed[-_=]?\d+$", "", name) for name in values.index], sort=False)
    return {name: (float(some.std()), len(some)) for name, some in groups if len(some) > 1}


def read_entries(folder: str | Path) -> list[Entry]:
    """Return the SAEs of a benchmark's folder, or of all that lie below one, best first.

    Raises: UsageError when there is none.
    """
    files = [*Path(folder).glob(SETTINGS)] or sorted(Path(folder).glob(f"*/{SETTINGS}"))
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
