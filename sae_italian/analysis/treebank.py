"""Annotated words with their place in the text, and as a model and an SAE see them: labels, activations, latents.

The unit is the surface token. "della" (di + la) is one, and bears the labels of both its words, because a language model
reads "della" too. Words are placed in the sentence's text, so any tokenizer's tokens can be aligned by their offsets.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae_italian import micro_italiano
from sae_italian.analysis.latent import codes
from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.pace import paced
from sae_italian.base.storage import path_of
from sae_italian.corpora.packing import bos_id, tokenise
from sae_italian.corpora.stream import MICRO_ITALIANO, is_held_out
from sae_italian.models.activations import read_activations

FEATURES = ("Gender", "Number", "Person", "Tense", "Mood", "VerbForm")
COMBINED = (("Gender", "Number"), ("Person", "Number"), ("Mood", "Tense"))
MICRO_DOCUMENTS = 600
SECOND_WORDS = {"contracted": "DET", "clitic": "PRON"}  # of «della» and «vederla», in MicroItaliano's words
THRESHOLDS = (0.0, 0.25, 0.5)  # of a latent's maximum, above which it says yes
_COLUMNS = 10
TOKENS_PER_BATCH = 2048
CHUNK = 1024  # words encoded at once


class Word(NamedTuple):
    """A surface token: characters start to end (exclusive) of its sentence's text, and what it is."""

    start: int
    end: int
    labels: frozenset[str]
    rows: tuple[tuple[str, ...], ...] = ()  # CoNLL-U's columns of its syntactic words: of "della", of di and of la


class Sentence(NamedTuple):
    text: str
    words: list[Word]
    train: bool  # one of those that choose latents and fit probes, not one of those that judge


class Treebank(NamedTuple):
    name: str  # UD ISDT
    sentences: list[Sentence]
    official: bool = False  # the files' names say what is for test


def category(label: str) -> str:
    """Return UPOS, Gender, Gender+Number, ... of a label such as Gender=Fem,Number=Plur."""
    return "+".join(part.split("=")[0] for part in label.split(","))


