"""The commands `geometry`, `language` and `shift`: decoder directions, linguistic labels, and other texts than the training's."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

import sae_italian
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import one_of
from sae_italian.base.report import plain
from sae_italian.cli import Count, Many, Model, Result, Sae, Seed, key_values, named, numbers, short_names
from sae_italian.models.activations import check_context
from sae_italian.saes import check_fits, full_name, model_of, weights_hash

WHOLE_TEXTS = "genre, language, model"
USED_BY = {"--buckets": WHOLE_TEXTS, "context_size": WHOLE_TEXTS, "--edges": "context", "packed": "context"}


def geometry(
    *saes: str,
    out: Path,
    cache: list[Path] | None = None,
    map: Literal["pca", "umap"] = "pca",
    sample: Count | None = None,
    above: Annotated[float | None, Parameter(validator=Number(gt=0, lte=1))] = None,
    seed: Seed = 0,
) -> Result:
    """Measure how near decoder directions lie within SAEs and between them, what is new, what splits, and map them.

    Args:
        saes: SAEs' folders, or release:sae_id; all of one model's width; latents that did not fire at the end of
            their training are left out, where a folder says so.
        out: Folder for geometry.json, its pictures and the map.
        cache: A cache of one of the SAEs: latents dead in it are left out, explanations shown in the map; again for more; default: none.
        map: How the map is made; umap needs umap-learn.
        sample: Latents of each SAE that are compared, drawn at random; default: all.
        above: Cosine that makes a neighbour, above 0 and at most 1; default: sqrt(12 ln F / D).
    """
    from sae_italian.analysis.geometry import fired
    from sae_italian.analysis.geometry import geometry as measure

    names = short_names(saes)
    loaded = {short: sae_italian.load_sae(name) for short, name in names.items()}
    live, texts = _known(loaded, cache or [])
    alive = {short: fired(name) for short, name in names.items()} | live
    result = measure(loaded, alive=alive, texts=texts, sample=sample, above=above, method=map, seed=seed)
    result.save(out)
    told = [result.table(), *(f"Note: {note}." for note in result.notes), f"map: {out / 'map.html'}"]
    return Result(plain(result), "\n".join(told))


def _known(saes: dict[str, Any], caches: list[Path]) -> tuple[dict[str, Any], dict[str, dict[int, str]]]:
    """Return by SAE which latents are alive and their explanations, as far as caches know them."""
    from sae_italian.autointerp.run import EXPLAINER, STORE_FILE
    from sae_italian.autointerp.store import Store

    alive, texts, hashes = {}, {}, {weights_hash(sae): name for name, sae in saes.items()}
    for folder in caches:
        cache = sae_italian.FeatureCache.open(folder)
        if (name := hashes.get(cache.manifest.sae_hash)) is None:
            raise UsageError(f"{folder} was built with another SAE ({cache.manifest.sae}) than those given.")
        alive[name] = cache.statistics["count"] > 0
        if (cache.folder / STORE_FILE).is_file():
            with Store(cache.folder / STORE_FILE, {}) as store:
                found = store.explanations(EXPLAINER).items()
            texts[name] = {latent: e.text("it") for latent, e in found if e.status == "ok"}
    return alive, texts


def language(
    sae: str,
    /,
    *words: str,
    out: Path,
    ud: Many = None,
    languages: Many = None,
    against: Many = None,
    sae_of_cache: Annotated[str | None, Parameter(name="--sae")] = None,
    model: Model = None,
    tokens: Count = 20_000,
    seed: Seed = 0,
) -> Result:
    """Find latents that detect part of speech, gender, number, person, tense, mood; and latents of one language.

    Args:
        sae: An SAE's folder, release:sae_id, or a cache: then labels go into its store too.
        words: context_size=N, tokens of a window (default: as the SAE was trained); text_column=NAME (default: text;
            NAME:COLUMN,NAME:COLUMN where they differ); parallel=N, pairs of translated documents, in order (default: 0).
        out: Folder for language.json, language.md and language.svg, and languages.json with --languages.
        ud: Treebanks: CoNLL-U files or folders of them, ISDT for UD_Italian-ISDT, or micro-italiano; two or more are
            crossed; default: none.
        languages: Corpora as NAME=CORPUS, two or more, e.g. it=notizie.jsonl en=news.jsonl; default: none.
        against: SAEs at the same place to compare with, e.g. baselines; default: none.
        sae_of_cache: Of a cache: its SAE; default: the one its manifest names.
        tokens: Tokens of each language.
    """
    from sae_italian.analysis.labels import language_latents, parallel_overlap

    settings = key_values(words, {"context_size": 0, "text_column": "text", "parallel": 0})
    corpora = _languages(ud, languages, against)
    columns = _columns(settings["text_column"], corpora)
    loaded, cache = _sae_of(sae, sae_of_cache)
    subject = model_of(loaded, model or (cache.manifest.model if cache else None))
    context = check_context(settings["context_size"] or loaded.cfg.metadata.context_size or 128, subject.config)
    value, parts, labels = {}, [], []
    if ud:
        with one_of(2 if corpora else 1, alike=False):
            result = _probes(sae, loaded, subject, context, ud, against or [], seed)
        result.save(out)
        labels += result.labels()
        value |= result.as_dict()
        tables = [f"best latents, {bank}\n\n{result.label_table(bank)}" for bank in result.n_words]
        parts += [*tables, result.table()]
    if corpora:
        where: dict[str, Any] = {"context_size": context, "text_columns": columns, "seed": seed}
        n_pairs, (first, *others) = settings["parallel"], corpora
        both = [{name: corpora[name] for name in (first, other)} for other in others if n_pairs]
        overlaps = [parallel_overlap(loaded, subject, two, n_pairs=n_pairs, **where) for two in both]
        found = language_latents(loaded, subject, corpora, n_tokens=tokens, **where)
        found.save(out)
        labels += found.labels()
        value |= {"languages": found.as_dict()} | ({"overlaps": plain(overlaps)} if n_pairs else {})
        parts += [found.table(), *(overlap.text() for overlap in overlaps)]
    if cache is not None:
        parts.append(_store(cache, labels))
    return Result(value, "\n\n".join([*parts, f"results: {out}"]))


def _languages(ud: list[str] | None, languages: list[str] | None, against: list[str] | None) -> dict[str, str]:
    """Return the corpora by language. Raises: UsageError for options that do not go together."""
    if not ud and not languages:
        raise UsageError("nothing to look for: give --ud with treebanks, --languages with corpora, or both.")
    if against and not ud:
        raise UsageError("--against compares probes on treebanks; give --ud too, or leave it out.")
    return named("--languages NAME=CORPUS", languages, 2 if languages else 0)


def _sae_of(given: str, of_cache: str | None) -> tuple[Any, Any]:
    """Return the SAE, and the cache where one was given. Raises: UsageError when the cache is of another SAE."""
    if not (Path(given) / "manifest.json").is_file():
        if of_cache:
            raise UsageError(f"--sae {of_cache} is the SAE of a cache, but {given} is no cache. Leave it out.")
        return sae_italian.load_sae(given), None
    cache = sae_italian.FeatureCache.open(given)
    return cache.load_sae(of_cache), cache


def _probes(name: str, sae: Any, model: Any, context: int, treebanks: list[str], against: list[str], seed: int) -> Any:
    from torch import from_numpy

    from sae_italian.analysis.detect import probe
    from sae_italian.analysis.treebank import label_names, read_treebank, read_words
    from sae_italian.saes.baselines import CALIBRATION_TOKENS, random_twin

    hook_name = check_fits(sae, model)
    banks = [read_treebank(path) for path in treebanks]
    if len({bank.name for bank in banks}) < len(banks):
        raise UsageError(f"two treebanks are called {banks[0].name}; give each once, or rename a folder.")
    names = short_names(against) if against else {}
    others = {short: sae_italian.load_sae(given) for short, given in names.items()}
    for other_name, other in others.items():
        if (there := other.cfg.metadata.hook_name) != (here := sae.cfg.metadata.hook_name):
            raise UsageError(f"{other_name} has hook_name {there!r}, the SAE {here!r}: compare SAEs of one site.")
        check_fits(other, model)
    labels, words = label_names(banks), []
    for number, bank in enumerate(banks):
        with one_of(len(banks) - number + 1, alike=False):  # the last part of the time is the probes'
            words.append(read_words(model, hook_name, bank, labels, context_size=context))
    seen = words[0].x[words[0].train][:CALIBRATION_TOKENS]
    others = {"random twin": random_twin(sae, seed, lambda: from_numpy(seen))} | others
    return probe(sae, words, name=Path(name).name or "SAE", others=others, seed=seed)


def _store(cache: Any, labels: list[Any]) -> str:
    """Write the labels beside the cache's explanations; return what was written."""
    from sae_italian.autointerp.run import STORE_FILE
    from sae_italian.autointerp.store import Store
    from sae_italian.autointerp.work import cache_identity

    with Store(cache.folder / STORE_FILE, cache_identity(cache)) as store:
        store.add_labels(labels)
    shown = ", ".join(dict.fromkeys(f"{row.latent} {row.label}" for row in labels[:5]))
    what = f" (latent and what it detects: {shown}{', ...' if len(labels) > 5 else ''})" if labels else ""
    return f"{len(labels)} labels written to the store of {cache.folder}{what}"


