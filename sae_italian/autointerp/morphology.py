"""What kinds a word of Italian belongs to, for the titles of latents: from a lemmatiser, endings and the closed classes.

A kind is a text such as "lemma venire", "verb past", "noun fem plur". The lemmatiser is simplemma (Barbaresi; its word
lists come from Wiktionary, Universal Dependencies and others), which says nothing of parts of speech: these are read off
the pair of form and lemma. A word stands for itself, out of context, so «la» is an article and never a pronoun. How often
this is right on Universal Dependencies: `make bench TABLE=titles` (docs/scores.md).
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Int

GENDERS = {"o": "masc sing", "a": "fem sing", "i": "masc plur", "e": "fem plur"}
LEXICON = "simplemma"
_VERB = re.compile(r"(are|ere|ire|rre)$")
_ENCLITIC = re.compile(r"([aei]r|[ae]ndo)(mi|ti|si|ci|vi|lo|la|li|le|ne|gli|(me|te|se|ce|ve|glie)(lo|la|li|le|ne))$")
_PARTICIPLE = re.compile(r"([aui]t|tt|st|rt|nt|lt|[aeiou]s|rs|ls|ss)[oaie]$")
_TENSES = {  # of what follows the stem, or of the whole word where the stem changes; the first that fits
    "future": re.compile(r"r(ò|ai|à|emo|ete|anno)$"),
    "conditional": re.compile(r"r(ei|esti|ebbe|emmo|este|ebbero)$"),
    "imperfect": re.compile(r"[aei]v(o|i|a|amo|ate|ano)$"),
    "gerund": re.compile(r"[ae]ndo$"),
    "subjunctive": re.compile(r"[aei]ss(i|e|imo|ero)$"),
    "past": re.compile(r"([òì]|[aei]rono|[aei]mmo|asti|^[aei]i|ett(e|ero)|[slrdpnc]ero)$"),
}
_FEMININE = re.compile(r"([zsg]ion[ei]|stion[ei]|tric[ei]|t[àù])$")
_STRONG_PAST = re.compile(r"(nn|cqu|pp|(?<!re)bb)(i|e|ero)$")  # venne, nacque, seppe, ebbe
_STRONG_PAST_IN_ERE = re.compile(r"([rln]?s|ss|ll)e$")  # prese, scrisse, volle


class KindTable(NamedTuple):
    """Kinds of word by number, and which words are of each."""

    names: list[str]
    of_word: scipy.sparse.csc_matrix  # [words, kinds], 1 where a word is of a kind

    def words(self, kind: str) -> Int[np.ndarray, " n"]:
        """Return the numbers of the words of a kind."""
        begin, end = self.of_word.indptr[self.names.index(kind) :][:2]
        return self.of_word.indices[begin:end].astype(np.int64)


def table_of_kinds(words: Sequence[str]) -> KindTable:
    """Return the kinds of these words, without the lemmas that one of them alone has.

    There are none without the lemmatiser: pip install 'sae-italian[titles]'.
    """
    own = [kinds_of(word) if find_spec(LEXICON) else () for word in words]
    counts = Counter(kind for kinds in own for kind in kinds)
    names = [kind for kind, n in counts.items() if n > 1 or not kind.startswith("lemma ")]
    number = {kind: i for i, kind in enumerate(names)}
    at = [(row, number[kind]) for row, kinds in enumerate(own) for kind in kinds if kind in number]
    rows, columns = np.array(at, dtype=np.int64).reshape(-1, 2).T
    shape = len(words), len(names)
    return KindTable(names, scipy.sparse.csc_matrix((np.ones(len(at)), (rows, columns)), shape=shape))


@cache
def lemma_of(word: str) -> str:
    """Return the dictionary form of a word in small letters, the word itself where it is not known."""
    import simplemma

    return simplemma.lemmatize(word, lang="it").lower()


@cache
def kinds_of(word: str) -> tuple[str, ...]:
    """Return the kinds of a word in small letters, the more special ones after the general; () for what is no word."""
    word = word.replace("’", "'")
    if closed := _closed().get(word):
        return closed + (("lemma " + lemma_of(word),) if word in _verbs() else ())
    if not word.isalpha() or (len(word) < 2 and word not in _verbs()):
        return ()
    lemma = lemma_of(word)
    if word.endswith("mente") and lemma == word != "mente":
        return ("adverb",)
    found = _kinds_of_verb(word, lemma) if _is_verb(lemma) else _without_clitic(word) or _kinds_of_noun(word, lemma)
    return *found, f"lemma {lemma}"


def enclitic(word: str) -> str | None:
    """Return the pronouns that an infinitive or gerund ends in, e.g. `lo` of `vederlo`, `glielo`, or None.

    Half of what looks like it is not (`capitale`, `diversi`): the lemmatiser tells, where there is one.
    """
    match = _ENCLITIC.search(word)
    return match[2] if match and match.start() and (not find_spec(LEXICON) or _without_clitic(word)) else None


def _without_clitic(word: str) -> tuple[str, ...]:
    """Return the kinds of an infinitive or gerund with a pronoun at its end; () for others."""
    from simplemma import is_known

    match = _ENCLITIC.search(word)
    stem = word[: match.start(2)] if match else ""
    if stem.endswith("ndo"):
        return ("verb", "verb gerund") if _is_verb(lemma_of(stem)) else ()
    whole = next((stem + end for end in ("e", "re") if stem and is_known(stem + end, lang="it")), "")
    return ("verb", "verb infinitive") if _is_verb(whole) and lemma_of(whole) == whole else ()


def _kinds_of_verb(word: str, lemma: str) -> tuple[str, ...]:
    """Return tense or mood of a verb's form, and its person where the ending tells."""
    if word == lemma:
        return "verb", "verb infinitive"
    if bare := _without_clitic(word):
        return bare
    ending = word.removeprefix(lemma[:-3])
    tense = _verbs().get(word) or _tense(word, ending, lemma)
    if tense == "participle":
        return ("verb", "participle", *agreeing("participle", GENDERS[word[-1]]))
    if tense in ("gerund", "infinitive"):
        return "verb", f"verb {tense}"
    if word.endswith(("nte", "nti")):  # a present participle
        return tuple(agreeing("", "plur")) if word[-1] == "i" else ()
    third, first = ending.endswith(("no", "ro")), ending.endswith("mo")
    return ("verb", f"verb {tense}", *["verb third plural"] * third, *["verb first plural"] * first)


