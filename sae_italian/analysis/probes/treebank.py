"""Annotated words with their place in the text: a reader of CoNLL-U, and MicroItaliano in the same form.

The unit is the surface token. "della" (di + la) is one, and bears the labels of both its words, because a language model
reads "della" too. Words are placed in the sentence's text, so any tokenizer's tokens can be aligned by their offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sae_italian import micro_italiano
from sae_italian.base.errors import DataError, UsageError
from sae_italian.corpora.stream import MICRO_ITALIANO, is_held_out

FEATURES = ("Gender", "Number", "Person", "Tense", "Mood", "VerbForm")
COMBINED = (("Gender", "Number"), ("Person", "Number"), ("Mood", "Tense"))
MICRO_DOCUMENTS = 600
_COLUMNS = 10
_TRAIN, _TEST = ("-train", "-dev"), "-test"


class Word(NamedTuple):
    """A surface token: characters start to end (exclusive) of its sentence's text, and what it is."""

    start: int
    end: int
    labels: frozenset[str]


class Sentence(NamedTuple):
    text: str
    words: list[Word]
    train: bool  # one of those that choose latents and fit probes, not one of those that judge


class Treebank(NamedTuple):
    name: str  # UD ISDT
    sentences: list[Sentence]


def category(label: str) -> str:
    """Return UPOS, Gender, Gender+Number, ... of a label such as Gender=Fem,Number=Plur."""
    return "+".join(part.split("=")[0] for part in label.split(","))


def read_treebank(path: str | Path) -> Treebank:
    """Return a treebank: a CoNLL-U file, a folder of them, or `micro-italiano`.

    Files named as UD names them say what is for training (-train, -dev) and for test (-test); otherwise a tenth of
    the sentences, and of MicroItaliano every other document, is for test.
    Raises: UsageError when there is no such file, DataError for a broken line, naming file and line.
    """
    if str(path) == MICRO_ITALIANO:
        return Treebank("MicroItaliano", [_micro(i) for i in range(MICRO_DOCUMENTS)])
    path = Path(path)
    files = sorted(path.glob("*.conllu")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        what = "holds no file ending in .conllu" if path.is_dir() else "does not exist"
        raise UsageError(f"treebank {path} {what}. Give a CoNLL-U file or a folder of them, e.g. UD_Italian-ISDT.")
    official = any(_TEST in file.name for file in files) and any(t in f.name for f in files for t in _TRAIN)
    sentences = []
    for file in files:
        for text, words in read_conllu(file):
            train = _TEST not in file.name if official else not _for_test(text)
            sentences.append(Sentence(text, words, train))
    if not sentences:
        raise DataError(f"treebank {path} holds no sentence.")
    return Treebank(_name(path), sentences)


def _name(path: Path) -> str:
    """Return UD ISDT for .../UD_Italian-ISDT, .../ISDT or .../it_isdt-ud-test.conllu, else the name as it is."""
    name = path.name.removesuffix(".conllu")
    if path.is_dir():
        return "UD " + name.split("-")[-1]
    return "UD " + name.split("-ud-")[0].split("_")[-1].upper() if "-ud-" in name else name


def _for_test(text: str) -> bool:
    return any(is_held_out(f"{text}{salt}") for salt in ("", " "))  # each holds out one in twenty


def _micro(index: int) -> Sentence:
    document = micro_italiano.document(index)
    names = {feature.lower(): feature for feature in FEATURES}
    words = []
    for span in document.words:
        features = {names[key]: value for key, value in span.labels.items() if key in names}
        words.append(Word(span.start, span.end, frozenset(_labels(span.labels.get("upos", "X"), features))))
    return Sentence(document.text, words, index % 2 == 0)


def _labels(upos: str, features: dict[str, str]) -> Iterator[str]:
    """Yield the labels of one word: part of speech, each feature, and features that belong together."""
    yield f"UPOS={upos}"
    for name in FEATURES:
        if name in features:
            yield f"{name}={features[name]}"
    for names in COMBINED:
        if all(name in features for name in names):
            yield ",".join(f"{name}={features[name]}" for name in names)


# --- CoNLL-U ---------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    line: int
    first: int  # word ids: the same for a word, a range for a multi-word token
    last: int
    form: str
    labels: tuple[str, ...]
    space_after: bool


def read_conllu(file: Path) -> Iterator[tuple[str, list[Word]]]:
    """Yield text and surface words of each sentence.

    Raises: DataError naming file and line: a row without ten columns, an id out of order, a feature without a value, a
    form that is not in the sentence's text, bytes that are not UTF-8.
    """
    text, rows = "", []
    try:
        with file.open(encoding="utf-8") as handle:
            for number, line in enumerate(handle, 1):
                line = line.rstrip("\r\n")
                if line.startswith("#"):
                    if line.startswith("# text ="):
                        text = line.partition("=")[2].strip()
                elif line:
                    rows += _row(file, number, line)
                elif rows:
                    yield _sentence(file, text, rows)
                    text, rows = "", []
            if rows:
                yield _sentence(file, text, rows)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}).") from error


def _row(file: Path, number: int, line: str) -> list[_Row]:
    """Return the row, none for an empty node (8.1), which has no surface."""
    columns = line.split("\t")
    if len(columns) != _COLUMNS or not all(columns):
        found = f"{len(columns)} columns" if len(columns) != _COLUMNS else "an empty column"
        raise DataError(f"{file}, line {number}: {found}; CoNLL-U has {_COLUMNS}, separated by tabs, none empty.")
    identifier, form, upos, features, misc = columns[0], columns[1], columns[3], columns[5], columns[9]
    if "." in identifier:
        return []
    first, _, last = identifier.partition("-")
    if not (first.isdigit() and (last or first).isdigit()) or int(last or first) < int(first):
        raise DataError(f"{file}, line {number}: {identifier!r} is no word id; 3, 3-4 or 3.1 was expected.")
    pairs = {}
    for pair in features.split("|") if features != "_" else ():
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise DataError(f"{file}, line {number}: feature {pair!r} is not of the form Name=Value.")
        pairs[name] = value
    labels = () if last else tuple(_labels(upos, pairs))
    return [_Row(number, int(first), int(last or first), form, labels, "SpaceAfter=No" not in misc.split("|"))]


def _sentence(file: Path, text: str, rows: list[_Row]) -> tuple[str, list[Word]]:
    """Place the surface tokens in the text, which is put together from them where the file does not give it."""
    surface: list[_Row] = []
    labels: list[set[str]] = []
    expected, covered = 1, 0
    for row in rows:
        if row.first != expected or (row.last > row.first and row.first <= covered):
            raise DataError(f"{file}, line {row.line}: word {row.first} where word {expected} was expected.")
        multi = row.last > row.first
        if multi or row.first > covered:
            surface.append(row)
            labels.append(set())
            covered = row.last
        if not multi:
            labels[-1].update(row.labels)
            expected += 1
    if covered >= expected:
        raise DataError(f"{file}, line {rows[-1].line}: the sentence ends before word {covered} of a multi-word token.")
    text = text or "".join(row.form + " " * row.space_after for row in surface).strip()
    words, place = [], 0
    for row, found in zip(surface, labels, strict=True):
        start = text.find(row.form, place)
        if start < 0 or text[place:start].strip():
            raise DataError(f"{file}, line {row.line}: {row.form!r} does not come next in the sentence's text.")
        place = start + len(row.form)
        words.append(Word(start, place, frozenset(found)))
    return text, words
