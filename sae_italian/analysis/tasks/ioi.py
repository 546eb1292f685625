"""The indirect-object task in Italian and English: pairs of sentences that differ in the indirect object alone.

«Quando Marta e Luca sono andati al mercato, Marta ha dato un libro a» must go on with « Luca». The counterfactual names
another person instead of Luca, of the same gender (the participle agrees) and with as many tokens (positions align).
Source: Wang et al. 2022, arXiv 2211.00593; Cunningham et al. 2023, section 4, for the counterfactual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from random import Random
from typing import Any, NamedTuple

import yaml

from sae_italian.analysis.tasks.scoring import TaskScore, score_choices
from sae_italian.base.errors import UsageError, nearest
from sae_italian.models.catalogue import resolve

EMBEDDED = "sae-italian-mini"
LEAST_NAMES = 3  # giver, indirect object, and who replaces the latter
_ENDING = {"Masc": "i", "Fem": "e"}
_CONJUNCTION = {"it": "e", "en": "and"}


@dataclass(frozen=True)
class IoiWords:
    """The words of the task; names by gender, everything else as it stands in a template."""

    names: dict[str, tuple[str, ...]]  # "Masc", "Fem"
    places: tuple[str, ...]
    objects: tuple[str, ...]
    templates: tuple[str, ...]
    language: str = "it"


class IoiPair(NamedTuple):
    """A prompt and its counterfactual, in which `io` is replaced by `new_io`; both end right before " " + the answer."""

    base: str
    counterfactual: str
    io: str
    subject: str
    new_io: str
    template: int
    order: str  # "ABBA": the indirect object is named first; "BABA": the giver


@lru_cache(maxsize=3)
def default_words(language: str = "it") -> IoiWords:
    """Return the words of a language for real models. Raises: UsageError for another than Italian or English."""
    data = yaml.safe_load((files("sae_italian.analysis.tasks") / "data" / "ioi.yaml").read_text(encoding="utf-8"))
    if language not in data:
        raise UsageError(f"language {language!r} has no indirect-object sentences. {nearest(language, ('it', 'en'))}")
    entry = data[language]
    names = {gender: tuple(text.split()) for gender, text in entry["names"].items()}
    places, objects, templates = (tuple(entry[key]) for key in ("places", "objects", "templates"))
    return IoiWords(names, places, objects, templates, "en" if language == "en" else "it")


def words_for(model: str, language: str = "it") -> IoiWords:
    """Return the words that suit a model, by any of its names: MicroItaliano's for the embedded one, which knows no others.

    Raises: UsageError for an unknown model, and as `default_words`.
    """
    embedded = resolve(model).saved_name == EMBEDDED
    return default_words("micro-italiano" if embedded and language == "it" else language)


def name_tokens(tokenizer: Any, name: str, language: str = "it") -> tuple[int, ...]:
    """Return the tokens of " " + name in the middle of a sentence."""
    before = _CONJUNCTION.get(language, "e")
    alone = tokenizer(before, add_special_tokens=False).input_ids
    return tuple(tokenizer(f"{before} {name}", add_special_tokens=False).input_ids[len(alone) :])


def ioi_pairs(
    n: int, tokenizer: Any, words: IoiWords | None = None, *, n_name_tokens: int | None = 1, seed: int = 0
) -> list[IoiPair]:
    """Return `n` pairs, ABBA and BABA in turn, whose two texts have the same tokens but for the indirect object.

    Every name has `n_name_tokens` tokens (None: any number, the same within a pair), and the three names of a pair differ
    in their first token; names of other lengths are left out.
    Raises: UsageError when a list is empty, or too few names have the wanted number of tokens; the message says how many
    have how many.
    """
    words = words or default_words("it")
    if n < 1:
        raise UsageError(f"the number of sentences is {n}; it must be 1 or more.")
    for what in ("places", "objects", "templates"):
        if not getattr(words, what):
            raise UsageError(f"the list of {what} is empty. Give at least one.")
    if set(words.names) - set(_ENDING):
        raise UsageError(f"names are listed by gender, {' and '.join(_ENDING)}; found {', '.join(words.names)}.")
    groups = _groups(tokenizer, words, n_name_tokens)
    return [_pair(tokenizer, words, groups, Random(f"ioi/{seed}/{index}"), index) for index in range(n)]


def _groups(tokenizer: Any, words: IoiWords, wanted: int | None) -> list[tuple[str, tuple[str, ...]]]:
    """Return (gender, names) with at least three names each, all of one length in tokens and told apart by the first."""
    groups: dict[tuple[str, int], dict[int, str]] = {}
    lengths: dict[int, list[str]] = {}
    for gender, names in words.names.items():
        for name in names:
            tokens = name_tokens(tokenizer, name, words.language)
            lengths.setdefault(len(tokens), []).append(name)
            if wanted in (None, len(tokens)):
                groups.setdefault((gender, len(tokens)), {}).setdefault(tokens[0], name)
    enough = [(gender, tuple(named.values())) for (gender, _), named in groups.items() if len(named) >= LEAST_NAMES]
    if not enough:
        found = "; ".join(f"{len(names)} of {k}: {', '.join(names[:3])}" for k, names in sorted(lengths.items()))
        raise UsageError(
            f"the task needs {LEAST_NAMES} names of one gender with {wanted or 'equally many'} token(s) that differ in "
            f"the first; names by number of tokens: {found or 'none'}. Give other names, or ask for names of any length."
        )
    return enough


def _pair(
    tokenizer: Any, words: IoiWords, groups: Sequence[tuple[str, tuple[str, ...]]], random: Random, index: int
) -> IoiPair:
    # a group is drawn by its number of names, so that every name is equally likely
    ((gender, names),) = random.choices(groups, weights=[len(names) for _, names in groups])
    subject, io, new_io = random.sample(names, 3)
    order = ("ABBA", "BABA")[index % 2]
    template = random.randrange(len(words.templates))
    filling = {"place": random.choice(words.places), "object": random.choice(words.objects), "i": _ENDING[gender]}

    def text(other: str) -> str:
        first, second = (other, subject) if order == "ABBA" else (subject, other)
        return words.templates[template].format(a=first, b=second, s=subject, **filling)

    pair = IoiPair(text(io), text(new_io), io, subject, new_io, template, order)
    _check_aligned(tokenizer, words, pair)
    return pair


def _check_aligned(tokenizer: Any, words: IoiWords, pair: IoiPair) -> None:
    """Refuse a template in which the two texts differ in more than the name's own tokens. Raises: UsageError."""
    base, other = (tokenizer(text).input_ids for text in (pair.base, pair.counterfactual))
    n = len(name_tokens(tokenizer, pair.io, words.language))
    differ = [i for i, (one, two) in enumerate(zip(base, other, strict=False)) if one != two]
    if len(base) != len(other) or not differ or differ[-1] - differ[0] >= n:
        raise UsageError(
            f"{pair.base!r} and {pair.counterfactual!r} differ in more than the tokens of a name. "
            "A template must not begin with a name, and a space must stand before each."
        )


def ioi_score(model: Any, tokenizer: Any, pairs: Sequence[IoiPair]) -> TaskScore:
    """Return how often the indirect object is likelier than the giver after the prompts, overall and by order.

    The difference is log p(name) - log p(name), over all tokens of a name: for names of one token, that of the logits.
    """
    choices = [(p.base, f"{p.base} {p.io}", f"{p.base} {p.subject}", p.order) for p in pairs]
    return score_choices(model, tokenizer, choices)
