"""Minimal pairs of Italian agreement: generated for gender, number and subject-verb, or read in MultiBLiMP's layout.

Each pair is two texts of which the first is right; a model is right when it finds that one likelier as a whole, as in
BLiMP (Warstadt et al. 2020) and MultiBLiMP (Jumelet et al. 2025, arXiv 2504.02768).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml

from sae_italian.analysis.tasks.scoring import TaskScore, score_choices
from sae_italian.base.errors import DataError, UsageError

KINDS = ("gender", "gender, attractor", "number", "subject-verb", "subject-verb, attractor")
TRIES = 50  # subjects made for each that is wanted
_THE = (("il", "i"), ("la", "le"))  # [gender][number]
_TO_THE = (("al", "ai"), ("alla", "alle"))
_THIS = (("questo", "questi"), ("questa", "queste"))


class MinimalPair(NamedTuple):
    """Two texts, the right one and one with a single wrong form; `kind` is what the forms must agree in."""

    right: str
    wrong: str
    kind: str


@lru_cache(maxsize=1)
def _words() -> tuple[list[list[list[str]]], list[list[str]], list[list[str]]]:
    """Return nouns [gender][noun][number], adjectives [adjective][2 * gender + number] and verbs [verb][number]."""
    data = yaml.safe_load((files("sae_italian.analysis.tasks") / "data" / "agreement.yaml").read_text(encoding="utf-8"))
    nouns = [[entry.split() for entry in data["nouns"][gender].split(",")] for gender in ("Masc", "Fem")]
    adjectives, verbs = ([entry.split() for entry in data[key].split(",")] for key in ("adjectives", "verbs"))
    return nouns, adjectives, verbs


def agreement_pairs(n: int, *, seed: int = 0) -> list[MinimalPair]:
    """Return `n` pairs, the kinds in turn, each right form as often the wrong one of another pair.

    An attractor is a noun between subject and target that bears the wrong feature: «il libro vicino alle penne è».
    Raises: UsageError unless n is at least 1.
    """
    if n < 1:
        raise UsageError(f"the number of pairs is {n}; it must be 1 or more.")
    return [_pair(Random(f"agreement/{seed}/{i}"), KINDS[i % len(KINDS)], side=i // len(KINDS) % 2) for i in range(n)]


def _pair(random: Random, kind: str, side: int) -> MinimalPair:
    """Return a pair of the kind; `side` 0 has the masculine or the singular right, 1 the other."""
    nouns, adjectives, verbs = _words()
    about_gender = kind.startswith("gender")
    gender = side if about_gender else random.randrange(2)
    number = random.randrange(2) if about_gender else side
    noun = random.choice(nouns[gender])
    subject = f"{_THE[gender][number]} {noun[number]}"
    if kind.endswith("attractor"):
        other_gender = 1 - gender if about_gender else random.randrange(2)
        other_number = number if about_gender else 1 - number
        subject += f" {_beside(random, noun, other_gender, other_number)}"
    if kind == "number":
        forms = noun[number], noun[1 - number]
        prefix = f"{random.choice((_THE, _THIS))[gender][number]}"
    elif about_gender:
        adjective, verb = random.choice(adjectives), random.choice(verbs)
        forms = adjective[2 * gender + number], adjective[2 * (1 - gender) + number]
        prefix = f"{subject} {verb[number]}"
    else:
        verb = random.choice(verbs)
        forms, prefix = (verb[number], verb[1 - number]), subject
    prefix = prefix[0].upper() + prefix[1:]
    return MinimalPair(f"{prefix} {forms[0]}", f"{prefix} {forms[1]}", kind)


def _beside(random: Random, noun: list[str], gender: int, number: int) -> str:
    """Return «vicino alle penne», with another noun than the given one."""
    between = random.choice([other for other in _words()[0][gender] if other != noun])
    return f"vicino {_TO_THE[gender][number]} {between[number]}"


def number_pairs(n: int, tokenizer: Any, *, seed: int = 0) -> list[tuple[str, str]]:
    """Return `n` pairs of subjects that differ in number alone and have equally many tokens, to patch one into the other.

    «Il libro vicino alle penne» against «I libri vicino alle penne»: what follows is a verb in the number of the first
    noun, over an attractor of either number. Singular and plural take turns as the base.
    Raises: UsageError when too few nouns have as many tokens in both numbers.
    """
    found: list[tuple[str, str]] = []
    for attempt in range(TRIES * n):
        random = Random(f"number/{seed}/{attempt}")
        gender, other_gender, other_number = (random.randrange(2) for _ in range(3))
        noun = random.choice(_words()[0][gender])
        ending = _beside(random, noun, other_gender, other_number)
        singular, plural = (f"{_THE[gender][number].capitalize()} {noun[number]} {ending}" for number in range(2))
        if len(tokenizer(singular).input_ids) == len(tokenizer(plural).input_ids):
            found.append((plural, singular) if len(found) % 2 else (singular, plural))
        if len(found) == n:
            return found
    raise UsageError(
        f"{len(found)} of {TRIES * n} subjects have as many tokens in both numbers, {n} wanted. Ask for fewer."
    )


def read_minimal_pairs(path: Path) -> list[MinimalPair]:
    """Return the pairs of a file in MultiBLiMP's layout: columns `sen`, `wrong_sen` and, where it has it, `phenomenon`.

    The file is the tab-separated one of the hub or of the authors' pipeline (`ita.tsv`), or the same as Parquet or JSON
    lines. Raises: UsageError for a missing file or another ending, DataError, naming the line, for a column that is not
    there or a pair that is empty or no pair.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file. Give MultiBLiMP's Italian file (ita.tsv).")
    pairs = []
    for line, row in _rows(path):
        if missing := {"sen", "wrong_sen"} - set(row):
            raise DataError(
                f"{path} has no column {', '.join(sorted(missing))}; it has {', '.join(map(str, list(row)[:8]))}. "
                "MultiBLiMP's layout was expected."
            )
        right, wrong = row["sen"] or "", row["wrong_sen"] or ""
        if not right.strip() or not wrong.strip() or right == wrong:
            raise DataError(f"{path}, line {line}: two different sentences were expected, found {right!r}, {wrong!r}.")
        pairs.append(MinimalPair(right, wrong, str(row.get("phenomenon") or "agreement")))
    if not pairs:
        raise DataError(f"{path} holds no pairs.")
    return pairs


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, columns) of a file by its ending."""
    if path.suffix == ".tsv":
        with path.open(encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle, delimiter="\t")
            yield from ((reader.line_num, row) for row in reader)
    elif path.suffix == ".jsonl":
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                yield line, dict(json.loads(text))
            except ValueError as error:
                raise DataError(f"{path}, line {line}: not a JSON object ({error}).") from error
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
    else:
        raise UsageError(f"{path.name} ends in {path.suffix or 'nothing'}; .tsv, .jsonl or .parquet was expected.")


def agreement_score(model: Any, tokenizer: Any, pairs: Sequence[MinimalPair]) -> TaskScore:
    """Return the share of pairs whose right text the model finds likelier as a whole, and the mean difference."""
    return score_choices(model, tokenizer, [("", pair.right, pair.wrong, pair.kind) for pair in pairs])
