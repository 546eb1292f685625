"""Explaining and scoring one latent by rule: all that needs a cache and no run, so that it can be done anywhere.

A unit of work is a batch of latents; who does it elsewhere than in this process opens the cache there with `open_work`.

A latent may also be explained while somebody waits. What a reader happened to ask about is no random draw: no summary, no
control and no resumed run may count it. So it is kept in the same store under its explainer's name with `@now` behind it,
says in its notes when and how it was made, and gives way to the next one.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from sae_italian.autointerp.choose import EXPLAINER, LOOKUP, RuleExplainer
from sae_italian.autointerp.draws import MIN_LENGTH, ExampleSource, find_neighbours
from sae_italian.autointerp.examples import (
    LEAST_PAIRS,
    ConstantJudge,
    LatentExamples,
    RuleJudge,
    latent_examples,
    promoted_tokens,
)
from sae_italian.autointerp.places import Places
from sae_italian.autointerp.scorers import Asked, score_rows
from sae_italian.autointerp.scorers.binary import HEADLINE
from sae_italian.autointerp.store import NOW, Explanation, Row, Store
from sae_italian.base.errors import DataError, SaeItalianError, check_whole
from sae_italian.base.storage import fingerprint, utc_now
from sae_italian.cache import FeatureCache
from sae_italian.cache.passages import LatentActivations
from sae_italian.models import load_tokenizer

SHUFFLED = "shuffled"  # the control of another latent's explanation
TITLE = "title"  # the score of the latent's title, where the explanation's own stands
WHOLE = "whole rule"  # the rule as it was fitted, of which the explanation displays a part
LEAST_POSITIVES = (10, 5, 10)  # segments of train, val and test

Trio = tuple[Explanation, Explanation, Explanation | None]  # of a latent, its lookup, another latent


@dataclass(frozen=True)
class AutointerpConfig:
    """What decides the explanations and scores."""

    width: int = 32
    """Longest example, in tokens."""
    n_examples: int = 50
    """Positives per latent and part of the documents; as many negatives of each source."""
    latents: int | None = None
    """How many live latents, drawn at random; default: all, the dead ones among them."""
    seed: int = 0
    """Seed of every random draw."""

    def __post_init__(self) -> None:
        for name, least in (("width", MIN_LENGTH), ("n_examples", LEAST_PAIRS), ("latents", 1), ("seed", 0)):
            if (number := getattr(self, name)) is not None:
                check_whole(least, **{name: number})
                object.__setattr__(self, name, int(number))  # NumPy's numbers are none of JSON


def stored_config(store: Store) -> AutointerpConfig:
    """Return the settings that a store's explanations were made with, the defaults where it says nothing. Raises: DataError."""
    names = AutointerpConfig.__dataclass_fields__
    settings = ", ".join(f'"{name}": {value}' for name, value in store.notes().items() if name in names)
    try:
        return TypeAdapter(AutointerpConfig).validate_json("{" + settings + "}")
    except ValidationError as error:
        raise DataError(f"{store.path} is not of a run ({settings}). Remove it or name another file.") from error


def cache_identity(cache: FeatureCache) -> dict[str, str]:
    """Return what a store remembers of the cache it belongs to."""
    return {"cache": fingerprint(cache.manifest.model_dump(exclude={"versions", "sae"}))}


class Work:
    """Examples, rules and their scores of one cache's latents."""

    def __init__(self, cache: FeatureCache, tokenizer: Any, config: AutointerpConfig, sae: Any = None):
        """Raises: UsageError when the tokenizer is not the one that the cache was built with."""
        cache.check_tokenizer(tokenizer)
        self.cache, self.config = cache, config
        self.latents = list(range(cache.manifest.d_sae))
        if config.latents is not None:
            live = np.flatnonzero(cache.statistics["count"] > 0)
            self.latents = sorted(np.random.default_rng(config.seed).permutation(live)[: config.latents].tolist())
        neighbours = find_neighbours(cache, self.latents, sae)
        self.source = ExampleSource(cache, neighbours, width=config.width, seed=config.seed)
        self.places = Places(self.source, tokenizer)
        self.explainer, self.judge = RuleExplainer(self.places, config.n_examples), RuleJudge(self.places)
        self.given = tokenizer, config, sae

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the cache anew."""
        return open_work, (self.cache.folder, *self.given)

    def prepare(self) -> None:
        """Compute now what every latent needs, so that processes forked afterwards share it."""
        import sklearn.tree  # noqa: F401  # two seconds, once instead of in every process

        self.places.prepare()
        self.source.prepare()

    def explain(self, latent: int) -> tuple[tuple[Any, ...], list[Explanation]]:
        """Return how much there is to see of a latent (a row of `feature`); its best rule and lookup, or why there is none."""
        activity, statistics = self.source.activity(latent), self.cache.statistics
        parts = self.source.usable_part[activity.active]
        n = [int((parts == number).sum()) for number in range(len(LEAST_POSITIVES))]
        n_active, maximum = int(statistics["count"][latent]), float(statistics["max"][latent])
        feature = latent, n_active, maximum, *n
        if any(found < least for found, least in zip(n, LEAST_POSITIVES, strict=True)):
            status = "too few activations" if n_active else "dead"
            return feature, [Explanation(latent, name, status, "", "", None) for name in (EXPLAINER, LOOKUP)]
        return feature, self.explainer.explain(activity)

    def score(
        self, own: Explanation, lookup: Explanation, stranger: Explanation | None = None
    ) -> tuple[list[Row], list[Row]]:
        """Return the score rows of a latent's rule, its token lookup, the whole rule, and another latent's as control."""
        asked = [
            Asked(self.judge, own),
            Asked(self.judge, lookup),
            Asked(RuleJudge(self.places, "whole"), own, WHOLE),
        ]
        if (own.rule or {}).get("title"):  # a rule that no key makes has none
            asked.append(Asked(RuleJudge(self.places, "title"), own, TITLE, only=HEADLINE))
        if stranger is not None:
            asked.append(Asked(self.judge, stranger, SHUFFLED))
        always = [Asked(ConstantJudge(answer), own, only=HEADLINE) for answer in (True, False)]
        return score_rows([*asked, *always], self.examples(own.latent, n_train=0))

    def examples(self, latent: int, **settings: Any) -> LatentExamples:
        """Return what is shown of a latent; `settings` are those of `latent_examples`."""
        return latent_examples(self.source, latent, **{"n_test": self.config.n_examples, **settings})

    def promoted(self, latent: int) -> tuple[str, ...]:
        """Return the tokens whose logits a latent raises most, those that the cache's text never has left out."""
        return promoted_tokens(self.cache, self.places.strings, latent)


