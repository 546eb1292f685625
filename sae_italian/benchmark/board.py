"""What the results say in numbers: of every problem, task and SAE, and which SAEs are not distinguishable.

The headline of a task is selectivity, AUC at k = 16 minus the better of the two form controls, and the gain over the
random twin. The match is the correlation of the best single latent with the answer, above that of the twin's best, as a
share of what is left to 1: it follows a planted truth where AUC does not. Means are over tasks, whose poolings are averaged
first. Tasks are the sample: intervals resample them. The variance of a difference between two SAEs also counts the
documents that tasks share: V = V_tasks + V_documents - V_cells, at least the larger of the first two (Cameron, Gelbach,
Miller 2011). Less than 2.8 times its root is not distinguishable.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import Estimate, mean_interval
from sae_italian.base.storage import read_json, understood
from sae_italian.benchmark.run import SETTINGS

POWER = 2.8  # standard errors of a difference found four times in five at the level of 5 %
COLUMNS = ("auc_1", "auc_16", "selectivity", "gain_1", "gain_16", "below_dense", "match")
CONTROLS = ("form", "tokens", "dense", "embedded")
# The columns of a problem.
OWN = ("auc_1", "auc_16", "lo", "hi", "selectivity", "gain_16", *CONTROLS, "permuted", "majority")


@dataclass(frozen=True)
class ProblemScore:
    """One problem of one SAE: what its files hold of the controls and of its own, lists over the protocol's seeds."""

    control: dict[str, Any]
    own: dict[str, Any]
    task: dict[str, Any]  # its id, names, family, whether form gives the answer

    def means(self, what: str) -> dict[str, float]:
        """Return by k the mean over the seeds of the SAE's `auc`, or its `twin`'s."""
        return {k: float(np.mean(values)) for k, values in self.own[what].items()}

    @cached_property
    def numbers(self) -> dict[str, float]:
        """The numbers of the tables, by column."""
        auc, twin = self.means("auc"), self.means("twin")
        ours, theirs = np.mean(self.own.get("match", [[np.nan, np.nan]]), axis=0)  # older results have none
        lo, hi = np.array(self.own["interval"]["16"], dtype=float)  # NaN for None
        found = {"lo": lo, "hi": hi, "majority": self.control["majority"]}
        found |= {name: self.control[name]["auc"] for name in CONTROLS}
        found |= {f"auc_{k}": value for k, value in auc.items()}
        found |= {f"gain_{k}": auc[k] - value for k, value in twin.items()}
        found["selectivity"] = auc["16"] - max(found["form"], found["tokens"])
        found["below_dense"] = auc["16"] - found["dense"]
        found["permuted"] = float(np.quantile(self.own["permuted"], 0.95))
        found["match"] = float((ours - theirs) / (1 - theirs))
        return found


@dataclass(frozen=True)
class Entry:
    """One SAE: where it was scored, and its scores by problem."""

    name: str
    facts: dict[str, Any]
    scores: dict[str, ProblemScore]

    def tasks(self, family: str = "") -> dict[str, list[ProblemScore]]:
        """Return by task its problems: of a family, or of all where form is not the answer."""
        found: dict[str, list[ProblemScore]] = {}
        for score in self.scores.values():
            if score.task["family"] == family if family else not score.task["form"]:
                found.setdefault(score.task["id"], []).append(score)
        return found

    def by_task(self, column: str, family: str = "") -> dict[str, float]:
        """Return a number by task, the mean over its poolings."""
        tasks = self.tasks(family).items()
        return {task: float(np.mean([score.numbers[column] for score in some])) for task, some in tasks}

    def estimate(self, column: str, family: str = "") -> Estimate:
        """Return the mean over tasks with its interval over tasks."""
        return mean_interval(np.array([*self.by_task(column, family).values()]))

    @cached_property
    def reseed(self) -> float:
        """The sd of the mean AUC at k = 16 over the protocol's seeds."""
        by_task = [np.mean([each.own["auc"]["16"] for each in some], axis=0) for some in self.tasks().values()]
        means = np.mean(by_task, axis=0)
        return float(np.std(means, ddof=1)) if np.size(means) > 1 else float("nan")

    def influence(self) -> Counter[tuple[str, str]]:
        """Return by (document, task) the influence on the mean AUC at k = 16."""
        total: Any = Counter()
        tasks = self.tasks()
        for task, some in tasks.items():
            for document, part in (pair for score in some for pair in score.own["influence"]["16"].items()):
                total[document, task] += part / len(some) / len(tasks)
        return total


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
    one, other = a.by_task("auc_16"), b.by_task("auc_16")
    shared = sorted(one.keys() & other.keys())
    if len(shared) < 2:
        return Difference(float("nan"), float("nan"))
    differences = np.array([one[task] - other[task] for task in shared])
    cells, documents = a.influence(), Counter()
    cells.subtract(b.influence())
    for (document, _), part in cells.items():
        documents[document] += part
    over_tasks = float(differences.var(ddof=1)) / len(shared)
    over_documents, alone = (float(np.square([*some.values()]).sum()) for some in (documents, cells))
    seeds = (a.reseed**2 + b.reseed**2) / len(next(iter(a.scores.values())).own["auc"]["16"])
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
    groups: dict[str, dict[str, float]] = {}
    for entry in entries:
        name = re.sub(r"[-_./ ]seed[-_=]?\d+$", "", entry.name)
        groups.setdefault(name, {})[entry.name] = entry.estimate("auc_16").value
    found = {name: list(values.values()) for name, values in groups.items() if len(values) > 1}
    return {name: (float(np.std(values, ddof=1)), len(values)) for name, values in found.items()}


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


def _entries(folder: Path, value: Mapping[str, Any]) -> Iterable[Entry]:
    settings = {key: value[key] for key in ("model", "tasks", "seeds", "sources", "most")}
    for name, facts in value["saes"].items():
        scores = {}
        for problem, told in value["hooks"][facts["hook"]]["problems"].items():
            places = (folder / facts["hook"] / name for name in (facts["folder"], "controls"))
            own, control = (place / f"results.{problem}.json" for place in places)
            if own.is_file():
                task = {"id": told["task"], **value["tasks"][told["task"]]}
                scores[problem] = ProblemScore(read_json(control), read_json(own), task)
        if scores:
            yield Entry(name, {**facts, **settings}, scores)
