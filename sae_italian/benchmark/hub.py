"""Italian sets of the hub, each a YAML file in data/hub/: where it lies, how a row becomes texts, which tasks it makes.

Read are the Parquet files of the hub's own conversion (`refs/convert/parquet`), never a loader script; the commit is looked
up once and kept with the results. Layouts: the columns of a text, put one after the other; with `choices`, a row is one
text for every choice; with `pair`, a right and a wrong one; with `span`, it is read at a word; with `words`, at every word.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from pydantic import BaseModel

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import read_yaml
from sae_italian.benchmark.material import Material, Passage, PlacedWord, is_test, without_copies
from sae_italian.benchmark.tasks import ProbingTask, read_tasks
from sae_italian.corpora.catalogue import PREFIX, Route, list_files, open_file

FAMILY = "hub"
LEAST_ROWS = 50  # balanced examples of a class on a side
MOST_ROWS = 3_000  # of a split, drawn at random
LETTERS = "ABCDEFGH"


class HubSet(BaseModel, extra="forbid", frozen=True):
    """One set as its YAML file describes it."""

    hub: str
    files: dict[str, str]
    text: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    answer: str = ""
    first: int = 0
    pair: tuple[str, ...] = ()
    span: tuple[str, ...] = ()
    words: str = ""
    tags: str = ""
    group: str = ""
    tasks: list[dict[str, Any]]


def hub_sets() -> dict[str, HubSet]:
    """Return the sets by name."""
    return {file.stem: HubSet(**read_yaml(file)) for file in sorted(Path(__file__).parent.glob("data/hub/*.yaml"))}


def hub_tasks() -> list[ProbingTask]:
    """Return the tasks of all sets; a set's passages are the source of its name."""
    shared = {"family": FAMILY, "unit": "text", "least": LEAST_ROWS}
    sets = ({**shared, "source": name, "tasks": one.tasks} for name, one in hub_sets().items())
    return [task for one in sets for task in read_tasks(one)]


def gather_hub(names: Collection[str]) -> tuple[Material, list[str]]:
    """Return the passages of sets, and why others could not be read. Raises: UsageError when none could."""
    passages, corpora, failed = {}, {}, []
    for name in names:
        try:
            passages[name], commit = read_set(name, hub_sets()[name])
            corpora[name] = [f"{PREFIX}{hub_sets()[name].hub}@{commit}"]
        except (UsageError, FileNotFoundError) as error:
            failed.append(f"{name}: {error}")
    if not passages:
        raise UsageError(f"no set of the hub could be read. {failed[0] if failed else 'None was asked for.'}")
    return without_copies(passages, corpora), failed


def read_set(name: str, one: HubSet) -> tuple[list[Passage], str]:
    """Return a set's passages and the commit they are of.

    Raises: UsageError as `list_files`; DataError for a column that is not there, naming those that are.
    """
    import pyarrow.parquet

    found: list[Passage] = []
    commit = ""
    for split, pattern in one.files.items():
        commit, sizes = list_files(Route(hub=one.hub, revision="refs/convert/parquet", files=(pattern,)), name)
        rows: list[dict[str, Any]] = []
        for path in sizes:
            with open_file(f"{PREFIX}{one.hub}@{commit}/{path}") as handle:
                rows += pyarrow.parquet.read_table(handle).to_pylist()
        rows = Random(0).sample(rows, min(MOST_ROWS, len(rows)))
        for number, row in enumerate(rows):
            group = f"{name}/{row[one.group]}" if row.get(one.group) is not None else f"{name}/{split}/{number}"
            test = is_test(group, 3) if len(one.files) == 1 else split == "test"
            found += _passages(name, one, row, group, test)
    return found, commit


def _passages(name: str, one: HubSet, row: Mapping[str, Any], group: str, test: bool) -> Iterator[Passage]:
    """Yield what a row becomes."""
    needed = {*one.text, *one.choices, *one.pair, *one.span, one.answer, one.words, one.tags, one.group} - {""}
    if missing := sorted(needed - row.keys()):
        raise DataError(
            f"{name} of the hub has no column {missing[0]!r}; it has {', '.join(row)}. Its layout has changed."
        )
    if one.words:
        yield _tagged(row[one.words], row[one.tags], group, test)
        return
    if one.pair:
        for column, right in zip(one.pair, ("yes", "no"), strict=True):
            yield Passage(str(row[column]), group, test, {"right": right})
        return
    text = " ".join(str(row[column]).strip() for column in one.text)
    facts = {key: str(int(value) if isinstance(value, bool) else value) for key, value in row.items()}
    if one.choices:
        answer = str(row[one.answer]).strip().upper()  # of the right choice its place, as a number or as a letter
        right = LETTERS.index(answer) if answer in LETTERS else int(answer) - one.first
        for i, column in enumerate(one.choices):
            if row[column]:
                yield Passage(f"{text} {row[column]}", group, test, {"right": "yes" if i == right else "no"})
        return
    words = []
    if one.span:  # of the word in the last text, which all texts together end with, its outer blanks taken off
        start = len(text) - len(str(row[one.text[-1]]).rstrip())
        first, last = (start + int(row[column]) for column in one.span)
        words = [PlacedWord(first, last, facts)]
    yield Passage(text, group, test, facts, words)


def _tagged(words: Sequence[str], tags: Sequence[Any], group: str, test: bool) -> Passage:
    placed, text = [], ""
    for word, tag in zip(words, tags, strict=True):
        start = len(text) + bool(text)
        text = f"{text} {word}" if text else word
        placed.append(PlacedWord(start, len(text), {"tag": str(tag), "form": word}))
    return Passage(text, group, test, {}, placed)