def shift(
    sae: Sae,
    /,
    *words: str,
    by: Literal["context", "genre", "language", "model"],
    out: Path,
    buckets: Many = None,
    edges: str | None = None,
    model: Model = None,
    corpus: str | None = None,
    tokens: Count = 20_000,
    split: Literal["train", "heldout", "all"] = "heldout",
) -> Result:
    """Measure L0, explained variance and loss beyond the training's context, on other texts, languages or models.

    Args:
        words: packed=true (context: fill windows with short documents); context_size=N, tokens of a window (default: as
            the SAE was trained); text_column=NAME (default: text; NAME:COLUMN,NAME:COLUMN where the buckets' differ).
        by: What the buckets differ in.
        out: Folder for shift.json, shift.md and shift.svg.
        buckets: genre and language: NAME=CORPUS for each, the first the reference (genre: default, each subfolder of the
            corpus, else each of its tables, of a single one each value of its column `source`); model: NAME=MODEL for
            each that is compared with the SAE's own, e.g. a fine-tuned one.
        edges: context: the buckets' bounds in tokens, as in 0,128,256,512; default: up to 8 times the training's context.
        corpus: Local file or folder, catalogue name, or micro-italiano; default: what the SAE was trained on.
        tokens: Tokens of each bucket, at most; by context in all.
        split: Documents that are read: those for training, those held out, or all.
    """
    from sae_italian.analysis.shift import Condition, context_shift, genres
    from sae_italian.analysis.shift import shift as measure

    settings = key_values(words, {"packed": False, "context_size": 0, "text_column": "text"})
    for option, value in ({"--buckets": buckets, "--edges": edges} | settings).items():
        if value and by not in (kinds := USED_BY.get(option, by)):
            raise UsageError(f"{option} is for --by {kinds}, not for --by {by}. Leave it out.")
    bounds = None if edges is None else numbers("--edges", edges)
    least = {"language": 2, "model": 1}.get(by, 0)
    parts = named(f"--by {by} --buckets NAME={'MODEL' if by == 'model' else 'CORPUS'}", buckets, least)
    loaded, subject, text = sae_italian.open_sae(sae, model, corpus)
    column, name = settings["text_column"], full_name(sae)
    if by == "context":
        where: dict[str, Any] = {"edges": bounds, "split": split, "packed": settings["packed"], "text_column": column}
        result = context_shift(loaded, subject, text, n_tokens=tokens, name=name, **where)
    else:
        if by == "model":
            models = {"base": subject} | {key: sae_italian.load_model(value) for key, value in parts.items()}
            conditions = [Condition(key, value, text, split, column) for key, value in models.items()]
        else:
            texts = {key: (value, None) for key, value in parts.items()} or genres(text, column)
            columns = _columns(column, texts)
            conditions = [Condition(key, subject, of, split, columns[key], own) for key, (of, own) in texts.items()]
        context = settings["context_size"]
        result = measure(loaded, conditions, by=by, n_tokens=tokens, context_size=context, name=name)
    result.save(out)
    return Result(result.as_dict(), "\n\n".join([*result.parts(), f"picture: {out / 'shift.svg'}"]))


def _columns(given: str, names: Iterable[str]) -> dict[str, str]:
    """Return the text column of each corpus, from one name for all or NAME:COLUMN,NAME:COLUMN. Raises: UsageError."""
    if ":" not in given:
        return dict.fromkeys(names, given)
    columns = dict.fromkeys(names, "text")
    own = named("", [part.replace(":", "=", 1) for part in given.split(",")])
    if own.keys() - columns.keys():
        raise UsageError(f"text_column is {given!r}; NAME:COLUMN was expected, each NAME of {', '.join(columns)}.")
    return columns | own
