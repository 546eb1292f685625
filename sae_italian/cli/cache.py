"""The commands of the feature cache: build one, look into one, ask it about a sentence, make one of Delphi's, explain it."""

from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

import sae_italian
from sae_italian.analysis.labels import examples_in
from sae_italian.autointerp import AutointerpConfig
from sae_italian.autointerp.examples import RULE
from sae_italian.autointerp.llm import LLMOptions, LLMSettings
from sae_italian.autointerp.llm.askers import LLMExplainer, estimate_beside, run_beside
from sae_italian.autointerp.llm.calls import DryClient
from sae_italian.autointerp.run import EXPLAINER, STORE_FILE, TWIN_FOLDER, score_with_models
from sae_italian.autointerp.scorers.subject import N_GRAMS, Encoder, EncoderJudge, n_grams, subject_judge
from sae_italian.autointerp.summary import means, means_table
from sae_italian.base.errors import SaeItalianError, UsageError
from sae_italian.base.report import table
from sae_italian.cache import Manifest
from sae_italian.cache import verify as verify_files
from sae_italian.cache.exchange import import_delphi
from sae_italian.cli import Count, Folder, Model, Result, Seed, Source, Workers, own_words, short_names
from sae_italian.saes import full_name, model_of, weights_hash

TOLD = ("detection", "fuzzing", "simulation")  # the scorers that the table of a run tells of by itself
MOSTLY = 0.8  # of the documents, from which examples count as Italian


def build(
    *saes: str,
    out: Path,
    tokens: int | Literal["all"] | None = None,
    source: Source = Source(),
    folder: Folder = Folder(),
    workers: Workers = Workers(),
) -> Result:
    """Cache the latents of an SAE over a corpus, or of several SAEs of one model with one forward pass.

    Args:
        saes: SAEs, each a folder or release:sae_id. Rare settings stand among them as key=value: split=train, heldout
            or all (heldout), windows_per_shard=N (a shard is the unit of work and of memory; 131,072 tokens of at most
            512 windows).
        out: The cache's folder; of several SAEs, the folder that theirs go into.
        tokens: How many tokens of the split, or all of it; default: 300000, or all where there are fewer.
    """
    settings, names = own_words(saes, {"split": "heldout", "windows_per_shard": 0})
    _, *others = short_names(names).values()  # each once
    if isinstance(tokens, int) and tokens < 1:
        raise UsageError(f"--tokens is {tokens}; it must be >= 1, or all.")
    sae, model, corpus = source.load(names[0])
    loaded = [sae, *map(sae_italian.load_sae, others)]
    out = out.resolve()  # a worker may have another working directory
    outs = [out]
    if len(loaded) > 1:
        outs = [out / f"{each.cfg.metadata.hook_name}-{each.cfg.d_sae}-{weights_hash(each)[:8]}" for each in loaded]
    sae_italian.build_caches(
        loaded,
        model,
        corpus,
        outs,
        n_tokens=None if tokens == "all" else tokens or 300_000,
        at_most=tokens is None,
        split=settings["split"],
        windows_per_shard=settings["windows_per_shard"] or None,
        sae_names=[full_name(name) for name in names],
        **source.reading,
        **asdict(folder),
        run_units=workers.map(out, gpus=float(model.device.type == "cuda")),
    )
    paths = [str(path) for path in outs]
    return Result({"cache": paths[0], "caches": paths}, "\n".join(f"cache: {path}" for path in paths))