def read_treebank(path: str | Path) -> Treebank:
    """Return a treebank: a CoNLL-U file, a folder of them, `ISDT` for the folder UD_Italian-ISDT, or `micro-italiano`.

    Files named as UD names them say what is for training (-train, -dev) and for test (-test); otherwise a tenth of
    the sentences, and of MicroItaliano every other document, is for test.
    Raises: UsageError when there is no such file, DataError for a broken line, naming file and line.
    """
    if str(path) == MICRO_ITALIANO:
        return micro_treebank(MICRO_DOCUMENTS)
    path = path if (path := path_of(path)).exists() else next(iter(path.parent.glob(f"UD_Italian-{path.name}")), path)
    files = sorted(path.glob("*.conllu")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        what = "holds no file ending in .conllu" if path.is_dir() else "does not exist"
        raise UsageError(
            f"treebank {path} {what}. Give a CoNLL-U file or a folder of them, e.g. UD_Italian-ISDT (git clone "
            "https://github.com/UniversalDependencies/UD_Italian-ISDT), then also spelled ISDT."
        )
    names = " ".join(file.name for file in files)
    official = "-test" in names and ("-train" in names or "-dev" in names)
    sentences = []
    for file in files:
        for text, words in read_conllu(file):
            # each call holds out one in twenty
            train = "-test" not in file.name if official else not (is_held_out(text) or is_held_out(f"{text} "))
            sentences.append(Sentence(text, words, train))
    if not sentences:
        raise DataError(f"treebank {path} holds no sentence.")
    return Treebank(_name(path), sentences, official)


def _name(path: Path) -> str:
    """Return UD ISDT for .../UD_Italian-ISDT, .../ISDT or .../it_isdt-ud-test.conllu, else the name as it is."""
    name = path.name.removesuffix(".conllu")
    if path.is_dir():
        return "UD " + name.split("-")[-1]
    return "UD " + name.split("-ud-")[0].split("_")[-1].upper() if "-ud-" in name else name


def micro_treebank(n_documents: int, seed: int = 0) -> Treebank:
    """Return MicroItaliano's first documents, half of them in training."""
    sentences = []
    for index in range(n_documents):
        document, words = micro_italiano.document(index, seed), []
        for span in document.words:
            features = {name: span.labels[name.lower()] for name in FEATURES if name.lower() in span.labels}
            upos = [span.labels.get("upos", "X"), *(own for name, own in SECOND_WORDS.items() if name in span.labels)]
            words.append(Word(span.start, span.end, frozenset().union(*(_labels(each, features) for each in upos))))
        sentences.append(Sentence(document.text, words, index % 2 == 0))
    return Treebank("MicroItaliano", sentences)


def _labels(upos: str, features: dict[str, str]) -> frozenset[str]:
    """Return the labels of one word: part of speech, each feature, and features that belong together."""
    groups = [names for names in (*zip(FEATURES), *COMBINED) if all(name in features for name in names)]
    return frozenset([f"UPOS={upos}", *(",".join(f"{name}={features[name]}" for name in names) for names in groups)])


# --- CoNLL-U ---------------------------------------------------------------------------------------------------------


def read_conllu(file: Path) -> Iterator[tuple[str, list[Word]]]:
    """Yield text and surface words of each sentence.

    Raises: DataError naming file and line: a row without ten columns, an id out of order, a feature without a value, a
    form that is not in the sentence's text, bytes that are not UTF-8.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}).") from error
    text, rows = "", []
    for number, line in enumerate([*lines, ""], 1):  # an empty line ends a sentence
        if line.startswith("# text ="):
            text = line.partition("=")[2].strip()
        elif line and not line.startswith("#"):
            rows.append((f"{file}, line {number}", line))
        elif rows and not line:
            yield _sentence(text, rows)
            text, rows = "", []


def _row(where: str, line: str) -> tuple[range, str, str, Word]:
    """Return a row's word ids (none for an empty node, several for a multi-word token), its form, what follows, its word."""
    columns = line.split("\t")
    if len(columns) != _COLUMNS or not all(columns):
        found = f"{len(columns)} columns" if len(columns) != _COLUMNS else "an empty column"
        raise DataError(f"{where}: {found}; CoNLL-U has {_COLUMNS}, separated by tabs, none empty.")
    identifier, form, _, upos, _, features, *_, misc = columns
    numbers = re.fullmatch("([0-9]{1,9})(?:-([0-9]{1,9}))?", identifier)
    ids = range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1) if numbers else range(0)
    if not ids and "." not in identifier:
        raise DataError(f"{where}: {identifier[:40]!r} is no word id; 3, 3-4 or 3.1 was expected.")
    pairs = [pair.partition("=") for pair in features.split("|") if features != "_"]
    for name, _, value in pairs:
        if not (name and value):
            raise DataError(f"{where}: feature {name!r} is not of the form Name=Value.")
    space = "" if "SpaceAfter=No" in misc.split("|") else " "
    alone = Word(0, 0, _labels(upos, {name: value for name, _, value in pairs}), (tuple(columns),))
    return ids, form, space, alone if len(ids) == 1 else Word(0, 0, frozenset())


def _sentence(text: str, rows: Sequence[tuple[str, str]]) -> tuple[str, list[Word]]:
    """Place the surface tokens in the text, which is put together from them where the file does not give it."""
    surface, words = [], []
    expected, covered = 1, 0
    for where, (ids, form, space, word) in ((where, _row(where, line)) for where, line in rows):
        if not ids:
            continue
        if ids[0] != expected or (len(ids) > 1 and expected <= covered):
            raise DataError(f"{where}: word {ids[0]} where word {expected} was expected.")
        if ids[0] > covered:
            surface.append((where, form, space))
            words.append(word)
            covered = ids[-1]
        else:  # a word of a multi-word token
            own = words[-1]
            words[-1] = own._replace(labels=own.labels | word.labels, rows=own.rows + word.rows)
        expected += len(ids) == 1
    if covered >= expected:
        raise DataError(f"{rows[-1][0]}: the sentence ends before word {covered} of a multi-word token.")
    text, place = text or "".join(form + space for _, form, space in surface).strip(), 0
    for number, (where, form, _) in enumerate(surface):
        start = text.find(form, place)
        if start < 0 or text[place:start].strip():
            raise DataError(f"{where}: {form!r} does not come next in the sentence's text.")
        place = start + len(form)
        words[number] = words[number]._replace(start=start, end=place)
    return text, words


# --- as a model sees them ---------------------------------------------------------------------------------------------