def _tense(word: str, ending: str, lemma: str) -> str:
    """Return the tense or mood that the ending of a verb's form tells; the present where none does."""
    weak = lemma.endswith(("ere", "rre"))
    strong = (weak and _STRONG_PAST_IN_ERE.search(word)) or (len(ending) > 1 and _STRONG_PAST.search(word))
    if strong and not ending.startswith("ess"):
        return "past"
    found = next((name for name, known in _TENSES.items() if known.search(ending)), "")
    if found == "subjunctive" and weak and not ending.startswith("ess"):
        return "past"  # scrissero
    if _PARTICIPLE.search(word) and (not found or found == "past") and _is_participle(word, lemma):
        return "participle"  # "parlate" is a second person too, but far rarer in writing
    return found or "present"


def _is_participle(word: str, lemma: str) -> bool:
    """Tell «visto» from «visita» and «presento»: the masculine is known to be of the same verb, or it is regular."""
    masculine = word[:-1] + "o"
    regular = masculine in (lemma[:-3] + ending for ending in ("ato", "uto", "ito"))
    irregular = lemma.endswith(("ere", "ire", "rre")) or lemma in ("fare", "dare")
    return regular or (irregular and masculine[:-1] != lemma[:-3] and lemma_of(masculine) == lemma)


def _kinds_of_noun(word: str, lemma: str) -> tuple[str, ...]:
    """Return gender and number of what is no verb: an adjective where the lemmatiser knows all of its four endings."""
    last, ending = word[-1], lemma[-1:]
    if ending == "o" and _has_four_endings(lemma) and last in GENDERS:
        return ("adjective", *agreeing("adjective", GENDERS[last]))
    if feminine := _FEMININE.search(word):
        return ("noun", *agreeing("noun", {"e": "fem sing", "i": "fem plur"}.get(feminine[0][-1], "fem")))
    if lemma in _lists()["masculine"].split():
        return ("noun", *agreeing("noun", "masc plur" if last == "i" else "masc sing"))
    if ending + last in ("aa", "ae", "oo", "oi"):
        return ("noun", *agreeing("noun", GENDERS[last]))
    return tuple(agreeing("", "plur")) if last == "i" and ending in "ea" else ()


def agreeing(kind: str, feature: str) -> Iterator[str]:
    """Yield the kinds of a word that agrees: its own with gender and number, and any word's with each and both."""
    for each in dict.fromkeys((feature, *feature.split())):
        yield from (f"{name} {each}" for name in (kind, "any") if name)


def _is_verb(lemma: str) -> bool:
    """Tell «venire» from «bicchiere»: the lemmatiser knows its gerund."""
    if not _VERB.search(lemma) or lemma in _lists()["nouns"].split():
        return False
    gerund = lemma[:-3] + ("ando" if lemma.endswith("are") else "endo")
    return lemma.endswith("rre") or _verbs().get(lemma) == "infinitive" or lemma_of(gerund) == lemma


@cache
def _has_four_endings(lemma: str) -> bool:
    stem = lemma[:-1]
    hard = stem + "h" if stem[-1:] in "cg" else stem
    return lemma_of(stem + "a") == lemma and lemma_of(hard + "e") == lemma


@cache
def _lists() -> dict[str, Any]:
    import yaml

    return yaml.safe_load(resources.files("sae_italian.autointerp").joinpath("italian.yaml").read_text("utf-8"))


@cache
def _verbs() -> dict[str, str]:
    """Return the tense of each form that the endings would tell wrongly."""
    return {word: tense for tense, words in _lists()["tenses"].items() for word in words.split()}


@cache
def _closed() -> dict[str, tuple[str, ...]]:
    """Return the kinds of the words of the closed classes."""
    found: dict[str, list[str]] = {}

    def add(word: str, *kinds: str) -> None:
        own = found.setdefault(word, [])
        own += [kind for kind in kinds if kind not in own]

    for kind, words in _lists()["classes"].items():
        for word in words.split():
            add(word, kind, f"{kind} {word}")
    for kind, forms in _lists()["agreeing"].items():
        for feature, words in forms.items():
            for word in words.split():
                add(word, kind, f"{kind} {word}", *agreeing(kind, feature), *agreeing("adjective", feature))
    for plain, forms in _lists()["contracted"].items():
        add(plain, f"with {plain}")
        for feature, words in forms.items():
            for word in words.split():
                add(word, "contracted", f"with {plain}", *agreeing("contracted", feature))
    return {word: tuple(kinds) for word, kinds in found.items()}