def info(cache: Path, /, *, verify: bool = False) -> dict[str, Any]:
    """Show what a cache holds.

    Args:
        cache: The cache's folder.
        verify: Compare every file with its checksum first.
    """
    manifest = Manifest.load(cache)
    verify_files(cache, manifest, contents=verify)
    size = sum((cache / file).stat().st_size for file in manifest.files())
    latents = sum((cache / item.file).stat().st_size for item in manifest.ranges)
    facts = {
        **manifest.model_dump(exclude={"shards", "ranges", "versions"}),
        "shards": len(manifest.shards),
        "windows": manifest.n_windows,
        "tokens": manifest.n_positions,
        "documents": sae_italian.FeatureCache(cache, manifest).documents_read,
        "non_zeros": manifest.nnz,
        "values_beyond_fp16": manifest.n_wide,
        "latent_bytes_per_non_zero": round(latents / max(1, manifest.nnz), 3),
        "bytes": size,
    }
    return facts | ({"checked": "every file is as the manifest says"} if verify else {})


def import_cache(
    source: Path,
    /,
    *,
    out: Path,
    model: str | None = None,
    sae: str | None = None,
    folder: Folder = Folder(),
) -> Result:
    """Make a feature cache of one that Delphi wrote; what Delphi does not keep is listed.

    Args:
        source: The folder of one hookpoint, with its splits and config.json.
        out: The cache's folder.
        model: Name, hub id or folder of the model, whose tokenizer decodes the windows; without it there is no text.
        sae: The SAE's folder or release:sae_id, for decoder statistics; without it there are none.
    """
    if sae and not model:
        raise UsageError("--sae is given without --model: decoder statistics need both. Add --model, or leave it out.")
    given: dict[str, Any] = asdict(folder)
    if sae:
        loaded, subject, _ = sae_italian.open_sae(sae, model, "none")
        given |= {"sae": loaded, "model": subject, "sae_name": full_name(sae)}
    elif model:
        given["tokenizer"] = sae_italian.load_tokenizer(model)
    made, lost = import_delphi(source, out, **given)
    text = "\n".join([f"cache: {made}", "not in it:", *(f"  {line}" for line in lost)])
    return Result({"cache": str(made), "lost": lost}, text)


def latents(cache: Path, sentence: str, /, *, sae: str | None = None, model: str | None = None) -> Result:
    """Show which latents fire on a sentence, strongest first: on which of its tokens, and what explains them.

    Args:
        cache: The cache's folder.
        sentence: The text, in quotes.
        sae: The cache's SAE: a folder, or release:sae_id; default: the one that the cache names.
        model: Name, hub id or folder of the model; default: the one that the cache was built with.
    """
    from sae_italian.browser.opening import open_pages

    pages = open_pages(cache, sae_name=sae, model_name=model, live=True)
    if pages.live is None:
        raise UsageError(f"the SAE of {cache} or its model is not here; give --sae and --model.")
    found, rows = pages.live.tokens(sentence), []
    for own in found["strongest"]:
        own["explanation"] = pages.source.row(own["latent"])["explanation_it"]
        share = "-" if own["share"] is None else f"{own['share']:.0%}"
        place = f"«{found['tokens'][own['token']]['text'].strip()}»"
        rows.append((own["latent"], f"{own['value']:.2f}", share, place, own["count"], own["explanation"] or "-"))
    cut = f"\n\nread are its first {found['n_tokens']} tokens" if found["truncated"] else ""
    head = "latent | activation | of its maximum | strongest on | tokens | explanation"
    return Result(found, table(head, rows) + cut)


