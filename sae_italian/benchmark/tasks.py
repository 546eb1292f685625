"""Tasks as data: rules about the facts of passages and words, read from YAML, and the examples that they draw.

A draw is balanced, so that chance is an AUC and an accuracy of 0.5: as many without as with the property, on either
side of the split, and where the task says so within each value of a fact (the form, the length of a sentence).
Possible examples are rows of a table: where they stand, the answer, and what they are balanced within.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int
from pydantic import BaseModel, ConfigDict

from sae_italian.base.errors import check_known
from sae_italian.base.storage import read_yaml
from sae_italian.benchmark.material import Material, Passage, hub_sets, is_test

LEAST, LEAST_ROWS = 20, 50  # examples of the rarer class, on either side; of a set of the hub
TRAIN, TEST = 1024, 600  # examples at most
MEAN, LAST, WORD, TEXT = "mean", "last", "word", "text"
MEAN_OF, LAST_OF = -1, -2  # where a text is read, in place of where a word ends
WHERE = {MEAN: MEAN_OF, LAST: LAST_OF}
Rule = dict[str, Any]
Items = Any  # a DataFrame of possible examples, as `SourceTable.items`; `read` is the text's number among those read
Sides = tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]  # numbers of the items for training, for test


class ProbingTask(BaseModel):
    """One question with two answers; fields as the YAML files in data/ explain them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    en: str
    it: str
    family: str
    source: str
    unit: str
    among: Rule = {}
    positive: Rule = {}
    negative: Rule = {}
    apart: str = ""
    within: str = ""
    poolings: tuple[str, ...] = ()
    quick: bool = False
    form: bool = False
    least: int = LEAST

    @property
    def problems(self) -> tuple[str, ...]:
        """How an example becomes a vector: at the word's token, or the mean and the last token of a text."""
        return self.poolings or ((WORD,) if self.unit == WORD else (MEAN, LAST))


def read_tasks(values: Mapping[str, Any], known: Mapping[str, Collection[str]] | None = None) -> Iterator[ProbingTask]:
    """Yield the tasks of one file. `each` makes one for every value of a fact; `*` stands for the `known` values."""
    shared = {key: value for key, value in values.items() if key != "tasks"}
    for entry in values["tasks"]:
        given = shared | entry
        if "each" not in given:
            yield ProbingTask(**given)
            continue
        ((fact, listed),) = given.pop("each").items()
        quick = given.pop("quick", [])
        for value in [*(known or {}).get(fact, ())] if listed == ["*"] else listed:
            filled: Rule = {key: given[key].format(value) for key in ("en", "it")}
            filled["id"] = f"{given['id']}-{value}"
            filled["among"] = {key: text.format(value) for key, text in given.get("among", {}).items()}
            rule = given.get("positive") or {fact: f"(.* )?{re.escape(value)}( .*)?"}
            yield ProbingTask(**given | filled | {"positive": rule, "quick": value in quick})


def all_tasks(known: Mapping[str, Collection[str]] | None = None) -> list[ProbingTask]:
    """Return the tasks that run offline."""
    files = sorted(Path(__file__).parent.glob("data/*.yaml"))
    return [task for file in files for task in read_tasks(read_yaml(file), known)]


def hub_tasks() -> list[ProbingTask]:
    """Return the tasks of all sets of the hub; a set's passages are the source of its name."""
    shared = {"family": "hub", "unit": TEXT, "least": LEAST_ROWS}
    sets = ({**shared, "source": name, "tasks": one["tasks"]} for name, one in hub_sets().items())
    return [task for one in sets for task in read_tasks(one)]


def chosen(tasks: Sequence[ProbingTask], preset: str, names: str) -> list[ProbingTask]:
    """Return the tasks of a preset, or those named with commas. Raises: UsageError for an unknown one."""
    check_known("preset", ("quick", "full"), preset)
    if not names:
        return [task for task in tasks if preset == "full" or task.quick]
    known = {task.id: task for task in tasks}
    check_known("task", known, *names.split(","))
    return [known[name] for name in names.split(",")]


# --- rules ------------------------------------------------------------------------------------------------------------


class SourceTable:
    """The texts of one source and all their words, a row each with what an example of it would be, and their facts."""

    def __init__(self, passages: Sequence[Passage]):
        texts = [(i, *p[:3], MEAN_OF, p.text, p.facts) for i, p in enumerate(passages)]
        words = [
            (i, *p[:3], word.end, p.text[word.start : word.end], word.facts)
            for i, p in enumerate(passages)
            for word in p.words
        ]
        # as objects: texts are referred to, not copied for each word of theirs
        columns, types = ("passage", "text", "document", "test", "end", "form", "facts"), {"passage": int, "test": bool}
        frames = (pd.DataFrame(rows, columns=columns, dtype=object).astype(types) for rows in (texts, words))
        self._rows: dict[str, Any] = dict(zip((TEXT, WORD), frames, strict=True))
        self._values = cache(self._fact)

    def _fact(self, unit: str, name: str) -> pd.Categorical:
        """Return a fact of all rows by its values, so that a rule asks each of these once."""
        return pd.Categorical([facts.get(name) for facts in self._rows[unit].facts])

    def holds(self, rule: Rule, unit: str) -> Bool[np.ndarray, " rows"]:
        """Return where all facts match whole; of texts, `some` and `none` ask for a word that does, and for none."""
        rows = self._rows[unit]
        found = np.ones(len(rows), dtype=bool)
        for name, wanted in rule.items():
            if name in ("some", "none"):
                inside = self._rows[WORD].passage[self.holds(wanted, WORD)]
                found &= rows.passage.isin(inside) == (name == "some")
            else:
                values: Any = self._values(unit, name)
                found &= values.isin([value for value in values.categories if re.fullmatch(wanted, value)])
        return found

    def items(self, task: ProbingTask) -> Items:
        """Return every example of a task, the rows it is about that are positive or negative, with their `answer`.

        `value` is the fact within which they are balanced, `cell` a number for each value and side. Of a fact by which
        the sides are kept `apart` (the lemma), a value that is on both goes to one.
        """
        among, positive = (self.holds(rule, task.unit) for rule in (task.among, task.positive))
        asked = among & (positive | (self.holds(task.negative, task.unit) if task.negative else ~positive))
        found: Items = self._rows[task.unit][asked].assign(answer=positive[asked])
        found["value"] = [facts.get(task.within, "") for facts in found.facts]
        if task.apart:
            apart = [facts.get(task.apart, "") for facts in found.facts]
            on_both = found.groupby(apart).test.transform("nunique") == 2
            side = np.where(on_both, [is_test(value, 2) for value in apart], found.test)
            found = found[found.test == side]
        return found.assign(cell=found.groupby(["test", "value"]).ngroup()).reset_index(drop=True)


