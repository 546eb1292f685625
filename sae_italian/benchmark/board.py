"""What the results say: a row for every SAE, what is not distinguishable, by family; and SAEBench's JSON of it.

The headline of a task is selectivity, AUC at k = 16 minus the better of the two form controls, and the gain over the
random twin. The match is the correlation of the best single latent with the answer, above that of the twin's best, as a
share of what is left to 1: it follows a planted truth where AUC does not. Means are over tasks, whose poolings are averaged
first. Tasks are the sample: intervals resample them. The variance of a difference between two SAEs also counts the
documents that tasks share: V = V_tasks + V_documents - V_cells, at least the larger of the first two (Cameron, Gelbach,
Miller 2011). Less than 2.8 times its root is not distinguishable.
"""

import re
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import Estimate, mean_interval
from sae_italian.base.storage import package_versions, read_json, understood
from sae_italian.benchmark.run import SETTINGS

POWER = 2.8  # standard errors of a difference found four times in five at the level of 5 %
EVAL_TYPE = "sae_italian_sparse_probing"  # Italian sets are never averaged with SAEBench's English ones
COLUMNS = ("auc_1", "auc_16", "selectivity", "gain_1", "gain_16", "below_dense", "match")


class ProblemScore(NamedTuple):
    """One problem of one SAE: what its files hold of the controls and of its own, lists over the protocol's seeds."""

    control: dict[str, Any]
    own: dict[str, Any]

    def mean(self, what: str, k: str) -> float:
        """Return the mean over the seeds of the SAE's `auc`, or its `twin`'s, at a k."""
        return float(np.mean(self.own[what][k]))

    def value(self, column: str) -> float:
        """Return a number of the table."""
        if column == "match":  # results that are older than it have none
            ours, twin = np.mean(self.own.get("match", [[np.nan, np.nan]]), axis=0)
            return float((ours - twin) / (1 - twin))
        kind, _, k = column.partition("_")
        if kind == "gain":
            return self.mean("auc", k) - self.mean("twin", k)
        if kind == "auc":
            return self.mean("auc", k)
        form = max(self.control[name]["auc"] for name in ("form", "tokens"))
        return self.mean("auc", "16") - (form if kind == "selectivity" else self.control["dense"]["auc"])


@dataclass(frozen=True)
class Entry:
    """One SAE: where it was scored, and its scores by problem."""

    name: str
    facts: dict[str, Any]
    scores: dict[str, ProblemScore]
    tasks: dict[str, str]  # of each problem
    told: dict[str, dict[str, Any]]  # of each task: its names, family, whether form gives the answer

    def by_task(self, column: str, family: str = "") -> dict[str, float]:
        """Return a number by task, the mean over its poolings: of a family, or of all where form is not the answer."""
        values: dict[str, list[float]] = {}
        for problem, score in self.scores.items():
            told = self.told[self.tasks[problem]]
            if told["family"] == family if family else not told["form"]:
                values.setdefault(self.tasks[problem], []).append(score.value(column))
        return {task: float(np.mean(found)) for task, found in values.items()}

    def estimate(self, column: str, family: str = "") -> Estimate:
        """Return the mean over tasks with its interval over tasks."""
        return mean_interval(np.array([*self.by_task(column, family).values()]))

    @cached_property
    def reseed(self) -> float:
        """The sd of the mean AUC at k = 16 over the protocol's seeds."""
        kept = [s.own["auc"]["16"] for p, s in self.scores.items() if not self.told[self.tasks[p]]["form"]]
        means = np.mean(kept, axis=0)
        return float(np.std(means, ddof=1)) if np.size(means) > 1 else float("nan")

    def influence(self) -> Counter[tuple[str, str]]:
        """Return by (document, task) the influence on the mean AUC at k = 16."""
        kept = [p for p in self.scores if not self.told[self.tasks[p]]["form"]]
        poolings = {task: sum(self.tasks[p] == task for p in kept) for task in {self.tasks[p] for p in kept}}
        total: Any = Counter()
        for problem in kept:
            task = self.tasks[problem]
            for document, part in self.scores[problem].own["influence"]["16"].items():
                total[document, task] += part / poolings[task] / len(poolings)
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
    seeds = (a.reseed**2 + b.reseed**2) / max(len(next(iter(a.scores.values())).own["auc"]["16"]), 1)
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
        name = re.sub(r"[-_./ ]?s(eed)?[-_=]?\d+$", "", entry.name)
        groups.setdefault(name, {})[entry.name] = entry.estimate("auc_16").value
    found = {name: list(values.values()) for name, values in groups.items() if len(values) > 1}
    return {name: (float(np.std(values, ddof=1)), len(values)) for name, values in found.items()}


