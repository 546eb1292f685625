"""Tasks as data: rules about the facts of passages and words, read from YAML, and the examples that they draw.

A draw is balanced, so that chance is an AUC and an accuracy of 0.5: as many without as with the property, on either
side of the split, and where the task says so within each value of a fact (the form, the length of a sentence).
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from pydantic import BaseModel, ConfigDict

from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.storage import read_yaml
from sae_italian.benchmark.material import Material, Passage, PlacedWord, is_test

LEAST = 20  # examples of the rarer class, on either side
TRAIN, TEST = 1024, 600  # examples at most
MEAN, LAST, WORD, TEXT = "mean", "last", "word", "text"
WHOLE = -1  # where a word ends, of a whole text
MEAN_OF, LAST_OF = -1, -2  # where a text is read, in place of where a word ends
Rule = dict[str, Any]


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


class Item(NamedTuple):
    """One possible example."""

    passage: int  # of its source
    end: int  # where its word ends, or WHOLE
    answer: bool
    test: bool
    value: str  # of the fact within which classes are balanced
    form: str  # what a reader of form alone sees


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


def chosen(tasks: Sequence[ProbingTask], preset: str, names: str) -> list[ProbingTask]:
    """Return the tasks of a preset, or those named with commas. Raises: UsageError for an unknown name."""
    if not names:
        return [task for task in tasks if preset == "full" or task.quick]
    known = {task.id: task for task in tasks}
    if unknown := [name for name in names.split(",") if name not in known]:
        raise UsageError(f"task {unknown[0]!r} is unknown. {nearest(unknown[0], known)}")
    return [known[name] for name in names.split(",")]


# --- rules ------------------------------------------------------------------------------------------------------------


def _matches(value: str | None, pattern: str) -> bool:
    """Return whether a fact is there and matches whole."""
    return value is not None and re.fullmatch(pattern, value) is not None


class SourceTable:
    """The passages of one source, and the facts of them and of all their words."""

    def __init__(self, passages: Sequence[Passage]):
        self.passages = passages
        self._column = cache(self._coded)
        words = [(i, word) for i, passage in enumerate(passages) for word in passage.words]
        texts = [(i, PlacedWord(0, WHOLE, passage.facts)) for i, passage in enumerate(passages)]
        self._places = {WORD: words, TEXT: texts}  # each in the passage of that number

    def _coded(self, unit: str, name: str) -> tuple[list[str | None], Int[np.ndarray, " places"]]:
        """Return the values of a fact, and which one each place has: a rule asks every value once."""
        codes: dict[str | None, int] = {}
        which = [codes.setdefault(place.facts.get(name), len(codes)) for _, place in self._places[unit]]
        return [*codes], np.array(which, dtype=np.int64)

    def holds(self, rule: Rule, unit: str) -> Bool[np.ndarray, " places"]:
        """Return where all facts match; of texts, `some` and `none` ask for a word that does, and for none."""
        found = np.ones(len(self._places[unit]), dtype=bool)
        for name, wanted in rule.items():
            if name in ("some", "none"):
                matching = np.flatnonzero(self.holds(wanted, WORD)).tolist()
                inside = {self._places[WORD][number][0] for number in matching}
                found &= [(i in inside) == (name == "some") for i, _ in self._places[unit]]
            else:
                values, codes = self._column(unit, name)
                found &= np.array([_matches(value, wanted) for value in values], dtype=bool)[codes]
        return found

    def items(self, task: ProbingTask) -> list[Item]:
        """Return every example of a task: places it is about that are positive, and those that are negative."""
        among, positive = (self.holds(rule, task.unit) for rule in (task.among, task.positive))
        negative = self.holds(task.negative, task.unit) if task.negative else ~positive
        items, sides = [], {}
        for number in np.flatnonzero(among & (positive | negative)).tolist():
            index, place = self._places[task.unit][number]
            passage, value = self.passages[index], place.facts.get(task.within, "")
            form = passage.text if place.end == WHOLE else passage.text[place.start : place.end]
            items.append(Item(index, place.end, bool(positive[number]), passage.test, value, form))
            sides.setdefault(place.facts.get(task.apart, ""), []).append(len(items) - 1)
        return _apart(items, sides) if task.apart else items


def _apart(items: list[Item], by_value: Mapping[str, list[int]]) -> list[Item]:
    """Return the items without those whose value (a lemma) belongs to the other side; a value of both goes to one."""
    kept = []
    for value, numbers in by_value.items():
        tested = {items[number].test for number in numbers}
        side = is_test(value, 2) if len(tested) == 2 else tested.pop()
        kept += [number for number in numbers if items[number].test == side]
    return [items[number] for number in sorted(kept)]


def shortage(task: ProbingTask, items: Sequence[Item]) -> str:
    """Return what a task has too few balanced examples a class for, in figures: `rara: 14 < 20 (test)`."""
    for test in (False, True):
        n = n_balanced([item for item in items if item.test == test])
        if n < task.least:
            return f"{task.id}: {n} < {task.least} ({'test' if test else 'train'})"
    return ""


def n_balanced(items: Sequence[Item]) -> int:
    """Return how many of each class there are when classes are balanced within the task's fact."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for item in items:
        counts[item.value][item.answer] += 1
    return sum(map(min, counts.values()))


