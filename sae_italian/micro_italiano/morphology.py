"""Italian inflection by rule; what rules cannot know comes in as data (see data/verbs.yaml)."""

from __future__ import annotations

from collections.abc import Mapping

Paradigm = dict[str, tuple[str, ...]]

IMPERATIVES = ("imp2", "imp4", "imp5")
_PRESENT = {"are": "o i a iamo ate ano", "ere": "o i e iamo ete ono", "ire": "o i e iamo ite ono"}
_ISC = "isco isci isce iamo ite iscono"
_ENDINGS = {
    "imp": "vo vi va vamo vate vano",
    "fut": "ò ai à emo ete anno",
    "cond": "ei esti ebbe emmo este ebbero",
    "subimp": "ssi ssi sse ssimo ste ssero",
}
FINITE = ("pres", "imp", "fut", "cond", "sub", "subimp")


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
