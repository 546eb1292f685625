"""The pages of the results: report and leaderboard (Markdown, and one HTML file that needs no network), SAEBench's JSON, W&B."""

import re
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from sae_italian.base.hub import WandbRun
from sae_italian.base.labels import label
from sae_italian.base.report import page, plain, save_result, shown, table
from sae_italian.base.storage import fingerprint, package_versions, write_json, write_text
from sae_italian.benchmark.board import COLUMNS, OWN, Entry, compare, means, ranks, read_entries, training_noise

EVAL_TYPE = "sae_italian_sparse_probing"  # Italian sets are never averaged with SAEBench's English ones
# A click on a column's head sorts by its first number, the largest first.
SORT = """document.querySelectorAll('th').forEach(h=>{h.setAttribute('role','button');h.onclick=()=>{const t=h.closest('table'),
n=[...h.parentNode.children].indexOf(h),v=r=>{const x=parseFloat(r.children[n].textContent);return isNaN(x)?-9:x};
[...t.tBodies[0].rows].sort((a,b)=>v(b)-v(a)).forEach(r=>t.tBodies[0].append(r))}})"""


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
        what = "distinguishable" if found.distinguishable else "not_distinguishable"
        yield both(what, a=above.name, b=below.name, **found._asdict())
    for name, (sd, n) in training_noise(entries).items():
        yield both("training_noise", name=name, sd=sd, n=n)
    yield both("legend")


def families(entries: Sequence[Entry]) -> Board:
    """Return the mean AUC at k = 16 and the selectivity by family of tasks."""
    names = pd.concat([entry.problems.family for entry in entries]).unique()
    rows = []
    for entry in entries:
        found = ([entry.estimate(c, family).value for c in ("auc_16", "selectivity")] for family in names)
        rows.append([entry.name, *("-" if auc != auc else f"{auc:.3f} ({less:+.3f})" for auc, less in found)])
    return Board(both("families"), ["SAE", *names], rows, [])


def problems(entry: Entry) -> Board:
    """Return every problem of one SAE with all its controls beside it."""
    rows = []
    for name, row in entry.problems.iterrows():
        marked = f"{row.en} · {row.it}" + (" *" if row.control["exploratory"] else "")
        rows.append([str(name), marked, *(f"{row[column]:.3f}" for column in OWN), str(row.control["n_test"])])
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
        yield both("size", hook=hook, **size)
    if told["n_copies"]:
        yield both("copies", n=told["n_copies"])
    beyond = (why for size in told["hooks"].values() for why in size["refused"])
    refused = dict.fromkeys([*told["refused"], *beyond])
    if refused:
        yield both("refused", tasks="; ".join(refused))


def leaderboard(folder: Path) -> list[Board]:
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
    _pages(folder / "leaderboard", both("title"), boards)
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
    config = {"random_seed": 0, "dataset_names": names, "k_values": [int(k) for k in by_k]}
    config |= {"probe_train_set_size": train, "probe_test_set_size": test, "model_name": entry.facts["model"] or ""}
    headlines = {column: entry.estimate(column).as_dict() for column in COLUMNS}
    beside = {"headline": headlines, "problems": {p: _beside(row) for p, row in entry.problems.iterrows()}}
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
    chance = row.own["permuted"]
    return {
        "seeds": row.own["auc"],
        "twin": means(row.own, "twin"),
        "permuted": {"mean": sum(chance) / len(chance), "most": max(chance)},
        "interval_16": row.own["interval"]["16"],
        "controls": {key: value["auc"] for key, value in row.control.items() if isinstance(value, dict)},
        "n_test": row.control["n_test"],
        "majority": row.control["majority"],
    }