# --- autointerp -------------------------------------------------------------------------------------------------------


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
    surprisal and intervention. An encoder also scores without explanations: intruder and example embedding, beside
    vectors of character n-grams.

    Args:
        cache: Folder of the feature cache.
        words: Rare settings, key=value: width=N (tokens of an example, 32), n_examples=N (positives per latent and part,
            50), n_scored=N (latents that a model scores, 20), and those of the language model.
        n_latents: Live latents, drawn at random; default: all.
        no_random_control: Leave out the randomly initialised SAE.
        overwrite: Forget earlier explanations and scores; paid answers are kept.
        encoder: Folder of a multilingual sentence encoder, or n-grams, which need none; default: none.
        subject: Score with the model that the cache was built with.
    """
    sizes = {"width": AutointerpConfig.width, "n_examples": AutointerpConfig.n_examples, "n_scored": 20}
    own, others = own_words(words, sizes)
    settings = (llm or LLMOptions()).with_words(others)
    opened = sae_italian.FeatureCache.open(cache)
    n_scored = own.pop("n_scored")
    if encoder is not None or subject:
        if overwrite or n_latents is not None:
            raise UsageError("--overwrite and --n-latents are of explanations. With --encoder, --subject: n_scored=N.")
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
    from sae_italian.quickstart import analyse, forget_scores, table_of

    config = AutointerpConfig(**numbers)
    sae = None  # without the random control it only names decoder neighbours
    with nullcontext() if control else suppress(SaeItalianError):
        sae = cache.load_sae()
    given = name or str(cache.manifest.model)
    model = sae_italian.load_model(given) if sae is None else model_of(sae, given)
    if settings.wants_llm and settings.estimate:  # which changes nothing
        return Result(estimate_beside(cache, model.tokenizer, config, sae, settings, control=control))
    if overwrite:
        forget_scores(cache)
    units = where.map(cache.folder) if where.engine == "ray" else None
    others: dict[str, Any] = {"card_tokens": None, "workers": where.workers or 1, "run_units": units}
    results = analyse(cache, sae, model, config=config, random_control=control, **others)
    text = table_of(results)
    every = means(cache.folder / STORE_FILE, EXPLAINER, [RULE], cache.folder / TWIN_FOLDER / STORE_FILE)
    if others_told := [row for row in every if row["scorer"] not in TOLD]:
        text += f"\n\n{means_table(others_told)}"
    if settings.wants_llm:
        results["llm"], told = run_beside(cache, model, config, sae, settings, control=control)
        text += f"\n\n{told}"
    languages = examples_in(cache)
    if languages:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in languages.items())
        text += f"\n\nThe examples are in: {shares}."
        if languages.get("it", 0) < MOSTLY:
            text += " Few are Italian: no evidence of what fires in Italian text."
    return Result({**results, "examples_in": languages, "cache": str(cache.folder)}, text)


def _scored(
    cache: Any, name: str | None, settings: LLMSettings, encoder: Path | None, subject: bool, n_scored: int
) -> Result:
    """Score explanations that are there with models that read them: the rules', or the language model's."""
    if not (store := cache.folder / STORE_FILE).is_file():
        raise UsageError(f"{cache.folder} has no explanations yet; run `sae-italian autointerp {cache.folder}` first.")
    explainer = LLMExplainer(DryClient(settings)).name if settings.explainer == "llm" else EXPLAINER
    given, judges, language = name or str(cache.manifest.model), [], settings.language
    tokenizer = sae_italian.load_tokenizer(given)
    read = "" if language == "it" else f":{language}"  # one that reads another language has scores of its own
    if encoder is not None:
        encoders = {N_GRAMS: n_grams} | ({f"encoder {encoder}": Encoder(encoder)} if str(encoder) != N_GRAMS else {})
        judges += [EncoderJudge(encode, language, judge + read) for judge, encode in encoders.items()]
    twin, twins = cache.folder / TWIN_FOLDER, list(judges)  # the subject model has the SAE's directions
    if subject:
        model = model_of(cache.load_sae(), given)
        judges.append(replace(subject_judge(cache, model), language=language, name=f"subject{read}"))
    score_with_models(cache, tokenizer, store, judges, latents=n_scored, explainer=explainer)
    if twins and (twin / STORE_FILE).is_file():
        with suppress(UsageError):  # a twin that this explainer has explained nothing of is no control
            opened = sae_italian.FeatureCache.open(twin)
            score_with_models(opened, tokenizer, twin / STORE_FILE, twins, latents=n_scored, explainer=explainer)
    rows = means(store, explainer, [judge.name for judge in judges], twin / STORE_FILE)
    return Result(rows, means_table(rows))