def shortage(task: ProbingTask, items: Items) -> str:
    """Return what a task has too few balanced examples a class for, in figures: `rara: 14 < 20 (test)`."""
    for test in (False, True):
        n = n_balanced(items[items.test == test])
        if n < task.least:
            return f"{task.id}: {n} < {task.least} ({'test' if test else 'train'})"
    return ""


def n_balanced(items: Items) -> int:
    """Return how many of each class there are when classes are balanced within the task's fact."""
    counts = items.groupby("value").answer.agg(["sum", "size"])
    return int(np.minimum(counts["sum"], counts["size"] - counts["sum"]).sum())


def draw(
    items: Items, seed: int, wanted: Bool[np.ndarray, " n"] | None = None, most: tuple[int, int] = (TRAIN, TEST)
) -> Sides:
    """Return the numbers of balanced examples for training and for test; those that are `wanted` (of texts already read) come first."""
    order = np.random.default_rng(seed).permutation(len(items))
    if wanted is not None:
        order = order[np.argsort(~wanted[order], kind="stable")]
    cell, answer = (items[name].to_numpy()[order] for name in ("cell", "answer"))
    nth = pd.DataFrame({"cell": cell, "answer": answer}).groupby(["cell", "answer"]).cumcount().to_numpy()
    key, rank = cell * len(order) + nth, np.arange(len(order))
    _, no, yes = np.intersect1d(key[~answer], key[answer], assume_unique=True, return_indices=True)
    # the first of each class of a cell, the second, ...
    pairs = np.stack([rank[~answer][no], rank[answer][yes]], axis=1)
    numbers = order[pairs[np.argsort(pairs.max(axis=1))]]
    test = items.test.to_numpy()[numbers[:, 0]]
    train, judged = (numbers[test == side][: most[side] // 2].ravel() for side in (False, True))
    return np.random.default_rng(seed + 1).permutation(train), judged  # the last rows of training choose C


# --- which texts are read ----------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A task read in one way, the examples it may draw, and what each seed draws."""

    task: ProbingTask
    pooling: str
    items: Items
    draws: list[Sides]
    frequency: float  # of yes among all that are possible: what is read holds more of what is rare

    @property
    def name(self) -> str:
        """The name of its files."""
        return re.sub(r"[^\w-]+", "-", f"{self.task.id}-{self.pooling}")

    @property
    def answer(self) -> Bool[np.ndarray, " items"]:
        """The answer to each item."""
        return self.items.answer.to_numpy(dtype=bool)

    def points(self) -> list[tuple[int, int]]:
        """Return where each item is read."""
        ends = self.items.end if self.pooling == WORD else [WHERE[self.pooling]] * len(self.items)
        return list(zip(self.items.read, ends, strict=True))


class Plan(NamedTuple):
    """Which problems are run on which texts, and which tasks are refused and why."""

    problems: list[Problem]
    texts: list[str]
    refused: list[str]


def plan(
    material: Material, tasks: Sequence[ProbingTask], most: tuple[int, int] = (TRAIN, TEST), n_seeds: int = 5
) -> Plan:
    """Choose the texts that are read: the rarest tasks draw first, the others prefer what is then read anyway."""
    names = {task.source for task in tasks}
    sources = {name: SourceTable(material.passages.get(name, [])) for name in names}
    items = {task.id: sources[task.source].items(task) for task in tasks}
    short = {task.id: shortage(task, items[task.id]) for task in tasks}
    found = [(task, items[task.id]) for task in tasks if not short[task.id]]
    texts: list[str] = []
    for _, some in sorted(found, key=lambda one: n_balanced(one[1])):
        drawn = np.concatenate(draw(some, 0, some.text.isin(texts).to_numpy(), most))
        texts = list(dict.fromkeys([*texts, *some.text.iloc[drawn]]))
    number, problems = {text: i for i, text in enumerate(texts)}, []
    for task, some in found:
        read = some[some.text.isin(texts)].reset_index(drop=True)
        read["read"] = read.text.map(number)
        rest = read, [draw(read, seed, most=most) for seed in range(n_seeds)], float(some.answer.mean())
        problems += [Problem(task, pooling, *rest) for pooling in task.problems]
    return Plan(problems, texts, [why for why in short.values() if why])
