"""Tasks with a known right answer, each a choice of two texts: the indirect object, and Italian agreement.

Indirect object: «Quando Marta e Luca sono andati al mercato, Marta ha dato un libro a» must go on with « Luca». The
counterfactual names another person instead of Luca, of the same gender (the participle agrees) and with as many tokens
(positions align).   Source: Wang et al. 2022, arXiv 2211.00593; Cunningham et al. 2023, section 4, for the counterfactual.

Agreement: pairs made for gender, number and subject-verb, or read in MultiBLiMP's layout. Right is a model that finds
the right text likelier as a whole (Warstadt et al. 2020; MultiBLiMP: Jumelet et al. 2025, arXiv 2504.02768).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sae_italian import micro_italiano
from sae_italian.analysis.latent import tokens_inside
from sae_italian.base.errors import DataError, UsageError, check_known, check_whole
from sae_italian.base.pace import paced
from sae_italian.base.report import INK, OURS, REFERENCE, svg
from sae_italian.base.statistics import Estimate, mean_interval, wilson
from sae_italian.base.storage import read_yaml
from sae_italian.corpora.rows import read_rows
from sae_italian.models.activations import check_context, check_model, continuation_log_probs, logits_at
from sae_italian.models.catalogue import resolve

CHANCE = 0.5
BATCH = 32  # pairs of texts
LEAST_NAMES = 3  # giver, indirect object, and who replaces the latter
KINDS = ("gender", "gender, attractor", "number", "subject-verb", "subject-verb, attractor")
TRIES = 50  # subjects made for each that is wanted
_ENDING = {"Masc": "i", "Fem": "e"}


class TaskScore(NamedTuple):
    """How well a model does a task of two choices; differences are in nats, intervals over the items."""

    n: int
    accuracy: Estimate
    difference: Estimate  # mean of log p(right) - log p(wrong)
    by_kind: dict[str, Estimate]  # accuracy

    def svg(self) -> str:
        """Return the accuracies by kind as a picture, chance as a line."""

        def draw(axes: Any) -> None:
            for row, share in enumerate(self.by_kind.values()):
                axes[0].barh(row, share.value, color=OURS, height=0.6)
                axes[0].plot((share.lo, share.hi), (row, row), color=INK, linewidth=1)
            axes[0].axvline(CHANCE, color=REFERENCE, linestyle=":")
            axes[0].set_yticks(range(len(self.by_kind)), list(self.by_kind))
            axes[0].invert_yaxis()
            axes[0].set(xlim=(0, 1), xlabel="right, 95 % interval")

        return svg(draw, 1, (6, 0.5 * len(self.by_kind) + 1))

    def text(self) -> str:
        """Return accuracy, its interval and the mean difference in one line."""
        value, low, high = self.accuracy
        difference = f"mean difference {self.difference.value:+.2f} nats"
        return f"{value:.1%} of {self.n} right (95 % interval {low:.1%} to {high:.1%}), {difference}"


def score(differences: Float[np.ndarray, " n"], kinds: Sequence[str]) -> TaskScore:
    """Return accuracy and mean of log p(right) - log p(wrong); a difference of 0 is not right."""
    right, named = differences > 0, np.array(kinds)
    groups = {kind: right[named == kind] for kind in dict.fromkeys(kinds)}
    shares = {kind: wilson(int(some.sum()), len(some)) for kind, some in {"": right, **groups}.items()}
    return TaskScore(len(right), shares.pop(""), mean_interval(differences), shares)


def score_choices(model: Any, tokenizer: Any, items: Sequence[tuple[str, str, str]]) -> TaskScore:
    """Return how often the right text is likelier than the wrong one, of items (right text, wrong text, kind).

    Run are only the tokens up to where the two differ, and logits computed from there on: what lies before is the same.
    Raises: UsageError for none, and for a text beyond the model's positions.
    """
    if not items:
        raise UsageError("there is no sentence to be scored; ask for 1 or more.")
    texts = [[tokenizer(text).input_ids for text in item[:2]] for item in items]
    check_context(max(len(tokens) for two in texts for tokens in two), check_model(model).config)
    found: list[Float[np.ndarray, "some 2"]] = []
    for first in paced(
        range(0, len(texts), BATCH), "pairs of texts", len(texts), "pair", size=lambda _: len(found[-1])
    ):
        pairs = []
        for two in texts[first : first + BATCH]:
            differ = (place for place, (one, other) in enumerate(zip(*two, strict=False)) if one != other)
            shared = max(1, next(differ, min(map(len, two))))
            pairs += [(tokens[:shared], tokens[shared:]) for tokens in two]
        found.append(continuation_log_probs(partial(logits_at, model), pairs).reshape(-1, 2))
    log_p = np.concatenate(found)
    return score(log_p[:, 0] - log_p[:, 1], [kind for *_, kind in items[: len(log_p)]])


def check_able(found: TaskScore, task: str, model: str) -> TaskScore:
    """Return the score. Raises: UsageError when the accuracy is not above chance, its interval considered."""
    if found.accuracy.lo <= CHANCE:
        raise UsageError(
            f"{model} does not do the task ({task}): {found.text()}, where chance is {CHANCE:.0%}. What a latent does to "
            "a skill that is not there cannot be measured; use a model that has it."
        )
    return found


def _of_language(task: str, language: str) -> Any:
    known = read_yaml(Path(__file__).with_name("data") / f"{task}.yaml")
    check_known("language", known, language)
    return known[language]


def italian_skills(model: Any, *, n: int = 300, seed: int = 1001) -> dict[str, float]:
    """Return what a model knows of MicroItaliano on n items each, as shares right, and one mean difference in nats."""
    pairs = micro_italiano.agreement_pairs(n, seed=seed)
    items = [(f"{p.prefix} {p.right}", f"{p.prefix} {p.wrong}", p.kind) for p in pairs]
    agreement, words = score_choices(model, model.tokenizer, items), default_words("micro-italiano")
    ioi = ioi_score(model, model.tokenizer, ioi_pairs(n, model.tokenizer, words, n_name_tokens=None, seed=seed))
    return {
        "agreement, all": agreement.accuracy.value,
        **{f"agreement, {kind}": share.value for kind, share in sorted(agreement.by_kind.items())},
        "indirect object, right": ioi.accuracy.value,
        "indirect object, mean difference": ioi.difference.value,
    }


# --- the indirect object ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IoiWords:
    """The words of the task; names by gender, everything else as it stands in a template."""

    names: dict[str, Sequence[str]]  # "Masc", "Fem"
    places: Sequence[str]
    objects: Sequence[str]
    templates: Sequence[str]
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
    return IoiWords(**_of_language("ioi", language))


def words_for(model: str, language: str = "it") -> IoiWords:
    """Return the words that suit a model, by any of its names: MicroItaliano's for the embedded one, which knows no others.

    Raises: UsageError for an unknown model, and as `default_words`.
    """
    embedded = resolve(model).saved_name == "sae-italian-mini"
    return default_words("micro-italiano" if embedded and language == "it" else language)


def ioi_pairs(
    n: int, tokenizer: Any, words: IoiWords | None = None, *, n_name_tokens: int | None = 1, seed: int = 0
) -> list[IoiPair]:
    """Return `n` pairs, ABBA and BABA in turn, whose two texts have the same tokens but for the indirect object.

    Every name has `n_name_tokens` tokens (None: any number, the same within a pair), and the three names of a pair differ
    in their first token. Raises: UsageError when too few names are so, saying how many have how many tokens.
    """
    check_whole(1, n=n)
    words = words or default_words()
    groups = _groups(tokenizer, words, n_name_tokens)
    return [_ioi_pair(tokenizer, words, groups, Random(f"ioi/{seed}/{i}"), i) for i in range(n)]


def _groups(tokenizer: Any, words: IoiWords, wanted: int | None) -> list[tuple[str, int, tuple[str, ...]]]:
    """Return (gender, tokens, names) with at least three names each, all of so many tokens and told apart by the first."""
    every = [(gender, name) for gender, names in words.names.items() for name in names]
    names = [name for _, name in every]
    tokens = dict(zip(names, tokens_inside(tokenizer, names, words.language), strict=True))
    groups: dict[tuple[str, int], dict[int, str]] = {}  # gender and length: the first of each first token
    for gender, name in every:
        if wanted in (None, len(tokens[name])):
            groups.setdefault((gender, len(tokens[name])), {}).setdefault(tokens[name][0], name)
    enough = [(*key, tuple(named.values())) for key, named in groups.items() if len(named) >= LEAST_NAMES]
    if not enough:
        lengths = {
            k: [name for name in tokens if len(tokens[name]) == k] for k in sorted(set(map(len, tokens.values())))
        }
        found = "; ".join(f"{len(names)} of {k}: {', '.join(names[:3])}" for k, names in lengths.items())
        raise UsageError(
            f"the task needs {LEAST_NAMES} names of one gender with {wanted or 'equally many'} token(s) that differ in "
            f"the first; names by number of tokens: {found or 'none'}. Give other names, or take names of another length: "
            "name_tokens=N or name_tokens=any (in Python n_name_tokens=N or None)."
        )
    return enough


def _ioi_pair(
    tokenizer: Any, words: IoiWords, groups: Sequence[tuple[str, int, tuple[str, ...]]], random: Random, index: int
) -> IoiPair:
    # a group is drawn by its number of names, so that every name is equally likely
    ((gender, own, names),) = random.choices(groups, weights=[len(names) for *_, names in groups])
    subject, io, new_io = random.sample(names, 3)
    order = ("ABBA", "BABA")[index % 2]
    template = random.randrange(len(words.templates))
    filling = {"place": random.choice(words.places), "object": random.choice(words.objects), "i": _ENDING[gender]}

    def text(other: str) -> str:
        first, second = (other, subject) if order == "ABBA" else (subject, other)
        return words.templates[template].format(a=first, b=second, s=subject, **filling)

    pair = IoiPair(text(io), text(new_io), io, subject, new_io, template, order)
    base, other = (tokenizer(text).input_ids for text in pair[:2])
    differ = [i for i, (one, two) in enumerate(zip(base, other, strict=False)) if one != two]
    if len(base) != len(other) or not differ or differ[-1] - differ[0] >= own:
        raise UsageError(
            f"{pair.base!r} and {pair.counterfactual!r} differ in more than the tokens of a name. "
            "A template must not begin with a name, and a space must stand before each."
        )
    return pair


def ioi_score(model: Any, tokenizer: Any, pairs: Sequence[IoiPair]) -> TaskScore:
    """Return how often the indirect object is likelier than the giver after the prompts, overall and by order.

    The difference is log p(name) - log p(name), over all tokens of a name: for names of one token, that of the logits.
    """
    return score_choices(model, tokenizer, [(f"{p.base} {p.io}", f"{p.base} {p.subject}", p.order) for p in pairs])


# --- agreement ----------------------------------------------------------------------------------------------------------


class MinimalPair(NamedTuple):
    """Two texts, the right one and one with a single wrong form; `kind` is what the forms must agree in."""

    right: str
    wrong: str
    kind: str


def _beside(random: Random, words: dict[str, Any], noun: list[str], gender: int, number: int) -> str:
    """Return «vicino alle penne», with another noun than the given one; `words` are those of a language in agreement.yaml."""
    between = random.choice([other for other in words["nouns"][gender] if other != noun])
    return f"{words['near'][gender][number]} {between[number]}"


def agreement_pairs(n: int, *, seed: int = 0, language: str = "it") -> list[MinimalPair]:
    """Return `n` pairs, the kinds in turn, each right form as often the wrong one of another pair.

    An attractor is a noun between subject and target that bears the wrong feature: «il libro vicino alle penne è». English
    has the kinds without gender. Raises: UsageError for another language than `it` and `en`.
    """
    words = _of_language("agreement", language)
    kinds = [kind for kind in KINDS if len(words["nouns"]) > 1 or not kind.startswith("gender")]
    each = ((Random(f"agreement/{seed}/{i}"), *divmod(i, len(kinds))) for i in range(n))
    return [_agreement_pair(random, words, kinds[kind], side=turn % 2) for random, turn, kind in each]


def _agreement_pair(random: Random, words: dict[str, Any], kind: str, side: int) -> MinimalPair:
    """Return a pair of the kind; `side` 0 has the masculine or the singular right, 1 the other."""
    about_gender, genders = kind.startswith("gender"), len(words["nouns"])
    gender = side if about_gender else random.randrange(genders)
    number = random.randrange(2) if about_gender else side
    noun = random.choice(words["nouns"][gender])
    prefix = f"{words['the'][gender][number]} {noun[number]}"
    if kind.endswith("attractor"):
        other = (1 - gender, number) if about_gender else (random.randrange(genders), 1 - number)
        prefix += f" {_beside(random, words, noun, *other)}"
    if kind == "number":
        forms, prefix = (noun[number], noun[1 - number]), random.choice(words["agree"])[gender][number]
    elif about_gender:
        adjective, verb = random.choice(words["adjectives"]), random.choice(words["verbs"])
        forms = adjective[2 * gender + number], adjective[2 * (1 - gender) + number]
        prefix += f" {verb[number]}"
    else:
        verb = random.choice(words["verbs"])
        forms = verb[number], verb[1 - number]
    right, wrong = (f"{prefix[0].upper()}{prefix[1:]} {form}" for form in forms)
    return MinimalPair(right, wrong, kind)


def number_pairs(n: int, tokenizer: Any, *, seed: int = 0, language: str = "it") -> list[tuple[str, str]]:
    """Return `n` pairs of subjects that differ in number alone and have equally many tokens, to patch one into the other.

    «Il libro vicino alle penne» against «I libri vicino alle penne»: what follows is a verb in the number of the first
    noun, over an attractor of either number. Singular and plural take turns as the base.
    Raises: UsageError when too few nouns have as many tokens in both numbers, and as `agreement_pairs`.
    """
    words, found = _of_language("agreement", language), []
    genders = len(words["nouns"])
    for attempt in range(TRIES * n):
        random = Random(f"number/{seed}/{attempt}")
        gender, *other = (random.randrange(many) for many in (genders, genders, 2))
        noun = random.choice(words["nouns"][gender])
        ending = _beside(random, words, noun, *other)
        articles = map(str.capitalize, words["the"][gender])
        singular, plural = (f"{the} {form} {ending}" for the, form in zip(articles, noun, strict=True))
        if len(tokenizer(singular).input_ids) == len(tokenizer(plural).input_ids):
            found.append((plural, singular) if len(found) % 2 else (singular, plural))
        if len(found) == n:
            return found
    tried = f"{len(found)} of {TRIES * n} subjects have as many tokens in both numbers"
    raise UsageError(f"{tried}, {n} wanted. Ask for fewer.")


def read_minimal_pairs(path: Path) -> list[MinimalPair]:
    """Return the pairs of a file in MultiBLiMP's layout: columns `sen`, `wrong_sen` and, where it has it, `phenomenon`.

    The file is the authors' `ita.tsv`, or the same as Parquet or JSON lines. Raises: UsageError for a missing file or
    another ending, DataError, naming the line, for a column that is not there or a pair that is empty or no pair.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file. Give MultiBLiMP's Italian file (ita.tsv).")
    pairs = []
    for line, row in read_rows(path):
        if missing := {"sen", "wrong_sen"} - set(row):
            raise DataError(
                f"{path} has no column {', '.join(sorted(missing))}; it has {', '.join(map(str, row))[:99]}."
            )
        right, wrong = (str(row[name] or "") for name in ("sen", "wrong_sen"))
        if not right.strip() or not wrong.strip() or right == wrong:
            raise DataError(f"{path}, line {line}: two different sentences were expected, found {right!r}, {wrong!r}.")
        pairs.append(MinimalPair(right, wrong, str(row.get("phenomenon") or "agreement")))
    if not pairs:
        raise DataError(f"{path} holds no pairs.")
    return pairs
