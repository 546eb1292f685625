"""The command line: one thin command per verb. Exit codes: 0 done, 2 the user can fix it (one line), 1 a defect of ours."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sae_italian
from sae_italian import cli_models
from sae_italian.cli_corpora import add_bench, add_commands
from sae_italian.errors import SaeItalianError, UsageError, nearest

Command = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "command"):
        parser.print_help()
        return 0
    try:
        _quiet_libraries()
        options.command(options)
    except SaeItalianError as error:
        print(f"sae-italian: {_one_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        print(f"sae-italian: stopped; {stop or 'finished parts are kept, --resume continues'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        print(f"sae-italian: {error.strerror or _one_line(error)}{place}; finished parts are kept.", file=sys.stderr)
        return 2
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _quiet_libraries() -> None:
    """Keep other libraries' notices off a terminal that shows ours; what the environment asks for wins."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


class _Parser(argparse.ArgumentParser):
    """argparse, with the nearest command named and one line instead of the usage."""

    def error(self, message: str) -> Any:
        if "invalid choice: " in message:
            wrong = message.split("invalid choice: ")[1].split("'")[1]
            actions = self._subparsers._group_actions if self._subparsers else []
            choices = [str(choice) for action in actions for choice in getattr(action, "choices", None) or ()]
            message = f"unknown command {wrong!r}. {nearest(wrong, choices)}"
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sae-italian", description="Sparse autoencoders on Italian language models, one command each."
    )
    parser.add_argument("--version", action="version", version=f"sae-italian {sae_italian.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)

    def add(group: Any, name: str, function: Command, text: str, json_output: bool = True) -> argparse.ArgumentParser:
        sub = group.add_parser(name, help=text, description=text)
        if json_output:
            sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.set_defaults(command=function)
        return sub

    def group(name: str, text: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=lambda _: sub.print_help())
        return sub.add_subparsers(metavar="COMMAND", parser_class=_Parser)

    sub = add(
        commands, "quickstart", _quickstart, "the whole way on the embedded model: train, cache, explain, score, report"
    )
    sub.add_argument("config", nargs="?", default="mini/topk.yaml", help="a training config (default: mini/topk.yaml)")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the config's")
    sub.add_argument("--out", type=Path, default=Path("quickstart"), help="output folder (default: quickstart)")
    sub.add_argument("--cache-tokens", type=int, default=300_000, help="held-out tokens to cache")
    sub.add_argument("--card-tokens", type=int, default=50_000, help="held-out tokens for the evaluation card")
    sub.add_argument("--latents", type=int, help="explain this many live latents, drawn at random (default: all)")
    _folder_options(sub)

    models = group("models", "the catalogue of Italian models")
    add(models, "list", _models_list, "names, aliases, licence, gate")
    add(models, "show", _models_show, "dimensions, licence, hooks of one model").add_argument("name")
    sub = add(
        models, "check", _models_check, "compare the three backends on a prompt: logits, and every layer and site"
    )
    sub.add_argument("name")
    sub.add_argument("--prompt", default="La città è più bella perché c'è il sole.")
    sub.add_argument("--italian", action="store_true", help="also: does it know agreement and the indirect object?")

    saes = group("saes", "published and local SAEs")
    cli_models.add_saes(saes, add, _show)

    corpora = group("corpora", "Italian text")
    add_commands(corpora, add, _show)
    add_bench(add, group("bench", "the speed tables of the README, measured on this machine"), _show)

    sub = add(commands, "train", _train, "train one SAE")
    sub.add_argument("config")
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    sub.add_argument("--out", type=Path, help="output folder (default: runs/<config's name>)")
    _folder_options(sub)

    sub = add(commands, "evaluate", _evaluate, "the evaluation card of an SAE, on held-out text")
    sub.add_argument("sae", help="an SAE's folder, or release:sae_id")
    _source_options(sub)
    sub.add_argument("--tokens", type=int, default=50_000)

    cache = group("cache", "the feature cache: latents of a corpus on disk")
    sub = add(cache, "build", _cache_build, "build a cache")
    sub.add_argument("sae", help="an SAE's folder, or release:sae_id")
    _source_options(sub)
    sub.add_argument("--split", default="heldout", choices=("train", "heldout", "all"))
    sub.add_argument("--tokens", type=int, default=300_000)
    sub.add_argument("--out", type=Path, required=True)
    _folder_options(sub)
    add(cache, "info", _cache_info, "what a cache holds").add_argument("cache", type=Path)
    add(cache, "verify", _cache_verify, "compare every file with its checksum").add_argument("cache", type=Path)

    sub = add(
        commands,
        "autointerp",
        _autointerp,
        "explain and score the latents of a cache, with controls; resumes by itself",
    )
    sub.add_argument("cache", type=Path)
    sub.add_argument("--latents", type=int, help="this many live latents, drawn at random (default: all)")
    sub.add_argument("--model", help="default: the model the cache was built with")
    sub.add_argument("--no-random-control", action="store_true", help="leave out the randomly initialised SAE")
    sub.add_argument("--overwrite", action="store_true", help="forget earlier explanations and scores")

    sub = add(commands, "browse", _browse, "write the latent browser of a cache: a folder that opens from disk")
    sub.add_argument("cache", type=Path)
    sub.add_argument("--out", type=Path, help="default: <cache>-report beside the cache")
    sub.add_argument("--latent", type=int, help="print this latent's card here instead of writing the folder")
    sub.add_argument("--model", help="default: the model the cache was built with")
    return parser


def _folder_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--resume", action="store_true", help="finish the run that the folder holds")
    sub.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")


def _source_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", help="default: the model in the SAE's metadata")
    sub.add_argument("--corpus", help="default: the corpus the SAE was trained on")
    sub.add_argument("--text-column", default="text")
    sub.add_argument("--context-size", type=int, help="default: the context the SAE was trained with")


def _show(options: argparse.Namespace, value: Any, text: str) -> None:
    """Print a result: as JSON when asked, else as text."""
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str) if options.json else text)