class Words(NamedTuple):
    """Words of one treebank. A word is read at the token that completes it: a causal model knows it only there."""

    source: str
    names: list[str]  # of the labels
    labels: scipy.sparse.csr_array  # [words, labels], 0 or 1
    sentence: Int[np.ndarray, " words"]
    train: Bool[np.ndarray, " words"]
    x: Float[np.ndarray, "words d_in"]


def with_forms(treebank: Treebank) -> tuple[Treebank, dict[str, int]]:
    """Return the treebank with a label `form=...` for the lower-cased word itself, and how often each form comes."""
    forms = [[f"form={s.text[word.start : word.end].lower()}" for word in s.words] for s in treebank.sentences]
    sentences = []
    for sentence, own in zip(treebank.sentences, forms, strict=True):
        words = [word._replace(labels=word.labels | {form}) for word, form in zip(sentence.words, own, strict=True)]
        sentences.append(sentence._replace(words=words))
    return treebank._replace(sentences=sentences), Counter(chain.from_iterable(forms))


def label_names(treebanks: Sequence[Treebank]) -> list[str]:
    """Return every label that occurs, sorted."""
    return sorted({label for bank in treebanks for s in bank.sentences for word in s.words for label in word.labels})


@torch.no_grad()
def read_words(model: Any, hook_name: str, treebank: Treebank, names: Sequence[str], *, context_size: int) -> Words:
    """Return a treebank's words with the activations of a model (backend `hf`) at a hook.

    Each sentence is read alone after a BOS, so that no word is seen through another sentence. Words that begin beyond the
    context are left out. Batches are read in a random order: a time bound leaves sentences of all lengths.
    Raises: UsageError when no word is left, or the model has no such hook.
    """
    tokens, spans = _tokenised(treebank.sentences, model.tokenizer, context_size)
    last = [last_tokens(*each, context_size - 1) for each in zip(treebank.sentences, spans, strict=True)]
    batches, read = batches_of(dict(enumerate(map(len, tokens)))), {}
    random = [batches[i] for i in np.random.default_rng(0).permutation(len(batches))]
    for batch in paced(random, treebank.name, len(tokens), "sentence", size=len):
        # what fills the shorter sentences is never looked back at
        padded = pad_sequence([torch.from_numpy(tokens[i]) for i in batch], batch_first=True)
        acts = read_activations(model, padded.to(model.device), hook_name)
        for i, own in zip(batch, acts, strict=True):
            read[i] = own[last[i][last[i] >= 0] + 1].float().cpu().numpy()  # the BOS comes first
    order = [i for i in chain.from_iterable(batches) if i in read]
    words = [(i, treebank.sentences[i].words[at]) for i in order for at in np.flatnonzero(last[i] >= 0)]
    if not words:
        raise UsageError(f"treebank {treebank.name} has no word within {context_size} tokens.")
    column = {name: i for i, name in enumerate(names)}
    pairs = [(row, column[label]) for row, (_, word) in enumerate(words) for label in word.labels if label in column]
    sentence = np.array([i for i, _ in words])
    train = np.array([treebank.sentences[i].train for i in sentence])
    labels, x = zeros_and_ones(pairs, (len(words), len(names))), np.concatenate([read[i] for i in order])
    return Words(treebank.name, list(names), labels, sentence, train, x)


def micro_words(model: Any, hook_name: str, n_documents: int, *, context_size: int) -> Words:
    """Return the words of MicroItaliano's first documents with all their labels, half of them in training."""
    bank = micro_treebank(n_documents)
    return read_words(model, hook_name, bank, label_names([bank]), context_size=context_size)


def _tokenised(
    sentences: Sequence[Sentence], tokenizer: Any, context_size: int
) -> tuple[list[np.ndarray], list[Int[np.ndarray, "tokens 2"]]]:
    """Return each sentence's ids, BOS first, cut to the context, and the spans of all but the BOS."""
    found = tokenise(tokenizer, [sentence.text for sentence in sentences])
    ids = [np.append(bos_id(tokenizer), tokens[0, : context_size - 1]).astype(np.int64) for tokens in found]
    return ids, [tokens[1:].T for tokens in found]


