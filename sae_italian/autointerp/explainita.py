"""ExplainITA (EVALITA 2026): read its two data sets and write submission files (docs/explainita.md).

Of task 1's activations the data card does not say whether they are of every token or of the active ones only: both are
read (equal length means every token).
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from sae_italian.autointerp.examples import Example, LatentExamples
from sae_italian.base.errors import DataError, UsageError, nearest
from sae_italian.base.storage import ODD, atomic_path, write_text
from sae_italian.corpora.rows import read_rows

Task = Literal[1, 2]
HUB = "colinglab/EXPLAINITA-task1"
SPLITS = ("train_gold", "train_silver", "test")
ID, HIDDEN = "Latent ID", -1.0
FORMATS = (".jsonl", ".parquet")


class Excerpt(NamedTuple):
    """One example. `strengths` has one value per token (whole numbers 0 to 10 in task 1), None where it is hidden."""

    tokens: tuple[str, ...]
    strengths: Float[np.ndarray, " tokens"] | None
    text: str | None = None  # without marks; task 1 only
    activating: bool | None = None  # task 2 only; None where it is not given


@dataclass(frozen=True, eq=False)
class Latent:
    """One row. An id that the file holds as a number is kept as its digits."""

    id: str
    explanation: str | None
    sequences: tuple[Excerpt, ...]

    @property
    def index(self) -> int:
        """Return the latent's number in the SAE. Raises: DataError when the id does not end in one."""
        found = re.fullmatch(r"(?:.*?latent)?([0-9]{1,9})", self.id)
        if found is None:
            raise DataError(f"latent id {self.id!r:.80} is not of the form layers.14_latent8 or 8.")
        return int(found[1])


def read_split(source: str | Path, task: Task, split: str = "test") -> list[Latent]:
    """Return the rows of one split, from a .parquet or .jsonl file, a folder as on the hub, or the hub's data set itself.

    Raises: UsageError when it is not there, DataError naming the row and field that are not as described.
    """
    latents, read = [], _marked_passage if task == 1 else _raw_passage
    for number, row in enumerate(_rows(source, split)):
        try:
            sequences = tuple(read(example) for example in row["examples"])
            latents.append(Latent(str(row[ID]), row.get("explanation") or None, sequences))
        except ODD as error:
            field = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"row {number} is not as task {task} of ExplainITA describes it: {field}.") from error
    return latents


def _rows(source: str | Path, split: str) -> list[dict[str, Any]]:
    """Return the rows of one split as they are."""
    path = Path(source)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in FORMATS
    if on_hub and not path.parent.is_dir():
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(str(source), repo_type="dataset", allow_patterns=["data/*.parquet"]))
        except Exception as error:  # offline, gated, gone: many classes, one remedy
            raise UsageError(
                f"{source} cannot be fetched from the hub here ({type(error).__name__}). Download it where you can, and "
                "give the folder."
            ) from error
    files = [path]
    if path.is_dir():
        named = [path / f"{split}{ending}" for ending in FORMATS]
        files = sorted(path.glob(f"data/{split}-*.parquet")) or [file for file in named if file.is_file()][:1]
        if not files:
            held = {re.sub(r"-\d+-of-\d+$", "", file.stem) for file in [*path.glob("data/*"), *path.glob("*.*")]}
            raise UsageError(f"{path} has no split {split!r}. {nearest(split, sorted(held) or SPLITS)}")
    elif not path.is_file():
        raise UsageError(f"{path} does not exist; expected a .parquet or .jsonl file, a folder or {HUB}.")
    return [row for file in files for _, row in read_rows(file)]


def _marked_passage(example: dict[str, Any]) -> Excerpt:
    tokens = tuple(example["tokens"])
    listed = [(str(item["token"]), float(item["strength"])) for item in example["activations"]]
    strengths, places = np.zeros(len(tokens)), iter(range(len(tokens)))
    for token, strength in listed:  # of only the active ones each stands at its next occurrence
        here = (i for i in places if len(listed) == len(tokens) or tokens[i].strip() == token.strip())
        if (place := next(here, None)) is None:
            raise ValueError(f"active token {token!r} is not among the tokens")
        strengths[place] = strength
    return Excerpt(tokens, strengths, re.sub(r"<<|>>", "", example["text"]))


