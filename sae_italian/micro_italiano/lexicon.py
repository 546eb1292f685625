"""The lexicon: inflected tokens with their labels, built once from the YAML files in data/."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml

from sae_italian.micro_italiano.morphology import (
    FINITE,
    IMPERATIVES,
    adjective,
    conjugate,
    enclitic,
    plural,
    prefixed,
)
from sae_italian.micro_italiano.records import GENDERS, NUMBERS, Token, labels_of

SOUND_CHANGES = {"il", "uno", "quello", "questo", "bello", "buono", "nessuno", "alcuno"}  # see realise.py
CLITICS = {
    "mi": ("mi", "ti", "si", "ci", "vi", "si"),
    "lo": ("mi", "ti", "lo", "ci", "vi", "li"),
    "gli": ("mi", "ti", "gli", "ci", "vi", "gli"),
    "lui": ("io", "tu", "lui", "noi", "voi", "loro"),
}
_MOOD_TENSE = {
    "pres": ("Ind", "Pres"),
    "imp": ("Ind", "Imp"),
    "fut": ("Ind", "Fut"),
    "cond": ("Cnd", "Pres"),
    "sub": ("Sub", "Pres"),
    "subimp": ("Sub", "Imp"),
}
_AUXILIARIES = {"essere", "potere", "dovere", "volere"}
Grid = tuple[tuple[Token, Token], tuple[Token, Token]]  # [gender][number]


def data_text(name: str) -> str:
    """Return a file of the package's data folder."""
    return (files("sae_italian.micro_italiano") / "data" / name).read_text(encoding="utf-8")


class Noun:
    """A noun or name in its forms (None where a number is missing) and the way one is there («in piazza»)."""

    __slots__ = ("lemma", "genders", "tokens", "place", "before", "after")

    def __init__(self, lemma: str, genders: tuple[int, int], tokens: tuple[Token | None, Token | None]) -> None:
        self.lemma = lemma
        self.genders = genders
        self.tokens = tokens
        self.place: tuple[Token, ...] = ()
        self.before: tuple[Grid, ...] = ()
        self.after: tuple[Grid, ...] = ()