def open_work(folder: Path, *arguments: Any) -> Work:
    """Return the work on the cache in a folder, ready."""
    work = Work(FeatureCache.open(folder), *arguments)
    work.prepare()
    return work


def do_batch(work: Work, unit: tuple[Literal["explain", "score"], list[tuple[Any, ...]]]) -> list[Any]:
    """Explain or score a batch of latents, each by its arguments: a unit of work."""
    what, batch = unit
    return [getattr(work, what)(*arguments) for arguments in batch]


# --- one latent, while somebody waits --------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _work_on(cache: FeatureCache) -> Work:
    """Return the work on a cache, kept: to open it takes seconds."""
    return Work(cache, load_tokenizer(cache.manifest.model), AutointerpConfig())


def explain_latent(latent: LatentActivations) -> Explanation:
    """Return the rule of one latent, made now and stored nowhere; its `status` says why where there is none."""
    _, (rule, _) = _work_on(latent.cache).explain(latent.latent)
    return rule


def config_of(path: Path) -> AutointerpConfig:
    """Return a store's settings, those of any latent, so that what is made now compares with the run; else the defaults."""
    with suppress(SaeItalianError), Store(path, {}, read_only=True) as store:
        return replace(stored_config(store), latents=None)
    return AutointerpConfig()


def keep(path: Path, work: Work, found: Sequence[Explanation]) -> str:
    """Keep explanations of one latent made on demand, a rule with its scores; return why that was not possible, or "".

    `found` are a rule, the token lookup, and others. Those without a text, and those that a run's say word for word
    already, are not kept again.
    """
    new = {explanation.explainer: explanation for explanation in found if explanation.status == "ok"}
    if not new:
        return ""
    now = {"when": utc_now(), "settings": {name: n for name, n in asdict(work.config).items() if name != "latents"}}
    try:
        with Store(path, cache_identity(work.cache)) as store:
            known = store.explanations_of(found[0].latent)
            kept = {name: e for name, e in new.items() if name != LOOKUP and not _same(known.get(name), e)}
            # the lookup is only there for a rule to be set against
            pair = {name: new[name] for name in (EXPLAINER, LOOKUP) if name in new and EXPLAINER in kept}
            noted = [(name + NOW, e, (e.notes or {}) | {"now": now}) for name, e in (kept | pair).items()]
            ids = store.replace_explanations([e._replace(explainer=name, notes=notes) for name, e, notes in noted])
            if len(pair) == 2:
                store.add_scores(*work.score(*(e._replace(id=ids[name + NOW]) for name, e in pair.items())))
    except (SaeItalianError, sqlite3.Error, OSError) as error:
        return " ".join(str(error).split())
    return ""


def _same(known: Explanation | None, other: Explanation) -> bool:
    told = (other.text_it, other.text_en)
    return known is not None and known.status == "ok" and (known.text_it, known.text_en) == told


def with_now(found: dict[str, dict[int, Explanation]]) -> dict[str, dict[int, Explanation]]:
    """Return explanations by explainer and latent with those made on demand in the places that a run left empty.

    They are told by their `explainer`, which keeps its `@now`. One that says something else than the run's stays under
    its own name; one that says the same is left out.
    """
    merged = {name: dict(own) for name, own in found.items() if not name.endswith(NOW)}
    made = [explanation for name, own in found.items() if name.endswith(NOW) for explanation in own.values()]
    for explanation in made:
        of_run = merged.setdefault(explanation.explainer.removesuffix(NOW), {})
        known = of_run.get(explanation.latent)
        if known is None or known.status != "ok":
            of_run[explanation.latent] = explanation
        elif not _same(known, explanation):
            merged.setdefault(explanation.explainer, {})[explanation.latent] = explanation
    return merged


def made_now(explanation: Explanation) -> str:
    """Return when an explanation was made on demand (ISO 8601), empty for a run's."""
    now: Any = (explanation.notes or {}).get("now")
    return now["when"] if explanation.explainer.endswith(NOW) and now else ""