def _raw_passage(example: dict[str, Any]) -> Excerpt:
    tokens, values = tuple(example["str_tokens"]), np.asarray(example["activations"], dtype=np.float64)
    if len(values) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens and {len(values)} activations")
    hidden = len(values) > 0 and bool((values == HIDDEN).all())
    activating = example.get("activating")  # a submission's answer stands beside hidden activations
    return Excerpt(tokens, None if hidden else values, None, None if activating is None else bool(activating))


# --- as examples for an explainer or a judge -------------------------------------------------------------------------


def as_examples(latent: Latent) -> LatentExamples:
    """Return a row as our explainers take it: its sequences as training examples, marked from 0.3 of their maximum."""
    shown = tuple(as_example(sequence, mark=True) for sequence in latent.sequences)
    maximum = max((float(example.activations.max(initial=0.0)) for example in shown), default=0.0)
    return LatentExamples(latent.index, maximum, shown, (), ())


def as_example(sequence: Excerpt, *, mark: bool = False) -> Example:
    """Return one sequence; tokens that cannot be found in its text (or that have none) are joined as they are."""
    bare = [token.replace("▁", " ") for token in sequence.tokens]
    text = sequence.text or ""
    if sequence.text is None or (spans := _spans(text, bare)) is None:
        text = _joined(bare)
        spans = _spans(text, bare)
    values = np.zeros(len(bare)) if sequence.strengths is None else sequence.strengths
    marks = (values > 0) & (values >= 0.3 * values.max(initial=0.0)) if mark else None
    positive = bool(values.any()) if sequence.activating is None else sequence.activating
    spans = np.array(spans, dtype=np.int64).reshape(-1, 2)
    return Example(text, spans, np.arange(len(values)), values, "", positive, None, marks)


def _joined(pieces: Sequence[str]) -> str:
    """Return tokens as text: with the spaces they carry, else with one between words."""
    if any(piece.startswith(" ") for piece in pieces):
        return "".join(pieces)
    text = ""
    for piece in pieces:
        tight = not text or text[-1:] in "'’(«" or not piece[:1].isalnum() and piece[:1] not in "«("
        text += piece if tight else f" {piece}"
    return text


def _spans(text: str, tokens: Sequence[str]) -> list[tuple[int, int]] | None:
    """Return the characters at which each token begins and ends, None when one is not found after the one before."""
    spans, place = [], 0
    for bare in map(str.strip, tokens):
        start = text.find(bare, place)
        if start < 0:
            return None
        place = start + len(bare)
        spans.append((start, place))
    return spans


# --- submissions -----------------------------------------------------------------------------------------------------


def write_submission(source: str | Path, out: Path, task: Task, answers: dict[str, Any], split: str = "test") -> None:
    """Write the rows of a split with `answers` by latent id filled in, to .jsonl or .parquet; nothing else changes.

    An answer is a text (task 1), or one yes or no per example (task 2). Raises: UsageError when latents or examples are
    missing or too many, naming the first.
    """
    import pyarrow
    import pyarrow.parquet

    rows = _rows(source, split)
    ids = [str(row[ID]) for row in rows]
    missing, unknown = [name for name in ids if name not in answers], sorted(set(answers) - set(ids))
    if missing or unknown:
        what = f"no answer for {missing[0]}" if missing else f"an answer for {unknown[0]}, which is not there"
        counts = f"({len(missing)}, {len(unknown)})"
        raise UsageError(f"a submission has one answer per latent of {split}: {what} {counts}.")
    for name, row in zip(ids, rows, strict=True):
        if task == 1:
            row["explanation"] = str(answers[name])
        elif len(answers[name]) != len(row["examples"]):
            raise UsageError(f"{name} has {len(row['examples'])} examples and {len(answers[name])} answers.")
        else:
            for example, said in zip(row["examples"], answers[name], strict=True):
                example["activating"] = bool(said)
    check_format(out)
    if out.suffix == ".jsonl":
        write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    with atomic_path(out) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)


def check_format(out: Path) -> None:
    """Raise UsageError for a file that is neither .jsonl nor .parquet."""
    if out.suffix not in FORMATS:
        raise UsageError(f"{out}: a submission is a .jsonl or a .parquet file.")


def by_id(latents: Iterable[Latent]) -> dict[str, Latent]:
    """Return latents by id. Raises: DataError for one that is there twice."""
    found: dict[str, Latent] = {}
    for latent in latents:
        if found.setdefault(latent.id, latent) is not latent:
            raise DataError(f"latent {latent.id} is there twice.")
    return found
