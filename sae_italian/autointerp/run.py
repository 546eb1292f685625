"""Explain latents and score the explanations, with the controls that give the scores a meaning."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sae_italian.autointerp.choose import EXPLAINER, LOOKUP
from sae_italian.autointerp.examples import RULE, Explainer, Judge, LatentExamples
from sae_italian.autointerp.scorers import Asked, score_rows
from sae_italian.autointerp.store import NO_ANSWER, Explanation, Row, Store
from sae_italian.autointerp.work import SHUFFLED, AutointerpConfig, Trio, Work, cache_identity, do_batch, stored_config
from sae_italian.base.errors import UsageError, check_whole
from sae_italian.base.pace import progress
from sae_italian.base.storage import locked, path_of
from sae_italian.base.units import in_threads, map_units
from sae_italian.cache import FeatureCache, build_cache
from sae_italian.evaluation.diagnosis import activations
from sae_italian.saes.baselines import CALIBRATION_TOKENS, random_twin

STORE_FILE, TWIN_FOLDER = "autointerp.sqlite", "random-twin"
NOTHING_SAID = "empty"  # the control of a text that explains nothing
SAYS_NOTHING = {"it": "Un testo qualsiasi.", "en": "Any text at all."}
N_SEGMENTS = 20  # positives of a latent that a model reads, and as many negatives of each source
N_TRAIN = 40  # training positives drawn for explainers that do not say how many they want
_BATCH = 16  # latents that are worked out and stored together


def run_autointerp(
    cache: FeatureCache | str | Path,
    tokenizer: Any,
    config: AutointerpConfig | None = None,
    *,
    store: str | Path | None = None,
    sae: Any = None,
    explainers: Sequence[Explainer] = (),
    judges: Sequence[Judge] = (),
    workers: int = 1,
    run_units: Callable[..., Iterator[Any]] | None = None,
) -> Path:
    """Explain and score the latents of a cache, open or by its folder, with rules and the rule judge; return the store's path.

    `explainers` and `judges` come on top of these: every judge answers for every one of the explainers (for the rules'
    texts when there are none), on the same examples. `sae` gives the decoder neighbours where the cache does not know
    them. The store defaults to `autointerp.sqlite` in the cache. A run that was stopped continues where it was. Latents
    with too few examples in any part are stored as such, never scored. The rules are worked out in `workers` processes
    here, or by `run_units` (`map_units` with an engine), in batches of latents.

    Raises: UsageError when the tokenizer is not the cache's, the store belongs to another cache or configuration, or
    another process works in its folder.
    """
    cache = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    config, store = config or AutointerpConfig(), path_of(store or cache.folder / STORE_FILE)
    work = Work(cache, tokenizer, config, sae)
    with locked(store.parent), Store(store, cache_identity(cache) | asdict(config)) as opened:
        run = Run(work, opened)
        run.rules(workers, run_units)
        for explainer in explainers:
            run.explain_with(explainer)
        for judge in judges:
            for name in [explainer.name for explainer in explainers] or [EXPLAINER]:
                run.score_with(judge, name)
    return store


@dataclass(frozen=True)
class Run:
    """The work on one cache, and one open store."""

    work: Work
    store: Store

    def rules(self, workers: int = 1, run_units: Callable[..., Iterator[Any]] | None = None) -> None:
        """Explain every latent by a rule and by token lookup, then score these with the rule judge."""
        if run_units is None:
            self.work.prepare()

        def batches(what: str, items: Sequence[tuple[Any, ...]]) -> Iterator[list[Any]]:
            units = [(what, items[first : first + _BATCH]) for first in range(0, len(items), _BATCH)]
            # forked, so that the processes share what this one has prepared
            here = partial(map_units, workers=min(workers, max(1, len(units))), fork=True)
            with progress(what, total=len(items), unit="latent") as bar:
                for result in (run_units or here)(partial(do_batch, self.work), units):
                    bar.update(len(result))
                    yield result

        done = self.store.explanations(EXPLAINER)
        for batch in batches("explain", [(n,) for n in self.work.latents if n not in done]):
            features, explanations = zip(*batch, strict=True)
            self.store.add_explanations(chain.from_iterable(explanations), features)
        for batch in batches("score", self._unscored(EXPLAINER, RULE)):
            scores, falls = map(chain.from_iterable, zip(*batch, strict=True))
            self.store.add_scores(scores, falls)

    def _unscored(self, explainer: str, judge: str, draw: int | None = None) -> list[Trio]:
        """Return an explainer's explanations that a judge has not scored, each with the latent's lookup and a stranger's.

        With `draw` only those of so many latents are looked at, drawn at random.
        """
        own, lookup = self.store.explanations(explainer), self.store.explanations(LOOKUP)
        live = [latent for latent, explanation in own.items() if explanation.status == "ok"]
        if draw is not None:
            live = np.random.default_rng(self.work.config.seed).permutation(sorted(live))[:draw].tolist()
        stranger, done = strangers(live, self.work.config.seed), self.store.scored(explainer, judge)
        return [(own[n], lookup[n], own.get(stranger.get(n, -1))) for n in live if n not in done]

    def explain_with(self, explainer: Explainer) -> None:
        """Explain with another explainer the latents that have a rule; the others keep their status under its name."""
        self._claim(explainer)
        rules, known = self.store.explanations(EXPLAINER), self.store.explanations(explainer.name)
        done = {latent for latent, explanation in known.items() if explanation.status != NO_ANSWER}
        left = {latent: rule for latent, rule in rules.items() if latent not in done}
        unexplained = [rule._replace(explainer=explainer.name) for rule in left.values() if rule.status != "ok"]
        self.store.add_explanations(unexplained)
        todo = [latent for latent, rule in left.items() if rule.status == "ok"]
        n_train = getattr(explainer, "n_train", N_TRAIN)
        shown = (self.work.examples(n, n_train=n_train, promoted=self.work.promoted(n)) for n in todo)
        found = in_threads(explainer.explain, shown, getattr(explainer, "concurrency", 1))
        for explanations in progress(explainer.name, found, total=len(todo), unit="latent"):
            self.store.add_explanations(explanations)

    def _claim(self, who: Explainer | Judge) -> None:
        """Hold an explainer or judge to the settings (prompts, examples) that its earlier work here had."""
        if (settings := getattr(who, "settings", None)) is not None:
            self.store.claim(f"{type(who).__name__} {who.name}", settings, judge=not hasattr(who, "explain"))

    def score_with(
        self, judge: Judge, name: str, *, draw: int | None = None, nothing: str = "", **settings: Any
    ) -> None:
        """Let a judge score one explainer's explanations, and as control each on another latent's examples.

        With `draw` only so many of them, at random; `nothing` is a text that explains nothing, scored as one more control.
        `settings` are those of `latent_examples`.
        """
        self._claim(judge)
        todo = self._unscored(name, judge.name, draw)

        def score(item: tuple[LatentExamples, Trio]) -> tuple[list[Row], list[Row], list[Row]]:
            examples, (own, lookup, stranger) = item
            asked = [Asked(judge, own)]
            if stranger is not None:
                asked.append(Asked(judge, stranger, SHUFFLED))
            if nothing:
                empty = Explanation(own.latent, "", "ok", nothing, nothing, None, id=own.id)
                asked.append(Asked(judge, empty, NOTHING_SAID))
            rows = score_rows([*asked, Asked(self.work.judge, lookup._replace(id=0))], examples)
            return *rows, [judgement for one in asked for judgement in one.judgements(own.latent)]

        shown = ((self.work.examples(known[0].latent, n_train=0, **settings), known) for known in todo)
        found = in_threads(score, shown, getattr(judge, "concurrency", 1))
        for rows in progress(judge.name, found, total=len(todo), unit="latent"):
            self.store.add_scores(*rows)


def strangers(latents: Sequence[int], seed: int) -> dict[int, int]:
    """Return for each latent another one, at random and each once; nobody keeps its own. {} for fewer than two."""
    shuffled = np.random.default_rng(seed).permutation(np.asarray(latents)).tolist()
    return dict(zip(shuffled, shuffled[1:] + shuffled[:1], strict=True)) if len(latents) > 1 else {}


# --- the models' own scores, and the untrained control ---------------------------------------------------------------


def score_with_models(
    cache: FeatureCache,
    tokenizer: Any,
    store: Path,
    judges: Sequence[Judge],
    *,
    latents: int,
    explainer: str = EXPLAINER,
) -> None:
    """Add to a store what an encoder and the subject model say of some of its explanations; goes on where it stopped.

    `latents` explained latents are drawn at random with the run's seed; each is judged beside another latent's
    explanation and a sentence that explains nothing, on few segments, as each costs forward passes.

    Raises: UsageError when the store belongs to another cache, the tokenizer is not the cache's, or the explainer
    explained nothing.
    """
    check_whole(1, latents=latents)
    with Store(store, cache_identity(cache)) as opened:
        if not any(known.status == "ok" for known in opened.explanations(explainer).values()):
            known = ", ".join(opened.explainers()) or "none"
            raise UsageError(f"{store} has no explanations by {explainer!r}; there are those of: {known}.")
        run = Run(Work(cache, tokenizer, stored_config(opened)), opened)
        few: dict[str, Any] = {"draw": latents, "n_test": N_SEGMENTS, "sources": ("random", "same-token")}
        for judge in judges:
            run.score_with(judge, explainer, nothing=SAYS_NOTHING[getattr(judge, "language", "it")], **few)


def random_sae_control(cache: FeatureCache, sae: Any, model: Any, config: AutointerpConfig, **others: Any) -> Path:
    """Build the cache of the random twin on the same text, inside the cache's folder, and score it; return its store.

    `others` are those of `run_autointerp`: explainers and judges do for the twin what they did for the trained SAE.
    """
    manifest, folder = cache.manifest, cache.folder / TWIN_FOLDER
    twin = random_twin(sae, config.seed, lambda: cached_activations(cache, sae, model))
    build_cache(
        twin,
        model,
        manifest.corpus,
        folder,
        n_tokens=manifest.n_tokens_asked,
        at_most=True,  # where the text is shorter than was asked for, the cache itself has all of it
        split=manifest.split,  # pyright: ignore[reportArgumentType]
        context_size=manifest.context_size,
        windows_per_shard=manifest.windows_per_shard,
        text_column=manifest.text_column,
        sae_name=f"random twin of {manifest.sae}",
        resume=folder.is_dir(),
    )
    return run_autointerp(FeatureCache.open(folder), model.tokenizer, config, sae=twin, **others)


def cached_activations(cache: FeatureCache, sae: Any, model: Any) -> Float[Tensor, "tokens d_in"]:
    """Return the SAE's input on the first tokens of its cache, on which a random twin is calibrated."""
    context, n = cache.manifest.context_size, CALIBRATION_TOKENS // cache.manifest.context_size
    windows = np.asarray(cache.tokens[: n * context], dtype=np.int64).reshape(-1, context)
    return activations(sae, model, np.array_split(windows, max(1, len(windows) // 16)))[0]