class Verb:
    """A verb's tokens: finite[tense][person + 3 * plural], single forms, and participle[gender][number]."""

    def __init__(self, lemma: str, paradigm: dict[str, tuple[str, ...]], takes_essere: bool, reflexive: bool) -> None:
        self.takes_essere = takes_essere
        self.reflexive = reflexive
        upos = "AUX" if lemma in _AUXILIARIES else "VERB"
        self.lemma, self.upos = lemma, upos
        self.finite = {tense: self._finite(tense, paradigm[tense]) for tense in FINITE}
        self.single: dict[str, Token] = {
            "inf": Token(paradigm["inf"][0], labels_of(lemma, upos, verbform="Inf")),
            "ger": Token(paradigm["ger"][0], labels_of(lemma, upos, verbform="Ger")),
        }
        for key, (person, number) in zip(IMPERATIVES, ((2, "Sing"), (1, "Plur"), (2, "Plur")), strict=True):
            features = {"person": person, "number": number, "mood": "Imp", "tense": "Pres", "verbform": "Fin"}
            self.single[key] = Token(paradigm[key][0], labels_of(lemma, upos, **features))
        self.participle = grid(lemma, upos, paradigm["part"][0], tense="Past", verbform="Part")
        self._enclitics: dict[tuple[str, str], Token] = {}

    def _finite(self, tense: str, forms: tuple[str, ...]) -> tuple[Token, ...]:
        mood, label = _MOOD_TENSE[tense]
        tokens = []
        for index, form in enumerate(forms):
            number = NUMBERS[index // 3]
            features = {"person": index % 3 + 1, "number": number, "mood": mood, "tense": label, "verbform": "Fin"}
            tokens.append(Token(form, labels_of(self.lemma, self.upos, **features)))
        return tuple(tokens)

    def with_clitic(self, key: str, clitic: str) -> Token:
        """Return the infinitive, gerund or imperative `key` with an enclitic pronoun, as one word."""
        token = self._enclitics.get((key, clitic))
        if token is None:
            host = self.single[key]
            token = Token(enclitic(host.form, clitic), {**host.labels, "clitic": clitic})
            self._enclitics[(key, clitic)] = token
        return token

    def variant(self, upos: str, takes_essere: bool) -> Verb:
        """Return the same verb as another part of speech or with another auxiliary («è finito», «ha finito»)."""
        other = object.__new__(Verb)
        other.__dict__.update(self.__dict__)
        other.takes_essere = takes_essere

        def change(token: Token) -> Token:
            return Token(token.form, {**token.labels, "upos": upos}, token.kind)

        other.upos = upos
        other.finite = {tense: tuple(map(change, tokens)) for tense, tokens in self.finite.items()}
        other.single = {key: change(token) for key, token in self.single.items()}
        (ms, mp), (fs, fp) = self.participle
        other.participle = ((change(ms), change(mp)), (change(fs), change(fp)))
        other._enclitics = {}
        return other


def grid(lemma: str, upos: str, base: str, kind: str = "", **features: str) -> Grid:
    """Return the four forms of an agreeing word, labelled; gender is left out where the form does not show it."""
    (ms, mp), (fs, fp) = adjective(base)

    def token(form: str, gender: int, number: int) -> Token:
        shown = GENDERS[gender] if (ms, mp)[number] != (fs, fp)[number] else None
        return Token(form, labels_of(lemma, upos, gender=shown, number=NUMBERS[number], **features), kind)

    return (token(ms, 0, 0), token(mp, 0, 1)), (token(fs, 1, 0), token(fp, 1, 1))


def possessive_grid(lemma: str, upos: str) -> Grid:
    """Return the forms of mio, tuo, suo, nostro, vostro."""
    stem = lemma[:-1]
    plural_form = {"mio": "miei", "tuo": "tuoi", "suo": "suoi"}.get(lemma, stem + "i")

    def token(form: str, gender: int, number: int) -> Token:
        return Token(form, labels_of(lemma, upos, gender=GENDERS[gender], number=NUMBERS[number]))

    return (token(lemma, 0, 0), token(plural_form, 0, 1)), (token(stem + "a", 1, 0), token(stem + "e", 1, 1))


class Lexicon:
    """All words, by the names that the grammar files use."""

    def __init__(self) -> None:
        self.words: dict[str, Token] = {}
        self.pronouns = {kind: _pronoun_forms(kind) for kind in CLITICS}  # [person + 3 * plural][gender]
        self.agreeing: dict[str, Grid] = {}
        self.verbs: dict[str, Verb] = {}
        self.classes: dict[str, tuple[Noun, ...]] = {}
        self.nouns: dict[tuple[str, str], Noun] = {}
        self.adjective_classes: dict[str, tuple[str, ...]] = {}
        self.articles = self._article_grid("il", ("il", "i", "la", "le"))
        self.indefinite = self._article_grid("uno", ("un", "un", "una", "una"))
        self._load_words(yaml.safe_load(data_text("words.yaml")))
        self._load_nouns(yaml.safe_load(data_text("nouns.yaml")))
        self._load_verbs(yaml.safe_load(data_text("verbs.yaml")))
        self.agreeing.update({"il": self.articles, "un": self.indefinite, "glielo": _glielo_grid()})
        self._add_literals()

    def _add_literals(self) -> None:
        """Let the grammar name any form as it stands: untagged words first, nouns, adjectives, tagged words, the rest."""
        tagged = list(self.words.values())
        nouns = [token for noun in self.nouns.values() for token in noun.tokens if token is not None]
        forms: dict[str, list[Token]] = {"ADJ": [], "DET": []}
        for name, ((ms, mp), (fs, fp)) in self.agreeing.items():
            if "/" not in name and "<" not in name and ms.labels["upos"] in forms:
                forms[ms.labels["upos"]] += [ms, mp, fs, fp]
        for token in (*nouns, *forms["ADJ"], *tagged, *forms["DET"]):
            self.words.setdefault(token.form, token)

    @staticmethod
    def _article_grid(lemma: str, forms: tuple[str, str, str, str]) -> Grid:
        def token(index: int) -> Token:
            features = {"gender": GENDERS[index // 2], "number": NUMBERS[index % 2]}
            return Token(forms[index], labels_of(lemma, "DET", **features), lemma)

        return (token(0), token(1)), (token(2), token(3))

    def _load_words(self, data: dict[str, Any]) -> None:
        letters = {"m": ("gender", "Masc"), "f": ("gender", "Fem"), "s": ("number", "Sing"), "p": ("number", "Plur")}
        for upos, items in data["forms"].items():
            for item in items.split():
                head, _, features = item.partition(":") if len(item) > 1 else (item, "", "")
                name, _, lemma = head.partition("=")
                form = name.partition("/")[0] if len(name) > 1 else name
                labels = labels_of(lemma or form, upos)
                for letter in features:
                    key, value = letters.get(letter, ("person", letter))
                    labels[key] = value
                kind = labels["lemma"] if upos == "DET" and labels["lemma"] in ("il", "uno") else ""
                self.words[name] = Token(form, labels, kind or _word_kind(name, form, upos))
        for upos, items in data["agreeing"].items():
            for name in items.split():
                lemma = name.partition("/")[0]
                possessive = lemma in ("mio", "tuo", "suo", "nostro", "vostro")
                kind = lemma if upos == "DET" and lemma in SOUND_CHANGES else ""
                self.agreeing[name] = possessive_grid(lemma, upos) if possessive else grid(lemma, upos, lemma, kind)
                if upos == "NOUN":  # like the nouns' own entries: «bambine» is bambina
                    for token in self.agreeing[name][1]:
                        token.labels["lemma"] = self.agreeing[name][1][0].form

    def _load_nouns(self, data: dict[str, Any]) -> None:
        for cls, text in data["nouns"].items():
            upos = "PROPN" if cls in data["proper"] else "NOUN"
            shown = cls not in data["genderless"]
            entries = [self._noun(item.split(), upos, shown) for item in text.split(";") if item.strip()]
            self.classes[cls] = tuple(entries)
        for cls, words in data["adjectives"].items():
            before = tuple(self._adjective(word[:-1], True) for word in words.split() if word.endswith("<"))
            after = tuple(self._adjective(word) for word in words.split() if not word.endswith("<"))
            for noun in self.classes.get(cls, ()):
                noun.before, noun.after = before, after
        for cls, members in data["unions"].items():
            self.classes[cls] = tuple(noun for member in members for noun in self.classes[member])
        for cls, words in data["adjective_classes"].items():
            self.adjective_classes[cls] = tuple(word.partition("=")[0] for word in words.split())
            for word in words.split():
                self._adjective(word)
                self._adjective(word, True)

    def _adjective(self, word: str, prenominal: bool = False) -> Grid:
        """Add an adjective, written lemma or superlative=lemma; before a noun some forms shrink (bel, buon)."""
        name, _, lemma = word.partition("=")
        key = name + "<" if prenominal else name
        if key not in self.agreeing:
            kind = name if prenominal and name in SOUND_CHANGES else ""
            self.agreeing[key] = grid(lemma or name, "ADJ", name, kind)
        return self.agreeing[key]

    def _noun(self, fields: list[str], upos: str, gender_shown: bool) -> Noun:
        lemma, letter, *options = fields
        place = next((option[1:] for option in options if option[0] == "@"), None)
        given = next((option for option in options if option[0] not in "@+-"), None)
        known = self.nouns.get((lemma, letter))
        form, _, plural_gender = (given or plural(lemma, letter)).partition("/")
        if known is not None and given is None and known.tokens[1] is not None:
            form = known.tokens[1].form
        genders = ("mf".index(letter), "mf".index(plural_gender or letter))

        def token(text: str, number: int) -> Token:
            gender = GENDERS[genders[number]] if gender_shown else None
            return Token(text, labels_of(lemma, upos, gender=gender, number=NUMBERS[number]))

        singular_token = None if "+" in options else token(lemma, 0)
        plural_token = None if "-" in options else token(form, 1)
        noun = Noun(lemma, genders, (singular_token, plural_token))
        if place is not None and singular_token is not None:
            preposition = self.words[place.rstrip("0")]
            article = () if place.endswith("0") else (self.articles[genders[0]][0],)
            noun.place = (preposition, *article, singular_token)
        if known is None or None in known.tokens:
            self.nouns[(lemma, letter)] = noun
        return noun

    def _load_verbs(self, data: dict[str, Any]) -> None:
        irregular: dict[str, dict[str, str]] = dict(data["irregular"])
        for lemma, (prefix, base) in data["derived"].items():
            irregular[lemma] = prefixed(prefix, {k: v for k, v in irregular[base].items() if k != "isc"})
        for lemma, entry in irregular.items():
            self._add_verb(lemma, "isc" in entry, entry, entry.get("aux") == "essere")
        for word in data["regular"].split():
            self._add_verb(word.rstrip("*"), False, {}, word.endswith("*"))
        for lemma in data["isc"].split():
            self._add_verb(lemma, True, {}, False)
        for name, base in data["reflexive"].items():
            entry = irregular.get(base, {})
            self.verbs[name] = Verb(base, conjugate(base, irregular=entry), takes_essere=True, reflexive=True)
        for name, entry in data["variants"].items():
            verb = self.verbs[entry["of"]]
            takes_essere = entry["aux"] == "essere" if "aux" in entry else verb.takes_essere
            self.verbs[name] = verb.variant(entry.get("upos", verb.upos), takes_essere)
        self.auxiliary = {True: self.verbs["essere"], False: self.verbs["avere/x"]}

    def _add_verb(self, lemma: str, isc: bool, entry: dict[str, str], takes_essere: bool) -> None:
        self.verbs[lemma] = Verb(lemma, conjugate(lemma, isc, entry), takes_essere, reflexive=False)


def _word_kind(name: str, form: str, upos: str) -> str:
    if name in ("di", "a", "da", "in", "su"):
        return "prep"
    if name == "e":
        return name
    if name == "»/":
        return "end"
    if name in ("ci/l", "dove/i", "come/i", "cosa/i", "dove/r"):
        return "elide_e"
    if name == "quale":
        return "quale"
    if name in ("lo/n", "la/n"):
        return "lo"
    return ""


def _pronoun_forms(kind: str) -> list[tuple[Token, Token]]:
    """Return (masculine, feminine) tokens of a personal pronoun, by person + 3 * plural."""
    feminine = {("lo", 2): "la", ("lo", 5): "le", ("gli", 2): "le", ("lui", 2): "lei"}
    rows = []
    for index, form in enumerate(CLITICS[kind]):
        shown = (kind, index) in feminine
        number = None if kind == "mi" and index % 3 == 2 else NUMBERS[index // 3]  # the reflexive si shows none
        pair = []
        for gender, text in enumerate((form, feminine.get((kind, index), form))):
            labels = labels_of(
                text, "PRON", gender=GENDERS[gender] if shown else None, number=number, person=index % 3 + 1
            )
            pair.append(Token(text, labels, "lo" if kind == "lo" and index == 2 else ""))
        rows.append((pair[0], pair[1]))
    return rows


def _glielo_grid() -> Grid:
    def token(form: str, gender: int, number: int) -> Token:
        labels = labels_of("glielo", "PRON", gender=GENDERS[gender], number=NUMBERS[number], person=3)
        return Token(form, labels, "" if number else "lo")

    return (token("glielo", 0, 0), token("glieli", 0, 1)), (token("gliela", 1, 0), token("gliele", 1, 1))


@lru_cache(maxsize=1)
def _number_words() -> dict[str, list[str]]:
    return {key: value.split() for key, value in yaml.safe_load(data_text("words.yaml"))["numbers"].items()}


def in_words(value: int) -> str:
    """Return a number from 0 to 999 in words: 21 ventuno, 28 ventotto, 23 ventitré, 200 duecento."""
    units, all_tens = _number_words()["units"], _number_words()["tens"]
    if value >= 100:
        head = "cento" if value < 200 else units[value // 100] + "cento"
        return head + (in_words(value % 100) if value % 100 else "")
    if value < 20:
        return units[value]
    tens, unit = all_tens[value // 10 - 1], value % 10
    if unit == 0:
        return tens
    if unit in (1, 8):
        tens = tens[:-1]
    return tens + ("tré" if unit == 3 else units[unit])


@lru_cache(maxsize=1)
def load_lexicon() -> Lexicon:
    """Return the lexicon, loaded on first use."""
    return Lexicon()
