"""What a rule can look at: for every position of a cache, its token, the word it ends or is inside, and its neighbours.

Words are put together from the pieces' bytes, so a rule may speak of a word's ending whatever the tokenizer does to it.
At a piece inside a word only the part of the word up to it counts, as for the model itself; that a piece is the last of
its word is known from the next one. A form is one (token, word up to here, last piece?): everything about a position
that does not depend on its neighbours is a table over forms, and so is everything about the position before it.
"""

from __future__ import annotations

import json
import re
from functools import cache, cached_property, partial
from threading import Lock
from typing import Any, Literal, NamedTuple
from unicodedata import normalize

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_italian.autointerp.draws import ExampleSource
from sae_italian.autointerp.morphology import KindTable, enclitic, table_of_kinds

Family = str
"""A kind of key: token, word, suffix2 to suffix5, prefix3, prefix4, shape and clitic of the position itself; previous,
previous-word and next to it; bigram and trigram, of which it is the last token."""
Slot = Literal["here", "previous", "word-before", "next"]
SUFFIXES: dict[Family, int] = {"suffix2": 2, "suffix3": 3, "suffix4": 4, "suffix5": 5}
PREFIXES: dict[Family, int] = {"prefix3": 3, "prefix4": 4}
LONGEST_WORD = 16  # pieces; a longer run is cut
# a letter or digit, a mark that follows its letter (as macOS writes accents), a soft hyphen, or what is no whole letter
_LETTER = re.compile("[^\\W_]|[\u0300-\u036f\u00ad\ufffd]")
# a letter's first bytes, or nothing, at the end of a piece; nothing but its other bytes
_HALF = re.compile(rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})?\Z")
_REST = re.compile(rb"[\x80-\xbf]+\Z")
_WORD_END = re.compile(r"(\w+['’]?|[^\w\s]+|\s*)$")


class _FamilyTable(NamedTuple):
    """A family that is a table over the forms of one slot: the key of each form, -1 where it has none."""

    slot: Slot
    keys: Int[np.ndarray, " forms_and_none"]  # the last entry is for no form at all
    names: list[str]  # the text of each key


