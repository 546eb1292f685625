"""What the results say: a row for every SAE, what is not distinguishable, by family; SAEBench's JSON of it; the report.

The headline of a task is selectivity, AUC at k = 16 minus the better of the two form controls, and the gain over the
random twin. The match is the correlation of the best single latent with the answer, above that of the twin's best, as a
share of what is left to 1: it follows a planted truth where AUC does not. Means are over tasks, whose poolings are averaged
first. Tasks are the sample: intervals resample them. The variance of a difference between two SAEs also counts the
documents that tasks share: V = V_tasks + V_documents - V_cells, at least the larger of the first two (Cameron, Gelbach,
Miller 2011). Less than 2.8 times its root is not distinguishable.
"""

import re
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sae_italian.base.errors import UsageError
from sae_italian.base.hub import WandbRun
from sae_italian.base.labels import label
from sae_italian.base.report import page, plain, save_result, shown, table
from sae_italian.base.statistics import Estimate, mean_interval
from sae_italian.base.storage import fingerprint, package_versions, read_json, understood, write_json, write_text
from sae_italian.benchmark.run import SETTINGS

POWER = 2.8  # standard errors of a difference found four times in five at the level of 5 %
EVAL_TYPE = "sae_italian_sparse_probing"  # Italian sets are never averaged with SAEBench's English ones
COLUMNS = ("auc_1", "auc_16", "selectivity", "gain_1", "gain_16", "below_dense", "match")
CONTROLS = ("form", "tokens", "dense", "embedded")
# The columns of a problem.
OWN = ("auc_1", "auc_16", "lo", "hi", "selectivity", "gain_16", *CONTROLS, "permuted", "majority")
SIZE = {"texts": 0, "tokens": 0, "tokens_per_word": 2}  # digits
# A click on a column's head sorts by its first number, the largest first.
SORT = """document.querySelectorAll('th').forEach((h,i)=>{h.setAttribute('role','button');h.onclick=()=>{
const t=h.closest('table'),n=[...h.parentNode.children].indexOf(h),v=r=>parseFloat(r.children[n].textContent)||-9;
[...t.tBodies[0].rows].sort((a,b)=>v(b)-v(a)).forEach(r=>t.tBodies[0].append(r))}})"""


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
        scores = (score for some in self.tasks().values() for score in some)
        means = np.mean([score.own["auc"]["16"] for score in scores], axis=0)
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
    settings = {key: value[key] for key in ("model", "revision", "seeds", "sources", "most")}
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
    headlines = {column: entry.estimate(column).as_dict() for column in COLUMNS}
    sizes = dict(zip(("probe_train_set_size", "probe_test_set_size"), entry.facts["most"], strict=True))
    names = [f"it_{problem}" for problem in entry.scores]
    config = {"random_seed": 0, "dataset_names": names, "k_values": [int(k) for k in by_k]}
    config["model_name"] = entry.facts["model"] or ""
    beside = {"headline": headlines, "problems": {p: _beside(score) for p, score in entry.scores.items()}}
    release, _, sae_id = entry.name.rpartition(":")
    return {
        "eval_type_id": EVAL_TYPE,
        "eval_config": config | sizes,
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
        "eval_result_unstructured": beside,
    }


def _detail(problem: str, score: ProblemScore) -> dict[str, Any]:
    dense, own = score.control["dense"], score.own
    metrics = ("accuracy", "auc", "f1")
    of = {"accuracy": own["accuracy"], "auc": score.means("auc"), "f1": own["f1"]}
    by_k = {k: {f"test_{m}": of[m][k] for m in metrics} for k in own["auc"]}
    found: dict[str, Any] = {"dataset_name": f"it_{problem}", **{f"llm_test_{m}": dense[m] for m in metrics}}
    for k in (k for k in by_k if k in ("1", "2", "5")):  # SAEBench has no field for k = 16
        found |= {f"sae_top_{k}_{name}": value for name, value in by_k[k].items()}
    return found | {"sae_metrics_by_k": by_k}


def _beside(score: ProblemScore) -> dict[str, Any]:
    chance: Float[np.ndarray, " n"] = np.array(score.own["permuted"])
    return {
        "seeds": score.own["auc"],
        "twin": score.means("twin"),
        "permuted": {"mean": float(chance.mean()), "most": float(chance.max())},
        "interval_16": score.own["interval"]["16"],
        "controls": {key: value["auc"] for key, value in score.control.items() if isinstance(value, dict)},
        "n_test": score.control["n_test"],
        "majority": score.control["majority"],
    }


# --- the report and the leaderboard: Markdown, one HTML file that needs no network, W&B -----------------------------------


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
        tasks = str(len(entry.by_task("auc_16")))
        seen = ", ".join(entry.facts["seen"]) or "-"
        rows.append([str(rank), entry.name, *numbers, f"{entry.reseed:.4f}", tasks, seen])
    names = ("rank", "sae", *COLUMNS, "reseed", "tasks", "seen")
    return _board(both("headline"), names, rows, _foot(entries))


