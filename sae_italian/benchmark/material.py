"""The texts of the benchmark, from treebanks, the grammar, corpora, lists, sets of the hub: passages with facts of their words.

A fact is a name and a text (`Gender` Fem, `deprel` obj); tasks are rules about facts (`tasks.py`), so that a new source
brings its tasks as data. Every passage says which side of the split it is on, and to which document it belongs: for a
treebank without documents a run of 20 sentences, because neighbours come from one text.

Sets of the hub are YAML files in data/hub/: where each lies, how a row becomes texts, which tasks it makes. Read are the
Parquet files of the hub's own conversion (`refs/convert/parquet`), never a loader script; the commit is looked up once and
kept with the results. Layouts: the columns of a text, put one after the other; with `choices`, a row is one text for every
choice, right where `answer` says so, or the first; with `span`, it is read at a word; with `words`, at every word.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from sae_italian import micro_italiano
from sae_italian.analysis.tasks import agreement_pairs
from sae_italian.analysis.treebank import FEATURES, Word, read_treebank
from sae_italian.base.errors import DataError, UsageError, check_known
from sae_italian.base.storage import read_yaml
from sae_italian.corpora.catalogue import PREFIX, list_files, open_file
from sae_italian.corpora.stream import MICRO_ITALIANO, iter_documents

SOURCES = ("ud", "micro", "micro-documents", "texts", "pairs", "lexicon")  # that run offline
RUN = 20  # sentences of a treebank that count as one document
MICRO_SEED = 20_000  # of the grammar's documents: no corpus of training has it unless it asks for it
MICRO_DOCUMENTS, MICRO_BEGINNINGS = 600, 600
SENTENCES = 3  # of a beginning
N_PAIRS = 600
FORMS = 3_000  # of the lexicon
GENRE_DOCUMENTS, GENRE_READ = 120, 4_000
WINDOW = 48  # words of a genre's text
MOST_ROWS = 3_000  # of a split of a set of the hub, drawn at random
LETTERS = "ABCDEFGH"  # of the choices of a question
FINAL_MARKS = " .?!…;:»\"'”)"
# What tells a genre without its language: addresses, articles' numbers, years and other figures, mark-up, products.
CONFOUNDS = re.compile(
    r"https?://\S+|www\.\S+|\bArt(\.|icol[oi])\s*\d+\S*|[<{\[][^<>{}\[\]]*[>}\]]|\S*[_/\\|@#`=]\S*|\S*\d\S*"
    r"|\b(Dynamics|Commerce|Microsoft|Debian|HTML|CSS|JavaScript|MDN|API)\b"
)
_CARRIER = "La parola è "


class PlacedWord(NamedTuple):
    """A word: characters start to end (exclusive) of its passage, and its facts."""

    start: int
    end: int
    facts: dict[str, str]


class Passage(NamedTuple):
    """A text that a model reads alone, after a BOS."""

    text: str
    document: str
    test: bool
    facts: dict[str, str]
    words: list[PlacedWord] = []  # noqa: RUF012  # never written to


def stop(text: str) -> int:
    """Return where a sentence ends without its final mark, which a causal model has then not read."""
    return len(text.rstrip(FINAL_MARKS)) or len(text)


def is_test(name: str, one_in: int) -> bool:
    """Return whether a document, a run or a lemma is for test: one in so many, always the same ones."""
    return int.from_bytes(blake2b(name.encode(), digest_size=4).digest()) % one_in == 0


def plainly(text: str) -> str:
    """Return a text without case, marks and accents, so that è and e, and two spellings of a sentence, are one."""
    folded = unicodedata.normalize("NFD", text.lower())
    return re.sub(r"\W+", " ", "".join(c for c in folded if not unicodedata.combining(c))).strip()


def once(passages: Iterable[Passage]) -> list[Passage]:
    """Return passages without copies of one another; of two copies the one for test stays, so that no probe has seen it."""
    found: dict[str, Passage] = {}
    for passage in passages:
        kept = found.setdefault(plainly(passage.text), passage)
        if passage.test and not kept.test:
            found[plainly(passage.text)] = passage
    return list(found.values())


# --- treebanks --------------------------------------------------------------------------------------------------------


def treebank_passages(paths: Sequence[str | Path]) -> list[Passage]:
    """Return the sentences of treebanks.

    The split is that of the files' names where these are UD's, otherwise every fifth run of sentences is for test.
    Raises: as `read_treebank`, for a broken line with file and line.
    """
    found = []
    for path in paths:
        bank = read_treebank(path)
        for index, sentence in enumerate(bank.sentences):
            run = f"{bank.name}/{index // RUN}"
            test = not sentence.train if bank.official else is_test(run, 5)
            facts, words = _sentence_facts(sentence.text, sentence.words)
            found.append(Passage(sentence.text, f"{run}/{'test' if test else 'pool'}", test, facts, words))
    return found


def _sentence_facts(text: str, words: Sequence[Word]) -> tuple[dict[str, str], list[PlacedWord]]:
    rows = {row[0]: row for word in words for row in word.rows}
    children: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for row in rows.values():
        children[row[6]].append(row)
    places, left = [], ""
    for number, word in enumerate(words):
        facts = _word_facts(word.rows, rows, children) | {"form": text[word.start : word.end].lower(), "left": left}
        places.append(PlacedWord(word.start, word.end, facts | {"first": "no" if number else "yes"}))
        left = facts["upos"]
    return _length(sum("PUNCT" not in p.facts["upos"] for p in places), text) | {"depth": str(_depth(rows))}, places


def _word_facts(
    own: Sequence[tuple[str, ...]], rows: Mapping[str, tuple[str, ...]], children: Mapping[str, list[tuple[str, ...]]]
) -> dict[str, str]:
    """Return what CoNLL-U says of a surface word; of its syntactic words the first one counts where they differ."""
    facts: dict[str, str] = {}
    for row in reversed(own):
        facts |= dict(pair.split("=", 1) for pair in row[5].split("|") if row[5] != "_")
    facts |= {"upos": "+".join(row[3] for row in own), "deprel": "+".join(row[7] for row in own)}
    if own:
        first, head = own[0], rows.get(own[0][6])
        under = children[first[0]]
        facts |= {"lemma": first[2].lower(), "head": head[3] if head else "ROOT"}
        facts["place"] = "before" if head and int(first[0]) < int(head[0]) else "after"
        facts["children"] = " ".join(row[7] for row in under)
        facts["after"] = " ".join(row[7] for row in under if int(row[0]) > int(first[0]))
        facts["aux"] = next((row[2] for row in under if row[7] == "aux"), "")
    return facts


def _depth(rows: Mapping[str, tuple[str, ...]]) -> int:
    """Return how many words are on the longest way to the root; a circle, which no tree has, is not followed."""
    deepest = 0
    for row in rows.values():
        seen: set[str] = set()
        while row[6] in rows and row[0] not in seen:
            seen.add(row[0])
            row = rows[row[6]]
        deepest = max(deepest, len(seen) + 1)
    return deepest


def _length(n_words: int, text: str) -> dict[str, str]:
    mark = text[len(text.rstrip(FINAL_MARKS)) :].strip()
    return {"words": str(n_words), "length": str(n_words // 5), "mark": mark}


# --- the grammar --------------------------------------------------------------------------------------------------------


def micro_passages(n: int = MICRO_DOCUMENTS) -> list[Passage]:
    """Return MicroItaliano's sentences with the constructions they hold."""
    found = []
    for document in micro_italiano.documents(n, MICRO_SEED):
        for spans in _sentences(document):
            start, end = spans[0].start, spans[-1].end
            words = [PlacedWord(s.start - start, s.end - start, _micro_facts(s, document)) for s in spans]
            held = [s.labels["construction"] for s in document.constructions if s.start < end and s.end > start]
            text, n_words = document.text[start:end], sum(w.facts["upos"] != "PUNCT" for w in words)
            facts = _length(n_words, text) | {"constructions": " ".join(held)}
            found.append(Passage(text, document.doc_id, is_test(document.doc_id, 3), facts, words))
    return found


