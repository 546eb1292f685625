"""Italian inflection by rule; what rules cannot know comes in as data (see data/verbs.yaml)."""

from __future__ import annotations

from collections.abc import Mapping

Paradigm = dict[str, tuple[str, ...]]

FINITE = ("pres", "imp", "fut", "cond", "sub", "subimp")
IMPERATIVES = ("imp2", "imp4", "imp5")
_FUTURE = ("ò", "ai", "à", "emo", "ete", "anno")
_CONDITIONAL = ("ei", "esti", "ebbe", "emmo", "este", "ebbero")
_IMPERFECT = ("vo", "vi", "va", "vamo", "vate", "vano")
_SUBJUNCTIVE_IMPERFECT = ("ssi", "ssi", "sse", "ssimo", "ste", "ssero")
_PRESENT = {
    "are": ("o", "i", "a", "iamo", "ate", "ano"),
    "ere": ("o", "i", "e", "iamo", "ete", "ono"),
    "ire": ("o", "i", "e", "iamo", "ite", "ono"),
    "isc": ("isco", "isci", "isce", "iamo", "ite", "iscono"),
}


def _join(stem: str, ending: str) -> str:
    """Join a stem in -are to an ending, keeping its sound: cerc+i cerchi, mangi+i mangi, mangi+erò mangerò."""
    if ending[0] in "ei":
        if stem[-1] in "cg":
            return stem + "h" + ending
        if stem[-1] == "i" and ending[0] == "i":
            return stem[:-1] + ending
        if stem[-1] == "i" and stem[-2] in "cg":
            return stem[:-1] + ending
    return stem + ending


def _present(lemma: str, isc: bool) -> tuple[str, ...]:
    group = lemma[-3:]
    if group == "are":
        return tuple(_join(lemma[:-3], ending) for ending in _PRESENT["are"])
    return tuple(lemma[:-3] + ending for ending in _PRESENT["isc" if isc else group])


def _subjunctive(lemma: str, present: tuple[str, ...]) -> tuple[str, ...]:
    second_plural = present[3][:-2] + "te"
    if lemma.endswith("are"):
        stem = lemma[:-3]
        singular, plural = _join(stem, "i"), _join(stem, "ino")
    else:
        singular = present[0][:-1] + "a"
        plural = singular + "no"
    return (singular, singular, singular, present[3], second_plural, plural)


def _participle(lemma: str) -> str:
    return lemma[:-3] + {"are": "ato", "ere": "uto", "ire": "ito"}[lemma[-3:]]


def conjugate(lemma: str, isc: bool = False, irregular: Mapping[str, str] | None = None) -> Paradigm:
    """Return the paradigm of a verb: six forms per finite tense, one for each other key.

    `irregular` may give, as strings with spaces between forms: pres (6 forms), imp_stem («face»), fut_stem («far»),
    sub (6 forms), subimp_stem («desse» is «de»), part, ger, imp2, imp5.
    Keys returned: FINITE, IMPERATIVES, inf, ger, part (masculine singular).
    """
    data = irregular or {}
    group = lemma[-3:]
    theme = lemma[:-2]
    present = tuple(data["pres"].split()) if "pres" in data else _present(lemma, isc)
    imp_stem = data.get("imp_stem", theme)
    default_future = _join(lemma[:-3], "er") if group == "are" else lemma[:-1]
    fut_stem = data.get("fut_stem", default_future)
    subjunctive = tuple(data["sub"].split()) if "sub" in data else _subjunctive(lemma, present)
    subimp_stem = data.get("subimp_stem", imp_stem)
    gerund = data.get("ger", imp_stem + "ndo" if group == "are" or imp_stem[-1] == "e" else imp_stem[:-1] + "endo")
    return {
        "pres": present,
        "imp": tuple(data["imp"].split()) if "imp" in data else tuple(imp_stem + e for e in _IMPERFECT),
        "fut": tuple(fut_stem + e for e in _FUTURE),
        "cond": tuple(fut_stem + e for e in _CONDITIONAL),
        "sub": subjunctive,
        "subimp": tuple(subimp_stem + e for e in _SUBJUNCTIVE_IMPERFECT),
        "imp2": (data.get("imp2", present[2] if group == "are" else present[1]),),
        "imp4": (present[3],),
        "imp5": (data.get("imp5", present[4]),),
        "inf": (lemma,),
        "ger": (gerund,),
        "part": (data.get("part") or _participle(lemma),),
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
    last = noun[-1]
    if last not in "aeo" or len(noun) < 3:
        return noun
    stem = noun[:-1]
    if last == "o":
        if stem[-1] == "i":
            return stem
        return stem + ("hi" if stem[-1] in "cg" else "i")
    if last == "e":
        return stem + "i"
    if gender == "m":
        return stem + ("hi" if stem[-1] in "cg" else "i")
    return feminine_plural(noun)


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
        feminine = (stem + "a", feminine_plural(stem + "a"))
        if lemma.endswith("ico") and lemma not in ("antico", "carico"):
            return (lemma, stem + "i"), feminine
        return (lemma, plural(lemma, "m")), feminine
    if lemma[-1] == "e":
        return (lemma, stem + "i"), (lemma, stem + "i")
    if lemma.endswith("ista"):
        return (lemma, stem + "i"), (lemma, stem + "e")
    return (lemma, lemma), (lemma, lemma)
