"""The command `language`: which latents detect linguistic labels, and which belong to one language."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.cli.base import Commands, Result, positive
from sae_italian.cli.shift import named


def add_commands(root: Commands) -> None:
    text = "latents that detect part of speech, gender, number, person, tense, mood; and latents of one language"
    sub = root.add("language", _language, text)
    sub.add_argument("sae", help="an SAE's folder, release:sae_id, or a cache: then labels go into its store too")
    sub.add_argument("--out", type=Path, required=True, help="folder for language.json, language.md and language.svg")
    text = "treebanks: CoNLL-U files or folders of them, or micro-italiano; two or more are crossed"
    sub.add_argument("--ud", nargs="+", default=[], metavar="PATH", help=text)
    sub.add_argument(
        "--languages", nargs="+", default=[], metavar="NAME=CORPUS", help="e.g. it=notizie.jsonl en=news.jsonl"
    )
    sub.add_argument("--against", nargs="+", default=[], metavar="SAE", help="SAEs at the same place, e.g. baselines")
    sub.add_argument("--sae", dest="sae_of_cache", help="of a cache: its SAE (default: the one its manifest names)")
    sub.add_argument("--model", help="default: the model in the SAE's metadata")
    sub.add_argument("--context-size", type=int, help="default: the context the SAE was trained with")
    sub.add_argument("--tokens", type=int, default=20_000, help="per language (default 20000)")
    sub.add_argument("--text-column", default="text")
    sub.add_argument("--seed", type=int, default=0)


def _language(options: argparse.Namespace) -> Result:
    from sae_italian.analysis.probes.languages import language_latents
    from sae_italian.base.storage import write_json
    from sae_italian.models import load_model
    from sae_italian.models.activations import check_context

    _check(options)
    sae, cache = _sae_of(options.sae, options.sae_of_cache)
    model = load_model(_model_name(options, sae, cache))
    context = check_context(int(options.context_size or sae.cfg.metadata.context_size or 128), model.config)
    value: dict[str, Any] = {}
    lines, labels = [], []
    if options.ud:
        result = _probes(options, sae, model, context)
        result.save(options.out)
        labels += result.labels()
        value |= result.as_dict()
        for name in result.n_words:
            lines += [f"best latents, {name}", "", *result.label_table(name), ""]
        lines += [*result.table(), ""]
    if options.languages:
        found = language_latents(
            sae,
            model,
            named(options.languages),
            n_tokens=options.tokens,
            context_size=context,
            text_column=options.text_column,
            seed=options.seed,
        )
        write_json(options.out / "languages.json", found.as_dict())
        labels += found.labels()
        value["languages"] = found.as_dict()
        lines += [*found.table(), ""]
    if cache is not None:
        lines.append(f"{_store(cache, labels)} labels written to the store of {cache.folder}")
    return value, "\n".join([*lines, f"results: {options.out}"])


def _check(options: argparse.Namespace) -> None:
    if not options.ud and not options.languages:
        raise UsageError("nothing to look for: give --ud with treebanks, --languages with corpora, or both.")
    if options.languages and len(named(options.languages)) < 2:
        raise UsageError("--languages needs NAME=CORPUS two times or more, e.g. it=notizie.jsonl en=news.jsonl.")
    if options.against and not options.ud:
        raise UsageError("--against compares probes on treebanks; give --ud too, or leave it out.")
    positive("--tokens", options.tokens)


def _sae_of(given: str, of_cache: str | None) -> tuple[Any, Any]:
    """Return the SAE, and the cache where one was given. Raises: UsageError when the cache is of another SAE."""
    from sae_italian.cache import FeatureCache
    from sae_italian.saes import load_sae

    if not (Path(given) / "manifest.json").is_file():
        if of_cache:
            raise UsageError(f"--sae {of_cache} is the SAE of a cache, but {given} is no cache. Leave it out.")
        return load_sae(given), None
    cache = FeatureCache.open(given)
    name = of_cache or cache.manifest.sae
    if not of_cache and ":" not in name and not Path(name).is_dir():
        raise UsageError(f"{given} was built with the SAE {name!r}, which is not here. Give it as --sae.")
    sae = load_sae(name)
    return sae, FeatureCache.open(given, sae=sae)


def _model_name(options: argparse.Namespace, sae: Any, cache: Any) -> str:
    name = options.model or (cache.manifest.model if cache is not None else sae.cfg.metadata.model_name)
    if not name:
        raise UsageError("the SAE's metadata does not name its model; give --model.")
    return name


def _probes(options: argparse.Namespace, sae: Any, model: Any, context: int) -> Any:
    from sae_italian.analysis.probes import label_names, probe, read_treebank, read_words
    from sae_italian.cli.geometry import short_names
    from sae_italian.saes import check_fits, load_sae, random_twin

    hook_name = check_fits(sae, model)
    banks = [read_treebank(path) for path in options.ud]
    if len({bank.name for bank in banks}) < len(banks):
        raise UsageError(f"two treebanks are called {banks[0].name}; give each once, or rename a folder.")
    names = label_names(banks)
    others = {name: load_sae(given) for name, given in zip(short_names(options.against), options.against, strict=True)}
    others = {"random twin": random_twin(sae, options.seed)} | others
    for name, other in others.items():
        _check_place(name, other, sae)
    words = [read_words(model, hook_name, bank, names, context_size=context) for bank in banks]
    return probe(sae, words, name=Path(options.sae).name or "SAE", others=others, seed=options.seed)


def _check_place(name: str, other: Any, sae: Any) -> None:
    """Refuse an SAE that reads something else. Raises: UsageError."""
    for key in ("d_in", "hook_name"):
        here, there = (getattr(s.cfg if key == "d_in" else s.cfg.metadata, key) for s in (other, sae))
        if here != there:
            raise UsageError(f"{name} has {key} {here!r}, the SAE {there!r}: compare SAEs of one model and site.")


def _store(cache: Any, labels: list[Any]) -> int:
    from sae_italian.autointerp.run import STORE_FILE, cache_identity
    from sae_italian.autointerp.store import Store

    with Store(cache.folder / STORE_FILE, cache_identity(cache)) as store:
        store.add_labels(labels)
    return len(labels)