def register_passages(n: int = MICRO_BEGINNINGS) -> list[Passage]:
    """Return the first sentences of MicroItaliano's documents with their register."""
    found = []
    for document in micro_italiano.documents(n, MICRO_SEED + 1):
        end = list(_sentences(document))[:SENTENCES][-1][-1].end
        facts, test = {"register": document.register}, is_test(document.doc_id, 2)
        found.append(Passage(document.text[:end], document.doc_id, test, facts))
    return found


def _micro_facts(word: micro_italiano.Span, document: micro_italiano.GoldDocument) -> dict[str, str]:
    features = {name: word.labels[name.lower()] for name in FEATURES if name.lower() in word.labels}
    kept = {key: word.labels[key] for key in ("lemma", "upos", "contracted") if key in word.labels}
    return features | kept | {"form": document.text[word.start : word.end]}


def _sentences(document: micro_italiano.GoldDocument) -> Iterator[list[micro_italiano.Span]]:
    """Yield the words of each sentence: to one that is said belong its closing quote, and who says it after a comma."""
    forms = [document.text[word.start : word.end] for word in document.words]
    first, ended = 0, False
    for end, (form, following) in enumerate(zip(forms, [*forms[1:], ""], strict=True), 1):
        ended = ended if form == "»" else form in (".", "?", "!", "…")
        if not following or (ended and following not in ("»", ",")):
            yield document.words[first:end]
            first = end


