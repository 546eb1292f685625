"""Italian inflection by rule, and the lexicon: inflected tokens with their labels, built once from the YAML in data/."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

GENDERS = ("Masc", "Fem")
NUMBERS = ("Sing", "Plur")
_MOOD_TENSE = {
    "pres": ("Ind", "Pres"),
    "imp": ("Ind", "Imp"),
    "fut": ("Ind", "Fut"),
    "cond": ("Cnd", "Pres"),
    "sub": ("Sub", "Pres"),
    "subimp": ("Sub", "Imp"),
}
FINITE = tuple(_MOOD_TENSE)
_FEATURES = {"m": ("gender", "Masc"), "f": ("gender", "Fem"), "s": ("number", "Sing"), "p": ("number", "Plur")}
IMPERATIVES = ("imp2", "imp4", "imp5")
_PRESENT = {"are": "o i a iamo ate ano", "ere": "o i e iamo ete ono", "ire": "o i e iamo ite ono"}
_ISC = "isco isci isce iamo ite iscono"
_ENDINGS = {
    "imp": "vo vi va vamo vate vano",
    "fut": "ò ai à emo ete anno",
    "cond": "ei esti ebbe emmo este ebbero",
    "subimp": "ssi ssi sse ssimo ste ssero",
}
_AUXILIARIES = {"essere", "potere", "dovere", "volere"}


@dataclass(slots=True, eq=False)
class Token:
    """One word before realisation: citation form, shared labels, and the kind of sound change it undergoes."""

    form: str
    labels: dict[str, str]
    kind: str = ""


def labels_of(lemma: str, upos: str, **features: str | int | None) -> dict[str, str]:
    """Return a label dictionary without the features that are None."""
    shown = {key: str(value) for key, value in features.items() if value is not None}
    return {"lemma": lemma, "upos": upos, **shown}


Paradigm = dict[str, tuple[str, ...]]
Grid = tuple[tuple[Token, Token], tuple[Token, Token]]  # [gender][number]


def data_text(name: str) -> str:
    """Return a file of the package's data folder."""
    return (files("sae_italian.micro_italiano") / "data" / name).read_text(encoding="utf-8")


@cache
def _data(name: str) -> dict[str, Any]:
    return yaml.safe_load(data_text(name))


@dataclass(slots=True, eq=False)
class Noun:
    """A noun or name in its forms (None where a number is missing) and the way one is there («in piazza»)."""

    lemma: str
    genders: tuple[int, int]  # of singular and plural: «l'uovo, le uova»
    tokens: tuple[Token | None, Token | None]
    place: tuple[Token, ...] = ()
    before: tuple[Grid, ...] = ()  # adjectives that may stand before it, and after it
    after: tuple[Grid, ...] = ()