def read_entries(folder: Path) -> list[Entry]:
    """Return the SAEs of a benchmark's folder, or of all that lie below one, best first.

    Raises: UsageError when there is none.
    """
    files = [folder / SETTINGS] if (folder / SETTINGS).is_file() else sorted(folder.glob(f"*/{SETTINGS}"))
    with understood(f"a result in {folder}", "Run that benchmark again with --overwrite.", OSError):
        entries = [entry for file in files for entry in _entries(file.parent, read_json(file))]
        if not entries:
            raise UsageError(f"{folder} holds no results. Run `sae-italian benchmark SAE --out {folder}`.")
        return sorted(entries, key=lambda entry: [-entry.estimate(column).value for column in ("auc_16", *COLUMNS)])


def _entries(folder: Path, value: Mapping[str, Any]) -> Iterable[Entry]:
    for name, facts in value["saes"].items():
        hook = value["hooks"][facts["hook"]]
        tasks, scores = {problem: told["task"] for problem, told in hook["problems"].items()}, {}
        for problem in tasks:
            own, control = (
                folder / facts["hook"] / d / f"results.{problem}.json" for d in (facts["folder"], "controls")
            )
            if own.is_file():
                scores[problem] = ProblemScore(read_json(control), read_json(own))
        if scores:
            settings = {key: value[key] for key in ("model", "revision", "seeds", "sources", "most")}
            yield Entry(name, {**facts, **settings}, scores, tasks, value["tasks"])


# --- SAEBench ---------------------------------------------------------------------------------------------------------


def saebench(entry: Entry) -> dict[str, Any]:
    """Return the results as SAEBench's JSON of `sparse_probing_sae_probes`, under a type of our own.

    Sets bear the prefix `it_`. Intervals, seeds and controls are in `eval_result_unstructured`.
    """
    details = [_detail(problem, score) for problem, score in entry.scores.items()]
    keys = [key for key in details[0] if key.startswith(("llm", "sae_top"))]
    means = {key: float(np.mean([detail[key] for detail in details])) for key in keys}
    llm = {key: value for key, value in means.items() if key.startswith("llm")}
    found = [detail["sae_metrics_by_k"] for detail in details]
    by_k = {k: {m: float(np.mean([one[k][m] for one in found])) for m in some} for k, some in found[0].items()}
    shown = {column: entry.estimate(column).as_dict() for column in COLUMNS}
    release, _, sae_id = entry.name.rpartition(":")
    return {
        "eval_type_id": EVAL_TYPE,
        "eval_config": _config(entry),
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": {"llm": llm, "sae": {key: means[key] for key in keys if key not in llm}},
        "eval_result_details": details,
        "sae_metrics_by_k": by_k,
        "sae_bench_commit_hash": f"sae-italian {package_versions()['sae-italian']}",
        "sae_lens_id": sae_id,
        "sae_lens_release_id": release or "custom",
        "sae_lens_version": package_versions()["sae-lens"],
        "sae_cfg_dict": entry.facts["config"],
        "eval_result_unstructured": {"headline": shown, "problems": {p: _beside(s) for p, s in entry.scores.items()}},
    }


def _config(entry: Entry) -> dict[str, Any]:
    names = [f"it_{problem}" for problem in entry.scores]
    sizes = dict(zip(("probe_train_set_size", "probe_test_set_size"), entry.facts["most"], strict=True))
    ks = [int(k) for k in next(iter(entry.scores.values())).own["auc"]]
    told = {"random_seed": 0, "dataset_names": names, "k_values": ks}
    return told | sizes | {"model_name": entry.facts["model"] or ""}


def _detail(problem: str, score: ProblemScore) -> dict[str, Any]:
    dense, own = score.control["dense"], score.own
    metrics = ("accuracy", "auc", "f1")
    by_k = {k: {f"test_{m}": score.mean("auc", k) if m == "auc" else own[m][k] for m in metrics} for k in own["auc"]}
    found: dict[str, Any] = {"dataset_name": f"it_{problem}", **{f"llm_test_{m}": dense[m] for m in metrics}}
    for k in (k for k in by_k if k in ("1", "2", "5")):  # SAEBench has no field for k = 16
        found |= {f"sae_top_{k}_{name}": value for name, value in by_k[k].items()}
    return found | {"sae_metrics_by_k": by_k}


def _beside(score: ProblemScore) -> dict[str, Any]:
    chance: Float[np.ndarray, " n"] = np.array(score.own["permuted"])
    return {
        "seeds": score.own["auc"],
        "twin": {k: score.mean("twin", k) for k in score.own["twin"]},
        "permuted": {"mean": float(chance.mean()), "most": float(chance.max())},
        "interval_16": score.own["interval"]["16"],
        "controls": {key: value["auc"] for key, value in score.control.items() if isinstance(value, dict)},
        "n_test": score.control["n_test"],
        "majority": score.control["majority"],
    }