def draw(
    items: Sequence[Item],
    seed: int,
    wanted: Bool[np.ndarray, " n"] | None = None,
    most: tuple[int, int] = (TRAIN, TEST),
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """Return the numbers of balanced examples for training and for test; those that are `wanted` (of texts already read) come first."""
    order = np.random.default_rng(seed).permutation(len(items))
    if wanted is not None:
        order = order[np.argsort(~wanted[order], kind="stable")]
    rank = {index: place for place, index in enumerate(order.tolist())}
    sides = []
    for test, limit in zip((False, True), most, strict=True):
        cells: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for index in rank:
            if items[index].test == test:
                cells[items[index].value][items[index].answer].append(index)
        pairs = [pair for no, yes in cells.values() for pair in zip(no, yes, strict=False)]
        pairs.sort(key=lambda pair: max(rank[pair[0]], rank[pair[1]]))
        sides.append(np.array(pairs[: limit // 2], dtype=np.int64).reshape(-1))
    shuffled = np.random.default_rng(seed + 1).permutation(len(sides[0]))  # the last rows choose C
    return sides[0][shuffled], sides[1]


# --- which texts are read ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A task read in one way, with the examples it may draw."""

    task: ProbingTask
    pooling: str
    items: list[Item]
    texts: list[int]  # of each item, among all texts
    documents: list[str]
    frequency: float  # of yes among all that are possible: what is read holds more of what is rare

    @property
    def name(self) -> str:
        """The name of its files."""
        return re.sub(r"[^\w-]+", "-", f"{self.task.id}-{self.pooling}")

    @cached_property
    def answer(self) -> Bool[np.ndarray, " items"]:
        """The answer to each item."""
        return np.array([item.answer for item in self.items], dtype=bool)

    def points(self) -> list[tuple[int, int]]:
        """Return where each item is read."""
        where = {MEAN: MEAN_OF}.get(self.pooling, LAST_OF)
        own = [item.end if self.pooling == WORD else where for item in self.items]
        return list(zip(self.texts, own, strict=True))


@dataclass(frozen=True)
class Plan:
    """Which problems are run on which texts, and which tasks are refused and why."""

    problems: list[Problem]
    texts: list[str]
    refused: list[str]


def plan(material: Material, tasks: Sequence[ProbingTask], most: tuple[int, int] = (TRAIN, TEST)) -> Plan:
    """Choose the texts that are read: the rarest tasks draw first, the others prefer what is then read anyway."""
    found: dict[str, tuple[ProbingTask, list[Item], Sequence[Passage]]] = {}
    refused, sources = [], {name: SourceTable(passages) for name, passages in material.passages.items()}
    for task in tasks:
        passages = material.passages.get(task.source, [])
        items = sources[task.source].items(task) if passages else []
        if why := shortage(task, items):
            refused.append(why)
        else:
            found[task.id] = task, items, passages
    texts: dict[str, int] = {}
    for _, items, passages in sorted(found.values(), key=lambda one: n_balanced(one[1])):
        read = np.array([passages[item.passage].text in texts for item in items])
        for index in np.concatenate(draw(items, 0, read, most)).tolist():
            texts.setdefault(passages[items[index].passage].text, len(texts))
    problems = []
    for task, items, passages in found.values():
        kept = [item for item in items if passages[item.passage].text in texts]
        numbers = [texts[passages[item.passage].text] for item in kept]
        documents = [passages[item.passage].document for item in kept]
        frequency = float(np.mean([item.answer for item in items]))
        problems += [Problem(task, pooling, kept, numbers, documents, frequency) for pooling in task.problems]
    return Plan(problems, list(texts), refused)