def _positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UsageError(f"{name} is {value}; it must be 1 or more.")


# --- commands --------------------------------------------------------------------------------------------------------


def _quickstart(options: argparse.Namespace) -> None:
    from sae_italian.quickstart import quickstart, table_of

    _positive("--latents", options.latents)
    results = quickstart(
        options.out,
        options.config,
        *options.overrides,
        cache_tokens=options.cache_tokens,
        card_tokens=options.card_tokens,
        latents=options.latents,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    _show(options, results, f"\n{table_of(results)}\n\nReport: {results['report']}")


def _models_list(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from sae_italian.models.catalogue import catalogue

    entries = catalogue().values()
    lines = [f"{e.name:42} {', '.join(e.aliases):60} {e.licence:19} gated: {e.gated}" for e in entries]
    _show(options, [asdict(entry) for entry in entries], "\n".join(lines))


def _models_show(options: argparse.Namespace) -> None:
    facts = cli_models.model_facts(options.name)
    _show(options, facts, "\n".join(f"{key:14} {value}" for key, value in facts.items()))


def _models_check(options: argparse.Namespace) -> None:
    from sae_italian.models import load_model
    from sae_italian.models.check import compare_backends

    result = compare_backends(options.name, options.prompt)
    text = cli_models.check_text(result)
    if options.italian:
        from sae_italian.analysis import italian_skills

        skills = italian_skills(load_model(options.name))
        result["italian"] = skills
        text += "\n" + "\n".join(f"{name:38} {value:.3f}" for name, value in skills.items())
    _show(options, result, text)
    if not result["ok"]:
        raise SaeItalianError("the backends differ by more than 1e-4; please report this model.")


def _train(options: argparse.Namespace) -> None:
    from sae_italian.training import load_spec, train

    spec = load_spec(options.config, *options.overrides)
    out = options.out or Path("runs") / Path(options.config).with_suffix("").name
    train(spec, out, resume=options.resume, overwrite=options.overwrite)
    _show(options, {"sae": str(out)}, f"SAE: {out}")


def _loaded(options: argparse.Namespace) -> tuple[Any, Any, str]:
    """Return SAE, model and corpus of a command's options, the SAE's own metadata being the default."""
    from sae_italian.models import load_model
    from sae_italian.saes import load_sae

    _positive("--tokens", options.tokens)
    sae = load_sae(options.sae)
    name = options.model or sae.cfg.metadata.model_name
    corpus = options.corpus or sae.cfg.metadata.dataset_path
    for value, flag in ((name, "--model"), (corpus, "--corpus")):
        if not value:
            raise UsageError(f"the SAE's metadata does not say; give {flag}.")
    return sae, load_model(name), corpus


def _evaluate(options: argparse.Namespace) -> None:
    from sae_italian.training import evaluate

    sae, model, corpus = _loaded(options)
    card = evaluate(
        sae,
        model,
        corpus,
        n_tokens=options.tokens,
        context_size=options.context_size,
        text_column=options.text_column,
        name=options.sae,
    )
    if Path(options.sae).is_dir():
        card.save(Path(options.sae))
    _show(options, card.as_dict(), card.markdown())


def _cache_build(options: argparse.Namespace) -> None:
    from sae_italian.cache import build_cache

    sae, model, corpus = _loaded(options)
    folder = Path(options.sae)
    build_cache(
        sae,
        model,
        corpus,
        options.out,
        n_tokens=options.tokens,
        split=options.split,
        context_size=options.context_size,
        text_column=options.text_column,
        sae_name=str(folder.resolve()) if folder.is_dir() else options.sae,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    _show(options, {"cache": str(options.out)}, f"cache: {options.out}")


def _cache_info(options: argparse.Namespace) -> None:
    from sae_italian.cache import Manifest

    manifest = Manifest.load(options.cache)
    size = sum(file.stat().st_size for file in options.cache.rglob("*") if file.is_file())
    facts = {
        **manifest.model_dump(exclude={"shards", "ranges", "versions"}),
        "windows": manifest.n_windows,
        "documents": manifest.n_documents,
        "non_zeros": manifest.nnz,
        "clipped_values": sum(shard.n_clipped for shard in manifest.shards),
        "bytes": size,
    }
    _show(options, facts, "\n".join(f"{key:18} {value}" for key, value in facts.items()))


def _cache_verify(options: argparse.Namespace) -> None:
    from sae_italian.cache import Manifest, verify

    manifest = Manifest.load(options.cache)
    verify(options.cache, manifest)
    _show(options, {"ok": True}, f"{options.cache}: every file is as the manifest says")


def _autointerp(options: argparse.Namespace) -> None:
    from sae_italian.cache import FeatureCache
    from sae_italian.models import load_model
    from sae_italian.quickstart import analyse, forget_scores, table_of
    from sae_italian.saes import load_sae

    _positive("--latents", options.latents)
    cache = FeatureCache.open(options.cache)
    model = load_model(options.model or cache.manifest.model)
    sae = None if options.no_random_control else load_sae(cache.manifest.sae)
    if options.overwrite:
        forget_scores(cache)
    results = analyse(cache, sae, model, card_tokens=None, latents=options.latents, random_control=sae is not None)
    _show(options, results, table_of(results))


def _browse(options: argparse.Namespace) -> None:
    from sae_italian.cache import FeatureCache
    from sae_italian.models import load_tokenizer
    from sae_italian.quickstart import report_of

    cache = FeatureCache.open(options.cache)
    tokenizer = load_tokenizer(options.model or cache.manifest.model)
    if options.latent is not None:
        from sae_italian.browser.report import latent_card
        from sae_italian.browser.text import card_text

        row, card = latent_card(cache, tokenizer, options.latent)
        _show(options, {**row, **card}, card_text(row, card))
        return
    out = options.out or options.cache.resolve().with_name(f"{options.cache.resolve().name}-report")
    index = report_of(cache, tokenizer, out)
    _show(options, {"report": str(index)}, f"Report: {index}")


if __name__ == "__main__":
    sys.exit(main())