class Verb:
    """A verb's tokens: finite[tense][person - 1 + 3 * plural], single forms, and participle[gender][number]."""

    def __init__(
        self,
        lemma: str,
        paradigm: Paradigm,
        takes_essere: bool,
        reflexive: bool = False,
        upos: str | None = None,
    ) -> None:
        self.lemma, self.paradigm, self.takes_essere, self.reflexive = lemma, paradigm, takes_essere, reflexive
        self.upos = upos or ("AUX" if lemma in _AUXILIARIES else "VERB")
        self.finite = {tense: tuple(self._finite(tense)) for tense in FINITE}
        self.single = {"inf": self._token("inf", verbform="Inf"), "ger": self._token("ger", verbform="Ger")}
        for key, (person, number) in zip(IMPERATIVES, ((2, "Sing"), (1, "Plur"), (2, "Plur")), strict=True):
            own = {"person": person, "number": number, "mood": "Imp", "tense": "Pres", "verbform": "Fin"}
            self.single[key] = self._token(key, **own)
        self.participle = grid(lemma, self.upos, adjective(paradigm["part"][0]), tense="Past", verbform="Part")

    def _token(self, key: str, index: int = 0, **features: str | int) -> Token:
        return Token(self.paradigm[key][index], labels_of(self.lemma, self.upos, **features))

    def _finite(self, tense: str) -> list[Token]:
        mood, label = _MOOD_TENSE[tense]
        shared = {"mood": mood, "tense": label, "verbform": "Fin"}
        return [self._token(tense, i, person=i % 3 + 1, number=NUMBERS[i // 3], **shared) for i in range(6)]

    def with_clitic(self, key: str, clitic: str) -> Token:
        """Return the infinitive, gerund or imperative `key`, with an enclitic pronoun, if any, as one word."""
        host = self.single[key]
        return Token(enclitic(host.form, clitic), {**host.labels, "clitic": clitic}) if clitic else host


def grid(
    lemma: str, upos: str, forms: tuple[tuple[str, str], tuple[str, str]], kind: str = "", **features: str | int
) -> Grid:
    """Return an agreeing word's forms [gender][number], labelled; gender is left out where the form does not show it."""

    def token(gender: int, number: int) -> Token:
        shown = GENDERS[gender] if forms[0][number] != forms[1][number] else None
        labels = labels_of(lemma, upos, gender=shown, number=NUMBERS[number], **features)
        return Token(forms[gender][number], labels, kind)

    return (token(0, 0), token(0, 1)), (token(1, 0), token(1, 1))


class Lexicon:
    """All words, by the names that the grammar files use."""

    def __init__(self) -> None:
        self.words: dict[str, Token] = {}
        self.agreeing: dict[str, Grid] = {}
        self.verbs: dict[str, Verb] = {}
        self.classes: dict[str, tuple[Noun, ...]] = {}
        self.nouns: dict[tuple[str, str], Noun] = {}
        self.adjective_classes: dict[str, tuple[str, ...]] = {}
        data = _data("words.yaml")
        self.changing = set(data["kinds"]["changing"].split())
        self.pronouns = {kind: _pronoun_forms(kind, text.split()) for kind, text in data["pronouns"].items()}
        self._load_words(data)
        self._load_nouns(_data("nouns.yaml"))
        self._load_verbs(_data("verbs.yaml"))
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

    def _load_words(self, data: dict[str, Any]) -> None:
        kinds = {name: kind for kind, names in data["kinds"].items() for name in names.split() if kind != "changing"}
        for upos, items in data["forms"].items():
            for item in items.split():
                head, _, features = item.partition(":") if len(item) > 1 else (item, "", "")
                name, _, lemma = head.partition("=")
                form = name.partition("/")[0] if len(name) > 1 else name
                labels = labels_of(lemma or form, upos)
                labels.update(_FEATURES.get(letter, ("person", letter)) for letter in features)
                kind = kinds.get(name, "")
                self.words[name] = Token(form, labels, labels["lemma"] if kind == "article" else kind)
        for upos, items in data["agreeing"].items():
            for name in items.split():
                lemma = name.partition("/")[0]
                kind = lemma if upos == "DET" and lemma in self.changing else ""
                self.agreeing[name] = grid(lemma, upos, adjective(lemma), kind)
                if upos == "NOUN":  # like the nouns' own entries: «bambine» is bambina
                    for token in self.agreeing[name][1]:
                        token.labels["lemma"] = self.agreeing[name][1][0].form
        for upos, grids in data["grids"].items():
            for name, text in grids.items():
                ms, mp, fs, fp = text.split()
                lemma = "uno" if name == "un" else name
                features = {"person": 3} if upos == "PRON" else {}
                kind = lemma if lemma in self.changing else ""
                self.agreeing[name] = grid(lemma, upos, ((ms, mp), (fs, fp)), kind, **features)
        for singular, _ in self.agreeing["glielo"]:
            singular.kind = "lo"

    def _load_nouns(self, data: dict[str, Any]) -> None:
        for cls, text in data["nouns"].items():
            upos = "PROPN" if cls in data["proper"] else "NOUN"
            shown = cls not in data["genderless"]
            self.classes[cls] = tuple(self._noun(item.split(), upos, shown) for item in text.split(";") if item.strip())
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
            kind = name if prenominal and name in self.changing else ""
            self.agreeing[key] = grid(lemma or name, "ADJ", adjective(name), kind)
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

        one, many = None if "+" in options else token(lemma, 0), None if "-" in options else token(form, 1)
        noun = Noun(lemma, genders, (one, many))
        if place is not None and one is not None:
            article = () if place.endswith("0") else (self.agreeing["il"][genders[0]][0],)
            noun.place = (self.words[place.rstrip("0")], *article, one)
        if known is None or None in known.tokens:
            self.nouns[(lemma, letter)] = noun
        return noun

    def _load_verbs(self, data: dict[str, Any]) -> None:
        irregular: dict[str, dict[str, str]] = dict(data["irregular"])
        for lemma, (prefix, base) in data["derived"].items():
            irregular[lemma] = prefixed(prefix, {k: v for k, v in irregular[base].items() if k != "isc"})
        regular = {
            word.rstrip("*"): {"aux": "essere" if word.endswith("*") else ""} for word in data["regular"].split()
        }
        isc = {lemma: {"isc": ""} for lemma in data["isc"].split()}
        for lemma, entry in (irregular | regular | isc).items():
            self.verbs[lemma] = Verb(lemma, conjugate(lemma, "isc" in entry, entry), entry.get("aux") == "essere")
        for name, base in data["reflexive"].items():
            self.verbs[name] = Verb(base, conjugate(base, irregular=irregular.get(base)), True, reflexive=True)
        for name, entry in data["variants"].items():  # «è finito», «ha finito»
            verb = self.verbs[entry["of"]]
            takes_essere = entry["aux"] == "essere" if "aux" in entry else verb.takes_essere
            self.verbs[name] = Verb(
                verb.lemma, verb.paradigm, takes_essere, verb.reflexive, entry.get("upos", verb.upos)
            )
        self.auxiliary = {True: self.verbs["essere"], False: self.verbs["avere/x"]}


def _pronoun_forms(kind: str, forms: list[str]) -> list[list[Token]]:
    """Return [masculine, feminine] tokens of a personal pronoun, by person - 1 + 3 * plural."""
    rows = []
    for index, form in enumerate(forms):
        masculine, both, feminine = form.partition("/")
        number = None if kind == "mi" and index % 3 == 2 else NUMBERS[index // 3]  # reflexive si has none
        pair = []
        for gender, text in enumerate((masculine, feminine or masculine)):
            shown = {"gender": GENDERS[gender] if both else None, "number": number, "person": index % 3 + 1}
            pair.append(Token(text, labels_of(text, "PRON", **shown), "lo" if kind == "lo" and index == 2 else ""))
        rows.append(pair)
    return rows


def in_words(value: int) -> str:
    """Return a number from 0 to 99 in words: 21 ventuno, 28 ventotto, 23 ventitré."""
    units, all_tens = (_data("words.yaml")["numbers"][key].split() for key in ("units", "tens"))
    if value < 20:
        return units[value]
    tens, unit = all_tens[value // 10 - 1], value % 10
    if unit == 0:
        return tens
    return (tens[:-1] if unit in (1, 8) else tens) + ("tré" if unit == 3 else units[unit])


# --- inflection by rule; what rules cannot know comes in as data (see data/verbs.yaml) --------------------------------


def _join(stem: str, ending: str) -> str:
    """Join a stem in -are to an ending, keeping its sound: cerc+i cerchi, mangi+i mangi, mangi+erò mangerò."""
    if ending[0] in "ei":
        if stem[-1] in "cg":
            return stem + "h" + ending
        if stem[-1] == "i" and (ending[0] == "i" or stem[-2] in "cg"):
            return stem[:-1] + ending
    return stem + ending


def _subjunctive(lemma: str, present: tuple[str, ...]) -> tuple[str, ...]:
    singular = _join(lemma[:-3], "i") if lemma.endswith("are") else present[0][:-1] + "a"
    plural = _join(lemma[:-3], "ino") if lemma.endswith("are") else singular + "no"
    return (singular, singular, singular, present[3], present[3][:-2] + "te", plural)


def conjugate(lemma: str, isc: bool = False, irregular: Mapping[str, str] | None = None) -> Paradigm:
    """Return the paradigm of a verb: six forms per finite tense, one for each other key.

    `irregular` may give, as strings with spaces between forms: pres and imp (6 forms), imp_stem («face»), fut_stem
    («far»), sub (6 forms), subimp_stem («desse» is «de»), part, ger, imp2, imp5.
    Keys returned: FINITE, IMPERATIVES, inf, ger, part (masculine singular).
    """
    data = irregular or {}
    root, group = lemma[:-3], lemma[-3:]
    regular = [
        _join(root, e) if group == "are" else root + e for e in (_ISC if isc else _PRESENT.get(group, "")).split()
    ]
    present = tuple(data["pres"].split() if "pres" in data else regular)
    imp_stem = data.get("imp_stem", lemma[:-2])
    fut_stem = data.get("fut_stem", _join(root, "er") if group == "are" else lemma[:-1])
    stems = {"imp": imp_stem, "fut": fut_stem, "cond": fut_stem, "subimp": data.get("subimp_stem", imp_stem)}
    finite = {tense: tuple(stem + ending for ending in _ENDINGS[tense].split()) for tense, stem in stems.items()}
    finite |= {"pres": present, "sub": _subjunctive(lemma, present)}
    finite |= {tense: tuple(data[tense].split()) for tense in ("imp", "sub") if tense in data}
    gerund = imp_stem + "ndo" if group == "are" or imp_stem[-1] == "e" else imp_stem[:-1] + "endo"
    return finite | {
        "imp2": (data.get("imp2", present[2] if group == "are" else present[1]),),
        "imp4": (present[3],),
        "imp5": (data.get("imp5", present[4]),),
        "inf": (lemma,),
        "ger": (data.get("ger", gerund),),
        "part": (data.get("part") or root + {"are": "ato", "ere": "uto", "ire": "ito"}[group],),
    }


def prefixed(prefix: str, base: Mapping[str, str]) -> dict[str, str]:
    """Return the irregular data of a verb formed with a prefix: ri + vedere."""
    data = {key: " ".join(prefix + form for form in value.split()) for key, value in base.items() if key != "aux"}
    data.pop("imp2", None)  # fa', di': not in compounds
    return {**data, "aux": base["aux"]} if "aux" in base else data


def enclitic(host: str, clitic: str) -> str:
    """Attach a clitic to an infinitive, gerund or imperative: prendere+la, di'+lo dillo, da'+gli dagli."""
    if host.endswith("'"):
        double = "" if clitic.startswith("gli") else clitic[0]
        return host[:-1] + double + clitic
    if host.endswith("rre"):
        return host[:-2] + clitic
    if host.endswith("re") and len(host) > 3:
        return host[:-1] + clitic
    return host + clitic


def plural(noun: str, gender: str) -> str:
    """Return the regular plural of a noun; -co and -go keep their hard sound («fuoco», «fuochi»)."""
    stem, last = noun[:-1], noun[-1]
    if last not in "aeo" or len(noun) < 3:
        return noun
    if last == "a" and gender == "f":
        return feminine_plural(noun)
    if last == "o" and stem[-1] == "i":
        return stem
    return stem + ("hi" if last != "e" and stem[-1] in "cg" else "i")


def feminine_plural(form: str) -> str:
    """Return the plural of a feminine form in -a: amica amiche, arancia arance, camicia camicie."""
    stem = form[:-1]
    if stem[-1] in "cg":
        return stem + "he"
    if stem[-2:] in ("ci", "gi") and stem[-3] not in "aeiou":
        return stem[:-1] + "e"
    return stem + "e"


def adjective(lemma: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return ((masc sing, masc plur), (fem sing, fem plur)) of an adjective, determiner or participle."""
    stem = lemma[:-1]
    if lemma[-1] == "o":
        soft = lemma.endswith("ico") and lemma not in ("antico", "carico")
        return (lemma, stem + "i" if soft else plural(lemma, "m")), (stem + "a", feminine_plural(stem + "a"))
    if lemma[-1] == "e" or lemma.endswith("ista"):
        return (lemma, stem + "i"), (lemma, stem + ("e" if lemma.endswith("ista") else "i"))
    return (lemma, lemma), (lemma, lemma)