# --- corpora, pairs, single words -----------------------------------------------------------------------------------------


def genre_passages(texts: Mapping[str, str], seed: int = 0) -> list[Passage]:
    """Return windows of documents by genre (its corpus), confounds taken out, split by work.

    A work is a value of the column `source`; of a corpus that has fewer than ten, a run of documents.
    """
    found = []
    for genre, corpus in texts.items():
        documents = list(islice(iter_documents(corpus), GENRE_READ))
        works = {document.source for document in documents}
        chosen = Random(f"{genre}/{seed}").sample(range(len(documents)), min(GENRE_DOCUMENTS, len(documents)))
        for number in chosen:
            words = CONFOUNDS.sub(" ", documents[number].text).split()
            middle = max(0, (len(words) - WINDOW) // 2)
            work = f"{genre}/{documents[number].source if len(works) >= 10 else number // RUN}"
            if len(words) >= WINDOW:
                text = " ".join(words[middle : middle + WINDOW])
                found.append(Passage(text, work, is_test(work, 3), {"genre": genre, **_length(WINDOW, text)}))
    return found


def pair_passages(n: int = N_PAIRS, seed: int = 0) -> list[Passage]:
    """Return minimal pairs, right and wrong; the deciding word is the last, and a pair is one document."""
    made = [("kind", pair.kind, pair.right, pair.wrong) for pair in agreement_pairs(n, seed=MICRO_SEED + seed)]
    for pair in micro_italiano.agreement_pairs(n // 2, MICRO_SEED + seed):
        made.append(("micro", pair.kind, f"{pair.prefix} {pair.right}", f"{pair.prefix} {pair.wrong}"))
    found = []
    for number, (group, kind, right, wrong) in enumerate(made):
        for answer, text in (("yes", right), ("no", wrong)):
            name = f"pair/{group}/{number}"
            found.append(Passage(text, name, is_test(name, 3), {group: kind, "right": answer}))
    return found


def lexicon_passages(passages: Iterable[Passage]) -> list[Passage]:
    """Return each form of the passages once, as «La parola è X», unless its part of speech, gender or number varies."""
    seen: dict[str, list[dict[str, str]]] = defaultdict(list)
    for word in (word for passage in passages for word in passage.words):
        seen[word.facts.get("form", "").lower()].append(word.facts)
    found = []
    for form, uses in sorted(seen.items()):
        names = ("upos", "Gender", "Number", "VerbForm", "lemma")
        facts = {name: uses[0][name] for name in names if name in uses[0]}
        same = all(use.get(name) == uses[0].get(name) for use in uses for name in names[:3])
        if same and form.isalpha() and len(form) > 2 and facts.get("upos") in ("NOUN", "VERB", "ADJ", "ADV"):
            facts |= {"form": form, "letter": plainly(form)[:1]}
            name = f"lemma/{facts.get('lemma', form)}"
            place = PlacedWord(len(_CARRIER), len(_CARRIER) + len(form), facts)
            found.append(Passage(_CARRIER + form, name, is_test(name, 3), {}, [place]))
    return Random(0).sample(found, min(FORMS, len(found)))


# --- sets of the hub ----------------------------------------------------------------------------------------------------


HubSet = dict[str, Any]
NO_LAYOUT: HubSet = dict.fromkeys(("answer", "words", "tags", "group"), "")
NO_LAYOUT |= {"text": [], "choices": [], "span": [], "first": 0}


def hub_sets() -> dict[str, HubSet]:
    """Return the sets by name, as their YAML files describe them."""
    files = sorted(Path(__file__).parent.glob("data/hub/*.yaml"))
    return {file.stem: NO_LAYOUT | read_yaml(file) for file in files}


def read_set(name: str, one: HubSet) -> tuple[list[Passage], str]:
    """Return a set's passages and the commit they are of.

    Raises: UsageError as `list_files`; DataError for a column that is not there, naming those that are.
    """
    import pyarrow.parquet

    found: list[Passage] = []
    commit = ""
    for split, pattern in one["files"].items():
        commit, sizes = list_files({"hub": one["hub"], "revision": "refs/convert/parquet", "files": [pattern]}, name)
        rows: list[dict[str, Any]] = []
        for path in sizes:
            with open_file(f"{PREFIX}{one['hub']}@{commit}/{path}") as handle:
                rows += pyarrow.parquet.read_table(handle).to_pylist()
        for number, row in enumerate(Random(0).sample(rows, min(MOST_ROWS, len(rows)))):
            group = f"{name}/{row[one['group']]}" if row.get(one["group"]) is not None else f"{name}/{split}/{number}"
            test = is_test(group, 3) if len(one["files"]) == 1 else split == "test"
            found += _of_row(name, one, row, group, test)
    return found, commit


def _of_row(name: str, one: HubSet, row: Mapping[str, Any], group: str, test: bool) -> Iterator[Passage]:
    """Yield what a row becomes."""
    columns = [one[name] for name in ("answer", "words", "tags", "group") if one[name]]
    needed = {*one["text"], *one["choices"], *one["span"], *columns}
    if missing := sorted(needed - row.keys()):
        raise DataError(
            f"{name} of the hub has no column {missing[0]!r}; it has {', '.join(row)}. Its layout has changed."
        )
    text = " ".join(str(row[column]).strip() for column in one["text"])
    if one["words"]:
        ends = (np.cumsum([len(word) + 1 for word in row[one["words"]]]) - 1).tolist()
        tagged = zip(row[one["words"]], row[one["tags"]], ends, strict=True)
        words = [PlacedWord(end - len(w), end, {"tag": str(tag), "form": w}) for w, tag, end in tagged]
        yield Passage(" ".join(row[one["words"]]), group, test, {}, words)
    elif one["choices"]:
        # the place of the right one, a number or a letter
        answer = str(row.get(one["answer"], one["first"])).strip().upper()
        right = LETTERS.index(answer) if answer in LETTERS else int(answer) - one["first"]
        for i, column in enumerate(one["choices"]):
            if row[column]:
                whole = f"{text} {row[column]}" if text else str(row[column])
                yield Passage(whole, group, test, {"right": "yes" if i == right else "no"})
    else:
        facts = {key: str(int(value) if isinstance(value, bool) else value) for key, value in row.items()}
        # a word is of the last text, which all texts together end with, its outer blanks taken off
        start = len(text) - len(str(row[one["text"][-1]]).rstrip())
        at = [start + int(row[column]) for column in one["span"]]
        words = [PlacedWord(at[0], at[1], facts)] if at else []
        yield Passage(text, group, test, facts, words)


# --- all of them -----------------------------------------------------------------------------------------------------


class Material(NamedTuple):
    """Passages by source, the corpora they come from, and how many sentences were left out as copies."""

    passages: dict[str, list[Passage]]
    corpora: dict[str, list[str]]
    n_copies: int = 0


def without_copies(made: Mapping[str, list[Passage]], corpora: dict[str, list[str]]) -> Material:
    """Return the passages of sources, those of each without copies of one another."""
    # of the lexicon each word is there once, and «è» and «e» are words apart
    kept = {name: some if name == "lexicon" else once(some) for name, some in made.items()}
    return Material(kept, corpora, sum(len(made[name]) - len(some) for name, some in kept.items()))


def gather(
    treebanks: Sequence[str] = (),
    texts: Mapping[str, str] | None = None,
    seed: int = 0,
    sources: Collection[str] = SOURCES,
) -> Material:
    """Return the passages of sources that run offline: treebanks and corpora as they are given, grammar and lists always."""
    check_known("source", SOURCES, *sources)
    if len(texts or {}) == 1:
        raise UsageError("one corpus has no genres to tell apart; give two or more: --texts NAME=CORPUS NAME=CORPUS.")
    banks, micro = treebank_passages(treebanks), micro_passages()
    made = {
        "ud": banks,
        "micro": micro,
        "micro-documents": register_passages(),
        "texts": genre_passages(texts or {}, seed),
        "pairs": pair_passages(seed=seed),
        "lexicon": lexicon_passages([*once(banks), *micro]),
    }
    corpora = {"ud": list(map(str, treebanks)), "texts": list((texts or {}).values())}
    corpora |= dict.fromkeys(("micro", "micro-documents"), [MICRO_ITALIANO])
    return without_copies({name: some for name, some in made.items() if name in sources}, corpora)


def gather_hub(names: Collection[str]) -> tuple[Material, list[str]]:
    """Return the passages of sets of the hub, and why others could not be read. Raises: UsageError when none could."""
    passages, corpora, failed = {}, {}, []
    for name in names:
        try:
            passages[name], commit = read_set(name, hub_sets()[name])
            corpora[name] = [f"{PREFIX}{hub_sets()[name]['hub']}@{commit}"]
        except (UsageError, FileNotFoundError) as error:
            failed.append(f"{name}: {error}")
    if not passages:
        raise UsageError(f"no set of the hub could be read. {failed[0] if failed else 'None was asked for.'}")
    return without_copies(passages, corpora), failed
