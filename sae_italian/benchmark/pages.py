"""The report of a benchmark and the leaderboard over a folder of them: Markdown, one HTML file that needs no network, W&B."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_italian.base.hub import WandbRun
from sae_italian.base.labels import label
from sae_italian.base.report import page, plain, save_result, shown, table
from sae_italian.base.storage import fingerprint, write_json, write_text
from sae_italian.benchmark.board import COLUMNS, Entry, compare, ranks, read_entries, saebench, training_noise

# The columns of a problem: the SAE's own, and the AUC of its controls.
OWN = ("auc_1", "auc_16", "lo", "hi", "selectivity", "gain_16")
OTHERS = ("form", "tokens", "dense", "embedded")
SIZE = {"texts": 0, "tokens": 0, "tokens_per_word": 2}  # digits
# A click on a column's head sorts by its first number, the largest first.
SORT = """document.querySelectorAll('th').forEach((h,i)=>{h.setAttribute('role','button');h.onclick=()=>{
const t=h.closest('table'),n=[...h.parentNode.children].indexOf(h),v=r=>parseFloat(r.children[n].textContent)||-9;
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


def _heads(names: Sequence[str]) -> list[str]:
    return [label(f"benchmark.{name}") for name in names]


def _in_italian(names: Sequence[str]) -> str:
    return f"Colonne: {'; '.join(label(f'benchmark.{name}', 'it') for name in names)}."


def headline(entries: Sequence[Entry]) -> Board:
    """Return the SAEs that were scored on the same examples, best first, those not distinguishable at one rank."""
    rows = []
    for rank, entry in zip(ranks(entries), entries, strict=True):
        numbers = [shown(entry.estimate(column), ".3f") for column in COLUMNS]
        tasks = str(len(entry.by_task("auc_16")))
        seen = ", ".join(entry.facts["seen"]) or "-"
        rows.append([str(rank), entry.name, *numbers, f"{entry.reseed:.4f}", tasks, seen])
    names = ("rank", "sae", *COLUMNS, "reseed", "tasks", "seen")
    return Board(both("headline"), _heads(names), rows, [*_foot(entries), _in_italian(names)])


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
    names = list(dict.fromkeys(told["family"] for entry in entries for told in entry.told.values()))
    rows = []
    for entry in entries:
        found = ([entry.estimate(c, family).value for c in ("auc_16", "selectivity")] for family in names)
        rows.append([entry.name, *("-" if auc != auc else f"{auc:.3f} ({less:+.3f})" for auc, less in found)])
    return Board(both("families"), ["SAE", *names], rows, [])


def problems(entry: Entry) -> Board:
    """Return every problem of one SAE with all its controls beside it."""
    rows = []
    for name, score in entry.scores.items():
        told, control = entry.told[entry.tasks[name]], score.control
        lo, hi = (float("nan") if x is None else x for x in score.own["interval"]["16"])
        chance = np.quantile(score.own["permuted"], 0.95)
        own = {column: score.value(column) for column in COLUMNS} | {"lo": lo, "hi": hi}
        numbers = [own[name] for name in OWN]
        others = [control[key]["auc"] for key in OTHERS]
        cells = [f"{x:.3f}" for x in [*numbers, *others, chance, control["majority"]]]
        marked = f"{told['en']} · {told['it']}" + (" *" if control["exploratory"] else "")
        rows.append([name, marked, *cells, str(control["n_test"])])
    every = ("problem", "task", *OWN, *OTHERS, "permuted", "majority", "n_test")
    title = f"{entry.name}: {both('problems')}"
    return Board(title, _heads(every), rows, [both("exploratory"), _in_italian(every)])


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
        name = entry.name if ":" in entry.name else f"custom_{entry.name}"
        name = name.replace("/", "_").replace(":", "_")
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
    cells = [
        [entry.name, name, *map(score.value, COLUMNS)] for entry in entries for name, score in entry.scores.items()
    ]
    tables: Any = {"benchmark/saes": (["sae"], rows), "benchmark/problems": (["sae", "problem"], cells)}
    mode = None if wandb.login(prompt=False, verify=False) else "offline"  # None: as WANDB_MODE says
    how: Any = {"mode": mode, "settings": wandb.Settings(console="off", silent=True)}
    with wandb.init(job_type="benchmark", **how, **WandbRun(project=project).joined(folder)) as run:
        for name, (head, data) in tables.items():
            run.log({name: wandb.Table(columns=[*head, *COLUMNS], data=data)})
    if run.offline:
        sys.stderr.write(f"W&B holds this offline; send it with: wandb sync {folder}/wandb/offline-*\n")
    return f"W&B project {project}"
