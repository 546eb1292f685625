"""The command `autointerp`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

import sae_italian
from sae_italian.autointerp.llm.settings import LLMOptions, LLMSettings
from sae_italian.base.errors import SaeItalianError, UsageError
from sae_italian.cli.options import Count, Model, Result, Seed, Workers, own_words

TOLD = ("detection", "fuzzing", "simulation")  # the scorers that the table of a run tells of by itself
MOSTLY = 0.8  # of the documents, from which examples count as Italian


def autointerp(
    cache: Path,
    /,
    *words: str,
    n_latents: Count | None = None,
    seed: Seed = 0,
    model: Model = None,
    no_random_control: bool = False,
    overwrite: bool = False,
    encoder: Path | None = None,
    subject: bool = False,
    where: Workers | None = None,
    llm: Annotated[LLMOptions | None, Parameter(name="*")] = None,
) -> Result:
    """Explain and score the latents of a cache, with controls; a run that was stopped goes on.

    With --encoder or --subject, explanations that are there are scored by a model that reads them: embedding, or
    surprisal and intervention.

    Args:
        cache: Folder of the feature cache.
        words: Rare settings, key=value: width=N (tokens of an example, 32), n_examples=N (positives per latent and part,
            50), n_scored=N (latents that a model scores, 20), and those of the language model.
        n_latents: Live latents, drawn at random; default: all.
        no_random_control: Leave out the randomly initialised SAE.
        overwrite: Forget earlier explanations and scores; paid answers are kept.
        encoder: Folder of a multilingual sentence encoder; default: none.
        subject: Score with the model that the cache was built with.
    """
    from sae_italian.autointerp import AutointerpConfig
    from sae_italian.autointerp.run import STORE_FILE

    sizes = {"width": AutointerpConfig.width, "n_examples": AutointerpConfig.n_examples, "n_scored": 20}
    own, others = own_words(words, sizes)
    settings = (llm or LLMOptions()).with_words(others)
    opened = sae_italian.FeatureCache.open(cache)
    n_scored = own.pop("n_scored")
    if encoder is not None or subject:
        return _scored(opened, model, settings, encoder, subject, n_scored)
    from sae_italian.autointerp.llm.client import Client

    if settings.wants_llm and not settings.estimate:
        Client(settings, opened.folder / STORE_FILE)  # what cannot be is said before the rules' minutes
    config = {"latents": n_latents, "seed": seed, **own}
    return _explained(opened, model, settings, config, not no_random_control, overwrite, where or Workers())


def _explained(
    cache: Any,
    name: str | None,
    settings: LLMSettings,
    numbers: dict[str, Any],
    control: bool,
    overwrite: bool,
    where: Workers,
) -> Result:
    """Explain and score by rules, and beside these with a language model where one is asked for."""
    from sae_italian.analysis.languages import examples_in
    from sae_italian.autointerp import AutointerpConfig
    from sae_italian.autointerp.explainers.choose import EXPLAINER
    from sae_italian.autointerp.judges import RULE
    from sae_italian.autointerp.llm.beside import estimate_beside, run_beside
    from sae_italian.autointerp.run import STORE_FILE
    from sae_italian.autointerp.summary import means, means_table
    from sae_italian.quickstart import analyse, forget_scores, table_of

    config = AutointerpConfig(**numbers)
    model = sae_italian.load_model(name or cache.manifest.model)
    sae = _sae_of(cache, needed=control)
    if overwrite:
        forget_scores(cache)
    if settings.wants_llm and settings.estimate:
        return Result(estimate_beside(cache, model.tokenizer, config, sae, settings, control=control))
    units = where.map(cache.folder) if where.engine == "ray" else None
    others: dict[str, Any] = {"card_tokens": None, "workers": where.workers or 1, "run_units": units}
    results = analyse(cache, sae, model, config=config, random_control=control, **others)
    text = table_of(results)
    if others_told := [row for row in means(cache.folder / STORE_FILE, EXPLAINER, [RULE]) if row["scorer"] not in TOLD]:
        text += f"\n\n{means_table(others_told)}"
    if settings.wants_llm:
        results["llm"], told = run_beside(cache, model, config, sae, settings, control=control)
        text += f"\n\n{told}"
    languages = examples_in(cache)
    if languages:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in languages.items())
        fails = (
            "" if languages.get("it", 0) >= MOSTLY else " Few are Italian: no evidence of what fires in Italian text."
        )
        text += f"\n\nThe examples are in: {shares}.{fails}"
    return Result({**results, "examples_in": languages, "cache": str(cache.folder)}, text)


def _scored(
    cache: Any, name: str | None, settings: LLMSettings, encoder: Path | None, subject: bool, n_scored: int
) -> Result:
    """Score explanations that are there with models that read them: the rules', or the language model's."""
    from sae_italian.autointerp.explainers.choose import EXPLAINER
    from sae_italian.autointerp.llm.askers import LLMExplainer
    from sae_italian.autointerp.llm.calls import DryClient
    from sae_italian.autointerp.run import STORE_FILE, score_with_models
    from sae_italian.autointerp.scorers.embedding import Encoder, EncoderJudge
    from sae_italian.autointerp.scorers.subject import subject_judge
    from sae_italian.autointerp.summary import means, means_table

    store = cache.folder / STORE_FILE
    if not store.is_file():
        raise UsageError(f"{cache.folder} has no explanations yet; run `sae-italian autointerp {cache.folder}` first.")
    explainer = LLMExplainer(DryClient(settings)).name if settings.explainer == "llm" else EXPLAINER
    model = sae_italian.load_model(name or cache.manifest.model)
    judges: list[Any] = []
    if encoder is not None:
        judges.append(EncoderJudge(Encoder(encoder), settings.language))
    if subject:
        judges.append(replace(subject_judge(cache, model), language=settings.language))
    score_with_models(cache, model.tokenizer, store, judges, latents=n_scored, explainer=explainer)
    rows = means(store, explainer, [judge.name for judge in judges])
    return Result(rows, means_table(rows))


def _sae_of(cache: Any, needed: bool) -> Any:
    """Return the cache's SAE: for the random control, and for the decoder neighbours where it is still at hand."""
    try:
        return sae_italian.load_sae(cache.manifest.sae)
    except SaeItalianError:
        if needed:
            raise
        return None