def last_tokens(sentence: Sentence, spans: Int[np.ndarray, "n 2"], most: int) -> Int[np.ndarray, " words"]:
    """Return for each word the token that completes it, -1 where it is none of the first `most`, which alone are read.

    That is the last token that ends within the word, or where one token covers the word's end and more, that token.
    """
    start, end = np.array([(word.start, word.end) for word in sentence.words], dtype=int).reshape(-1, 2).T
    # tokens 1 to n, between two that are none
    first, last = np.concatenate([[[-1, -1]], spans, [[np.iinfo(int).max] * 2]]).T
    within = np.searchsorted(last, end, side="right") - 1
    beyond = within + 1
    complete, straddled = last[within] == end, first[beyond] < end
    uncut = (last[within] > start) & (beyond <= len(spans))
    found = np.select([complete, straddled, uncut], [within, beyond, within], default=0) - 1
    return np.where(found < most, found, -1)


def batches_of(lengths: Mapping[int, int]) -> list[list[int]]:
    """Return texts by their numbers, those of similar length together, TOKENS_PER_BATCH tokens of them, the shortest first."""
    batches: list[list[int]] = []
    for i in sorted(lengths, key=lambda i: lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[i] > TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(i)
    return batches


@torch.no_grad()
def encode_words(sae: Any, x: Float[np.ndarray | Tensor, "words d_in"]) -> scipy.sparse.csr_array:
    """Return the latents' activations on words or tokens, [words, d_sae].

    Raises: UsageError when the SAE reads another number of dimensions.
    """
    if x.shape[1] != sae.cfg.d_in:
        raise UsageError(
            f"the SAE reads {sae.cfg.d_in} dimensions (d_in), the activations have {x.shape[1]}: "
            "compare SAEs of one model and site."
        )
    chunks = (codes(sae, part).float().cpu().numpy() for part in torch.as_tensor(x).split(CHUNK))
    return scipy.sparse.csr_array(scipy.sparse.vstack([scipy.sparse.csr_array(chunk) for chunk in chunks]))


# --- detection ----------------------------------------------------------------------------------------------------------


def firing(acts: scipy.sparse.csr_array, above: Float[np.ndarray, " latents"]) -> scipy.sparse.csr_array:
    """Return 0 or 1 for words and latents, [words, latents]: where a latent is above its threshold."""
    entries = acts.tocoo()
    keep = entries.data > above[entries.col]
    return zeros_and_ones(np.stack([entries.row[keep], entries.col[keep]], axis=1), (len(acts.indptr) - 1, len(above)))


def zeros_and_ones(ones: Any, shape: tuple[int, int]) -> scipy.sparse.csr_array:
    """Return a matrix that is 1 at the places (row, column) given, and 0 elsewhere."""
    places = np.array(ones, dtype=np.int64).reshape(-1, 2)
    matrix = scipy.sparse.csr_array((np.ones(len(places), dtype=np.float32), tuple(places.T)), shape=shape)
    matrix.data[:] = 1  # a place that was given twice is still a 1
    return matrix


def detection_counts(
    fired: scipy.sparse.csr_array, labels: scipy.sparse.csr_array
) -> tuple[Float[np.ndarray, "latents labels"], ...]:
    """Return F1, precision and recall of every latent for every label; 0 where a latent never fires."""
    both = (fired.T @ labels).toarray()
    n_fired, present = fired.sum(axis=0)[:, None], labels.sum(axis=0)[None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = 2 * both / (n_fired + present), both / n_fired, both / present
    return tuple(np.nan_to_num(numbers) for numbers in found)


def best_thresholds(
    acts: scipy.sparse.csr_array,
    labels: scipy.sparse.csr_array,
    maxima: Float[np.ndarray, " latents"],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    most_false: float = 1.0,
) -> Float[np.ndarray, "2 latents labels"]:
    """Return the best F1 of every latent for every label, and the first of the thresholds with which it has it.

    It is -1 for a latent that fires on a larger share than `most_false` of the words that do not bear the label.
    """
    n_words, present = len(acts.indptr) - 1, labels.sum(axis=0)
    best = np.full((2, len(maxima), len(present)), -1.0)
    for threshold in thresholds:
        fired = firing(acts, threshold * maxima)
        f1, _, recall = detection_counts(fired, labels)
        falsely = fired.sum(axis=0)[:, None] - np.rint(recall * present)
        f1 = np.where(falsely <= most_false * (n_words - present), f1, -1.0)
        best = np.where(f1 > best[0], [f1, np.full_like(f1, threshold)], best)
    return best