def _foot(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield what stands at the foot of a table: what differences could be told apart, and what noise there is."""
    for above, below in zip(entries, entries[1:], strict=False):
        found = compare(above, below)
        names = {"a": above.name, "b": below.name, "value": f"{found.value:+.3f}", "least": f"{found.least:.3f}"}
        yield both("distinguishable" if found.distinguishable else "not_distinguishable", **names)
    for name, (sd, n) in training_noise(entries).items():
        yield both("training_noise", name=name, sd=f"{sd:.4f}", n=n)
    yield both("legend")


def families(entries: Sequence[Entry]) -> Board:
    """Return the mean AUC at k = 16 and the selectivity by family of tasks."""
    scores = (score for entry in entries for score in entry.scores.values())
    names = list(dict.fromkeys(score.task["family"] for score in scores))
    rows = []
    for entry in entries:
        found = ([entry.estimate(c, family).value for c in ("auc_16", "selectivity")] for family in names)
        rows.append([entry.name, *("-" if auc != auc else f"{auc:.3f} ({less:+.3f})" for auc, less in found)])
    return Board(both("families"), ["SAE", *names], rows, [])


def problems(entry: Entry) -> Board:
    """Return every problem of one SAE with all its controls beside it."""
    rows = []
    for name, score in entry.scores.items():
        marked = f"{score.task['en']} · {score.task['it']}" + (" *" if score.control["exploratory"] else "")
        numbers = [f"{score.numbers[column]:.3f}" for column in OWN]
        rows.append([name, marked, *numbers, str(score.control["n_test"])])
    every = ("problem", "task", *OWN, "n_test")
    return _board(f"{entry.name}: {both('problems')}", every, rows, [both("exploratory")])


def write(folder: Path, entries: Sequence[Entry], told: Mapping[str, Any]) -> Board:
    """Write benchmark.json, .md, .html, and SAEBench's JSON of every SAE; return the headline."""
    first, notes = headline(entries), list(_notes(told))
    boards = [first._replace(notes=[*first.notes, *notes]), families(entries), *map(problems, entries)]
    _pages(folder / "benchmark", both("title"), boards)
    rows = [
        {c: plain(entry.estimate(c)) for c in COLUMNS}
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
        yield both("size", hook=hook, **{key: f"{size[key]:,.{digits}f}" for key, digits in SIZE.items()})
    if told["n_copies"]:
        yield both("copies", n=told["n_copies"])
    beyond = (why for size in told["hooks"].values() for why in size["refused"])
    refused = dict.fromkeys([*told["refused"], *beyond])
    if refused:
        yield both("refused", tasks="; ".join(refused))


def leaderboard(folder: Path) -> list[Board]:
    """Write leaderboard.md and leaderboard.html over all results below a folder; return its tables.

    SAEs that were scored on other examples stand in a table of their own. Raises: UsageError when there is no result.
    """

    def examples(entry: Entry) -> str:
        same = [entry.facts[key] for key in ("sources", "most", "seeds")]
        return f"{entry.facts['model']}, {fingerprint(same)[:6]}"

    entries = sorted(read_entries(folder), key=examples)  # stable: best first within
    boards = []
    for name, some in groupby(entries, examples):
        board = headline(list(some))
        boards.append(board._replace(title=f"{board.title}: {name}"))
    _pages(folder / "leaderboard", both("title"), boards)
    return boards


def _pages(stem: Path, title: str, boards: Sequence[Board]) -> None:
    parts = [f"# {title}", *(board.markdown() for board in boards)]
    write_text(stem.with_suffix(".md"), "\n\n".join(parts) + "\n")
    write_text(stem.with_suffix(".html"), page(title, parts, script=SORT))


def send_to_wandb(entries: Sequence[Entry], project: str, folder: Path) -> str:
    """Log the headline and every problem as W&B tables, offline without a login; return where they are."""
    import wandb

    rows = [[entry.name, *(entry.estimate(column).value for column in COLUMNS)] for entry in entries]
    named = (([entry.name, name], score) for entry in entries for name, score in entry.scores.items())
    cells = [[*names, *map(score.numbers.get, COLUMNS)] for names, score in named]
    tables: Any = {"benchmark/saes": (["sae"], rows), "benchmark/problems": (["sae", "problem"], cells)}
    mode = None if wandb.login(prompt=False, verify=False) else "offline"  # None: as WANDB_MODE says
    how: Any = {"mode": mode, "settings": wandb.Settings(console="off", silent=True)}
    with wandb.init(job_type="benchmark", **how, **WandbRun(project=project).joined(folder)) as run:
        for name, (head, data) in tables.items():
            run.log({name: wandb.Table(columns=[*head, *COLUMNS], data=data)})
    if run.offline:
        sys.stderr.write(f"W&B holds this offline; send it with: wandb sync {folder}/wandb/offline-*\n")
    return f"W&B project {project}"