class Places:
    """The keys of every position of a cache, and how often each occurs in the training documents."""

    def __init__(self, source: ExampleSource, tokenizer: Any):
        self.source, self.vocab = source, source.vocab
        self.strings = piece_texts(tokenizer, self.vocab)
        self._pieces = piece_bytes(tokenizer, self.vocab)
        self.new_word = self._word_starts()
        begins = np.where(self.new_word, np.arange(len(self.new_word), dtype=np.int32), 0)
        self.start_of_word: Int[np.ndarray, " positions"] = np.maximum.accumulate(begins)
        word, self.words = self._words_so_far()
        key = (word.astype(np.int64) * self.vocab + source.tokens) * 2 + np.append(self.new_word[1:], True)
        known, form = np.unique(key, return_inverse=True)
        self.form: Int[np.ndarray, " positions_and_none"] = np.append(form, -1).astype(np.int32)
        self.form_token = known // 2 % self.vocab
        self.form_word = known // 2 // self.vocab
        self.form_ends = (known % 2).astype(bool)
        self._goes_on = np.append(self.source.linked[1:], False)  # into the same document and window
        self.lock = Lock()

    def prepare(self) -> None:
        """Compute the tables now."""
        _ = self.tables, self.chains, self.scratch, self.kinds

    # --- words ---------------------------------------------------------------------------------------------------

    def _word_starts(self) -> Bool[np.ndarray, " positions"]:
        """True where a piece begins a word: after a space, a sign or a break in the document, and at signs themselves."""
        tokens, texts = self.source.tokens, [piece.decode("utf-8", "replace") for piece in self._pieces]
        told = [(_LETTER.match(text), _LETTER.match(text[-1:]), text in ("'", "’")) for text in texts]
        inside, goes_on, elides = np.array(told, dtype=bool)[tokens].T.copy()
        half = [_HALF.findall(piece)[0] for piece in self._pieces]
        for at in np.flatnonzero(np.array(half, dtype=bool)[tokens]).tolist():
            # what a piece begins and does not end may be a letter or a sign: the bytes behind it tell
            own, *others = tokens[at : at + 4].tolist()
            whole = b"".join([half[own], *(self._pieces[i] for i in others)]).decode("utf-8", "replace")
            goes_on[at] = _LETTER.match(whole)
            if half[own] == self._pieces[own]:
                inside[at], elides[at] = goes_on[at], whole[0] in "'’"
        rest = np.array([_REST.match(piece) for piece in self._pieces], dtype=bool)[tokens]
        begun = np.maximum.accumulate(np.where(rest, 0, np.arange(len(tokens), dtype=np.int32)))
        after_letter = np.append(False, goes_on[begun][:-1])
        return ~(self.source.linked & (rest | after_letter & (inside | elides)))

    def _words_so_far(self) -> tuple[Int[np.ndarray, " positions"], list[str]]:
        """Return the number of each position's word up to and with it, and the words, in small letters or not as written."""
        tokens = self.source.tokens
        depth = np.arange(len(tokens)) - self.start_of_word
        number_of: dict[bytes, int] = {}
        word = np.zeros(len(tokens), dtype=np.int64)
        behind: list[bytes] = [b""]
        for level in range(min(int(depth.max(initial=0)) + 1, LONGEST_WORD)):
            here = np.flatnonzero(depth == level)
            before = word[here - 1] if level else np.zeros(len(here), dtype=np.int64)
            pairs, index = np.unique(before * self.vocab + tokens[here], return_inverse=True)
            numbers = np.empty(len(pairs), dtype=np.int64)
            for i, pair in enumerate(pairs.tolist()):
                text = (behind[pair // self.vocab] if level else b"") + self._pieces[pair % self.vocab]
                numbers[i] = number_of.setdefault(text, len(behind))
                if numbers[i] == len(behind):
                    behind.append(text)
            word[here] = numbers[index]
        texts = (normalize("NFC", text.decode("utf-8", "replace").replace("\u00ad", "")) for text in behind)
        ends = (_WORD_END.search(text.strip()) for text in texts)
        return word, [end[0] for end in ends if end]  # each has one, which may be empty

    # --- families ------------------------------------------------------------------------------------------------

    @cached_property
    def tables(self) -> dict[Family, _FamilyTable]:
        """The families that are tables over forms."""
        words = [self.words[i] for i in self.form_word.tolist()]
        whole = [word if ends else "" for word, ends in zip(words, self.form_ends, strict=True)]
        lower = [word.lower() for word in whole]
        texts: dict[Family, list[str | None]] = {"word": [word or None for word in lower]}
        for family, n in SUFFIXES.items():
            texts[family] = [word[-n:] if len(word) > n and word[-n:].isalpha() else None for word in lower]
        for family, n in PREFIXES.items():
            texts[family] = [word[:n].lower() if len(word) > n and word[:n].isalpha() else None for word in words]
        texts |= {"shape": [shape_of(word) for word in whole], "clitic": [enclitic(word) for word in lower]}
        token = np.append(self.form_token, -1).astype(np.int32), []
        tables = {"token": token} | {family: _numbered(own) for family, own in texts.items()}
        found = {family: _FamilyTable("here", *table) for family, table in tables.items()}
        beside = {
            "previous": ("previous", token),
            "previous-word": ("word-before", tables["word"]),
            "next": ("next", token),
        }
        return found | {family: _FamilyTable(slot, *table) for family, (slot, table) in beside.items()}

    @cached_property
    def chains(self) -> dict[Family, Int[np.ndarray, " positions"]]:
        """The number of each position's pair and triple of tokens, itself the last; -1 where one or two do not precede it."""
        bigram = self._chained(self.source.tokens)
        return {"bigram": bigram, "trigram": self._chained(bigram)}

    def _chained(self, before: Int[np.ndarray, " positions"]) -> Int[np.ndarray, " positions"]:
        key = np.full(len(before), -1, dtype=np.int64)
        key[1:] = before[:-1].astype(np.int64) * self.vocab + self.source.tokens[1:]
        key[~self.source.linked] = -1
        key[1:][before[:-1] < 0] = -1
        known, index = np.unique(key, return_inverse=True)
        return (index - (known[0] == -1)).astype(np.int32)

    def forms(self, positions: Int[np.ndarray, ...], slot: Slot) -> Int[np.ndarray, ...]:
        """Return the form at a slot of each position, -1 where there is none or it lies in another document or window."""
        if slot == "here":
            return self.form[positions]  # -1 reads the last
        inside = positions >= 0
        if slot == "next":
            there, inside = positions + 1, inside & self._goes_on[positions]
        else:  # before the position, or before its word
            first = positions if slot == "previous" else self.start_of_word[positions]
            there, inside = first - 1, inside & self.source.linked[first]
        return self.form[np.where(inside, there, -1)]

    def name(self, family: Family, key: int) -> str:
        """Return the text of a key of a family that is a table over forms."""
        names = self.tables[family].names
        return names[key] if names else self.strings[key]

    @cached_property
    def kinds(self) -> KindTable:
        """The kinds of word that titles may name, and which words of the text are of each; none without a lemmatiser."""
        return table_of_kinds(self.tables["word"].names)

    # --- counts in the training documents -----------------------------------------------------------------------------

    @cached_property
    def train_positions(self) -> Int[np.ndarray, " n"]:
        return np.flatnonzero(self.source.position_part == 0)

    @cached_property
    def totals(self) -> dict[Family, Int[np.ndarray, " keys"]]:
        """How often each key of each family occurs in the training documents."""
        view, counts = View(self, self.train_positions), {}
        for family, known in ({name: table.keys for name, table in self.tables.items()} | self.chains).items():
            keys = view.keys_now(family)
            counts[family] = np.bincount(keys[keys >= 0], minlength=int(known.max(initial=-1)) + 1)
        return counts

    @cached_property
    def scratch(self) -> dict[Family, Float[np.ndarray, " keys_and_none"]]:
        """A zero for each key of each family, to look values up in; the last one is for no key."""
        return {family: np.zeros(len(found) + 1) for family, found in self.totals.items()}


class View:
    """The keys on a grid of positions, each family's computed once however many rules are tried on it."""

    def __init__(self, places: Places, grid: Int[np.ndarray, "n width"]):
        self.places, self.grid = places, grid
        self._forms = cache(partial(places.forms, grid))
        self.keys = cache(self.keys_now)

    def keys_now(self, family: Family) -> Int[np.ndarray, "n width"]:
        """Return the family's key at each position, -1 for none and at position -1."""
        if family in self.places.chains:
            return np.where(self.grid >= 0, self.places.chains[family][self.grid], -1)
        slot, keys, _ = self.places.tables[family]
        return keys[self._forms(slot)]

    def look_up(
        self, family: Family, keys: Int[np.ndarray, " k"], values: Float[np.ndarray, " k"]
    ) -> Float[np.ndarray, "n width"]:
        """Return the value of the key at each position, 0 for keys that have none and where there is no key."""
        at = self.keys(family)
        with self.places.lock:  # one table a family, cleared after use: quicker than a search for each place
            table = self.places.scratch[family]
            table[keys] = values
            found = table[at]
            table[keys] = 0.0
        return found


def shape_of(word: str) -> str:
    """Return the shape of a whole word, by name; "" means that the word goes on."""
    if not word:
        return "inside a word"
    if word[-1] in "'’" and len(word) > 1:
        return "elided"
    if not any(letter.isalnum() for letter in word):
        return "punctuation"
    if word[0].isdigit():
        return "number"
    if word.isupper() and len(word) > 1:
        return "all capitals"
    if word[0].isupper():
        return "capital"
    return "accented ending" if word[-1] in "àèéìíòóù" else "lower case"


def _numbered(texts: list[str | None]) -> tuple[Int[np.ndarray, " n_and_none"], list[str]]:
    """Return the number of each text (-1 for None, and a last -1 for no form at all) and the texts by number."""
    names = list(dict.fromkeys(text for text in texts if text is not None))
    number: dict[str | None, int] = {name: i for i, name in enumerate(names)}
    return np.array([*(number.get(text, -1) for text in texts), -1], dtype=np.int32), names


# --- the pieces of a tokenizer ---------------------------------------------------------------------------------------

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def piece_bytes(tokenizer: Any, n: int) -> list[bytes]:
    """Return the bytes that each of the first n ids stands for, a leading space included."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = tokenizer.backend_tokenizer
    pieces = [backend.id_to_token(i) or f"<{i}>" for i in range(n)]
    if not _metaspace(backend):
        # GPT-2's letters: printable bytes are themselves
        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        return [
            bytes(letters[letter] for letter in piece) if set(piece) <= letters.keys() else piece.encode()
            for piece in pieces
        ]
    return [
        bytes([int(match[1], 16)]) if (match := _BYTE.fullmatch(piece)) else piece.replace("▁", " ").encode()
        for piece in pieces
    ]


def piece_texts(tokenizer: Any, n: int) -> list[str]:
    """Return the text of each of the first n ids, a leading space kept; bytes that are no text show as <0x..>."""
    backend = tokenizer.backend_tokenizer
    if _metaspace(backend):
        return [(backend.id_to_token(i) or f"<{i}>").replace("▁", " ") for i in range(n)]
    # byte-level: half a letter shows as a dot
    return [piece.decode("utf-8", "replace").replace("\ufffd", "·") for piece in piece_bytes(tokenizer, n)]


def _metaspace(backend: Any) -> bool:
    state = json.loads(backend.to_str())
    told = str(state.get("pre_tokenizer")) + str(state.get("normalizer"))
    return bool(state["model"].get("byte_fallback", False)) or "▁" in told
