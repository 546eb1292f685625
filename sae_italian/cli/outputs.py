"""What leaves a cache or an SAE, for people and for other programs: the commands `browse`, `export` and `report wandb`.

`browse` writes the latent browser of a cache, alone or beside another SAE, and the overview of a suite. A format of `export`
is one function here and its row in FORMATS, which says what settings it takes. The function is called with the source, the
folder and those settings that were given, and returns a Result.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cyclopts import Parameter
from pydantic import PositiveInt

import sae_italian
from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.labels import read_words
from sae_italian.base.report import plain
from sae_italian.base.storage import claimed, write_text
from sae_italian.cli import Count, Folder, Result, Source, own_words


def browse(
    source: Path,
    /,
    *words: str,
    out: Path | None = None,
    latent: int | None = None,
    model: str | None = None,
    sae: str | None = None,
    to_space: str | None = None,
    compare: Path | None = None,
    serve: bool = False,
    port: int = 8765,
    endpoint: str | None = None,
    llm_model: str | None = None,
    language: Literal["it", "en"] = "it",
) -> Result:
    """Write the latent browser of a cache as a folder that opens from disk, or serve it with live work.

    Args:
        source: A cache's folder; or a suite's, one folder per SAE with its card, for the overview of all.
        words: For a suite, the caches of its SAEs, whose scores are shown, and sentence=TEXT, whose latents in all of
            them are shown beside one another. For a cache, rare settings as key=value: other_sae (the SAE of --compare),
            encoder (served: model2vec's, a folder or hub id, for a search by meaning), and of the LLM key_env, prices,
            timeout and what autointerp takes.
        out: Folder to write to; default: <cache>-report or <suite>-overview beside it.
        latent: Number of a latent whose card is printed here, nothing written; default: none.
        model: Name, hub id or folder of the model; default: the one the cache was built with.
        sae: The cache's SAE, for map, logits and live work; default: the one that the cache names, if it is there.
        to_space: Static Space of Hugging Face, OWNER/NAME, that the folder is sent to; default: none, nothing is sent.
        compare: The cache of another SAE of the same model, whose best matches stand beside each latent; default: none.
        serve: Serve it on this machine, with live work, until Ctrl-C.
        port: Port of the server.
        endpoint: serve: URL of an OpenAI-compatible server for `explain now`; default: none, rules only.
        llm_model: serve: name of the language model there; default: none.
        language: serve: language of the LLM's explanations.
    """
    if not (source / "manifest.json").is_file() and any(source.glob("*/c*.json")):
        of_cache = {"--latent": latent, "--serve": serve or None, "--compare": compare, "--to-space": to_space}
        of_cache |= {"--sae": sae, "--model": model, "--endpoint": endpoint, "--llm-model": llm_model}
        if odd := [option for option, value in of_cache.items() if value is not None]:
            raise UsageError(f"{odd[0]} is for a cache; {source} is a suite, of SAEs' folders. Give a cache's folder.")
        return _suite(source, words, out)
    own, rare = own_words(words, {"other_sae": "", "encoder": ""})
    if latent is not None and (serve or compare or out):
        raise UsageError("--latent prints one card here; leave out --serve, --compare and --out.")
    if to_space and (serve or latent is not None):
        raise UsageError("--to-space sends the folder of pages; leave out --serve and --latent.")
    if own["other_sae"] and not compare:
        raise UsageError("other_sae= is the SAE of --compare CACHE, which is missing.")
    which = {"sae_name": sae, "model_name": model, "compare": compare, "other_sae": own["other_sae"] or None}
    llm = _llm_settings(endpoint, llm_model, language, rare) if rare or endpoint or llm_model else None
    if serve:
        return _serve(source, port, llm, which | {"encoder": own["encoder"] or None})
    if llm or own["encoder"]:
        raise UsageError(
            "an LLM, or an encoder, works only while the browser is served; add --serve, or leave its settings out."
        )
    return _shown(source, out, latent, which, to_space)


def _shown(source: Path, out: Path | None, latent: int | None, which: dict[str, Any], space: str | None) -> Result:
    """Write the folder of pages, or return one latent's card."""
    from sae_italian.browser.graph import graphs_beside
    from sae_italian.browser.opening import open_pages
    from sae_italian.browser.widget import card_text
    from sae_italian.browser.write import write_browser
    from sae_italian.training.publish import check_repository, send_space

    if latent is not None:
        records = open_pages(source, model_name=which["model_name"], weights={}).source
        row, card = records.row(latent), records.card(latent)
        return Result({**row, **card}, card_text(row, card))
    if space:
        check_repository(space)
    answers = open_pages(source, **which)
    out = out or source.resolve().with_name(f"{source.resolve().name}-{'space' if space else 'report'}")
    if not space:  # a Space has its own folder alone
        answers.source.graphs = graphs_beside(answers.source.cache, out)
    index = write_browser(out, answers.source, other=answers.other, space=bool(space))
    value, text = {"report": str(index)}, ""
    if answers.other is not None:
        facts = answers.other.facts()
        near, mutual = (f"{100 * facts[key]:.0f} %" for key in ("share_near", "share_mutual"))
        text = f"Best matches: mean cosine {facts['mean_cosine']:.2f}, {near} of 0.7 or more, {mutual} mutual.\n"
        value |= facts
    if space:
        try:
            value["space"] = send_space(out, space)
        except UsageError as error:
            way = f"hf upload {space} {out} . --repo-type space"
            raise UsageError(f"{out} is written and not sent: {error} Or from elsewhere: {way}") from error
        text += f"Space: {value['space']}\n"
    return Result(value, f"{text}Report: {value['report']}")


def _llm_settings(endpoint: str | None, llm_model: str | None, language: Literal["it", "en"], rare: list[str]):
    """Return the settings of a language model that somebody waits for: one call at a time, and not for long."""
    from sae_italian.autointerp.llm import LLMOptions

    options = LLMOptions(explainer="llm", endpoint=endpoint, llm_model=llm_model, language=language)
    return options.with_words(["timeout=20", "attempts=1", "concurrency=1", *rare])


def _serve(folder: Path, port: int, llm: Any, which: dict[str, Any]) -> Result:
    """Serve until Ctrl-C. The port is taken first: loading a model can take minutes."""
    try:
        from sae_italian.browser import server
    except ImportError as error:
        raise UsageError(
            f"the server needs the package {error.name}; it comes with pip install 'sae-italian[serve]'."
        ) from None
    server.bind(port).close()
    from sae_italian.autointerp.llm.client import Client
    from sae_italian.browser.opening import encode, open_pages

    if llm is not None:
        Client(llm, folder)  # a wrong address or a missing key is said now
    if which["encoder"]:
        encode([""], which["encoder"])  # and so is an encoder that is none
    answers = open_pages(folder, live=True, llm=llm, **which)

    def ready(address: str) -> None:
        extra = "" if answers.live else "  (without live work: the SAE or its model is not on this machine)"
        print(f"{address}{extra}   Ctrl-C ends", flush=True)

    server.serve(server.Server(answers), port, ready=ready)
    return Result({"host": server.HOST, "port": port}, "stopped")


def _suite(folder: Path, words: tuple[str, ...], out: Path | None) -> Result:
    from sae_italian.browser.suite import latents_of, overview_text, read_suite, write_overview

    own, caches = own_words(words, {"sentence": ""})
    sentence, rows, name = own["sentence"], read_suite(folder, list(map(Path, caches))), folder.resolve().name
    found = latents_of(sentence, rows) if sentence else []
    out = out or folder.resolve().with_name(f"{name}-overview")
    index = write_overview(rows, out, f"Suite: {name}", found, sentence)
    text = f"{overview_text(rows, found)}\n\nOverview: {index}"
    return Result({"overview": str(index), "rows": rows, "latents": found}, text)


# --- export -----------------------------------------------------------------------------------------------------------


# Neuronpedia's words for our settings.
NAMES = {"model_id": "model", "set": "source_set"} | {n: n for n in ("suffix", "creator", "creator_name")}
WORDS = {
    **dict.fromkeys(NAMES, str),
    "splits": PositiveInt,
    "hookpoint": str,
    "wandb": Literal["online", "offline"],
    "labels": str,
    "thresholds": Literal["calibrated", "one"],
}


def _latent_range(given: str | None) -> tuple[int, int] | None:
    """Return the bounds of `A-B` or of one latent. Raises UsageError for anything else."""
    if given is None:
        return None
    first, dash, last = given.partition("-")
    try:
        return int(first), int(last if dash else first)
    except ValueError as error:
        raise UsageError(f"--latents is {given!r:.80}; two numbers were expected, as in --latents 0-99.") from error


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What an export may be told; each format takes some of it.

    Args:
        latents: Only latents A to B, inclusive, as in 0-99; default: all.
        model: Name, hub id or folder of the model; default: the one the cache or the SAE was made with.
        sae: The cache's SAE: a folder, or release:sae_id; default: the one that the cache names, if it is there.
        corpus: jumprelu, transcoder-set: text that sets the thresholds; default: what the SAE was trained on.
        text_column: jumprelu, transcoder-set: column that holds the text; default: text.
        context_size: jumprelu, transcoder-set: tokens of a window; default: as the SAE was trained.
        tokens: jumprelu, transcoder-set: held-out tokens; four of five documents set the thresholds; default: 40,960.
        project: wandb, wandb-tables: the project; default: sae-italian.
        repository: model-card: where the SAE will be published; default: owner/name.
    """

    latents: str | None = None
    model: str | None = None
    sae: str | None = None
    corpus: str | None = None
    text_column: str | None = None
    context_size: Count | None = None
    tokens: Count | None = None
    project: str | None = None
    repository: str | None = None


def export(
    source: str,
    /,
    *words: str,
    to: str,
    out: Path | None = None,
    chosen: Chosen = Chosen(),
    folder: Folder = Folder(),
) -> Result:
    """Write a cache, its explanations or an SAE for another program.

    Args:
        source: A cache's folder; for jumprelu and model-card an SAE: a folder, or release:sae_id.
        words: Settings of one format as key=value: model_id, set, suffix, creator and creator_name (neuronpedia,
            neuronpedia-bulk, circuit-tracer), splits and hookpoint (delphi),
            labels=FOLDER (transcoder-set: the feature caches of its transcoders, for circuit-tracer's page),
            wandb=online (wandb: send it now, as in a training's settings; without it `wandb sync` sends),
            thresholds=one (jumprelu: one for all latents; default: calibrated, one fitted to each).
        to: neuronpedia, neuronpedia-bulk, circuit-tracer or wandb (a cache's latents); delphi or datasets (all of a
            cache); parquet, jsonl or wandb-tables (explanations and scores); jumprelu or model-card (an SAE);
            transcoder-set (a suite of transcoders, for circuit-tracer).
        out: Folder to write to; default of parquet, jsonl and wandb-tables: <cache>-autointerp beside the cache.
    """
    if to not in FORMATS:
        raise UsageError(f"{to!r} is no format of an export. {nearest(to, FORMATS, limit=len(FORMATS))}")
    write, known = FORMATS[to]
    options = asdict(chosen) | asdict(folder) | {"latents": _latent_range(chosen.latents)}
    settings = {name: value for name, value in options.items() if value} | read_words(words, WORDS)
    if odd := next((name for name in settings if name not in known.split()), None):
        spelled = f"--{odd.replace('_', '-')}" if odd in options else f"{odd}="
        raise UsageError(f"{to} takes no {spelled}. It takes: {known.replace(' ', ', ') or 'nothing more'}.")
    if out is None:
        if write is not _tables:
            raise UsageError("an export needs --out FOLDER.")
        out = Path(f"{Path(source).resolve()}-autointerp")
    return write(to, source, out, **settings)


def report_wandb(run: Path, /) -> Result:
    """Make a report of a training at W&B: its card, curves and latents, and the exports that joined its group.

    Args:
        run: Folder of a training that told W&B: wandb=online, or wandb=offline and `wandb sync` since.
    """
    from sae_italian.training.publish import report_to_wandb

    address = report_to_wandb(run)
    return Result({"address": address}, f"Report: {address}")


def _latents(to: str, cache: str, out: Path, *, model: str = "", sae: str = "", wandb: str = "", **how: Any) -> Result:
    from sae_italian.browser.exports import export as export_latents
    from sae_italian.browser.opening import loaded

    names = {ours: how.pop(word) for word, ours in NAMES.items() if word in how}
    opened, online = sae_italian.FeatureCache.open(cache), wandb == "online"
    weights = {} if to == "circuit-tracer" else loaded(opened, sae or None, model or None)
    tokenizer = sae_italian.load_tokenizer(model or opened.manifest.model)
    done = export_latents(opened, tokenizer, out, to, **weights, names=names, online=online, **how)
    offline = {"offline_run": str(done.folder)} if to == "wandb" and not online else {}
    return Result({**plain(done), "folder": str(done.folder), **offline}, done.text())


def _delphi(to: str, cache: str, out: Path, *, splits: int | None = None, **how: Any) -> Result:
    from sae_italian.cache.exchange import export_delphi

    folder = export_delphi(cache, out, n_splits=splits, **how)
    return _readable(folder, f"LatentDataset({str(out)!r}, ..., modules=[{folder.name!r}])")


def _datasets(to: str, cache: str, out: Path, **how: Any) -> Result:
    from sae_italian.cache.exchange import export_rows

    folder = export_rows(cache, out, **how)
    return _readable(folder, f"datasets.load_from_disk({str(folder / 'latents')!r})")


def _readable(folder: Path, how: str) -> Result:
    return Result({"folder": str(folder), "read_with": how}, f"written: {folder}\nread it with {how}")


def _tables(to: str, cache: str, out: Path, **how: Any) -> Result:
    from sae_italian.autointerp.run import STORE_FILE
    from sae_italian.autointerp.summary import export as export_tables

    with claimed(out, "tables", {"to": to}, resume=True, changeable=["to"]):
        files = export_tables(Path(cache).resolve() / STORE_FILE, out, to.removesuffix("-tables"), **how)
    return Result({"files": [str(file) for file in files]}, "\n".join(map(str, files)))


def _jumprelu(
    to: str, name: str, out: Path, *, tokens: int | None = None, thresholds: Any = "calibrated", **text: Any
) -> Result:
    from sae_italian.evaluation.diagnosis import JUMPRELU_TOKENS, export_jumprelu
    from sae_italian.saes.jumprelu import export_text

    source = Source(**text)
    how = {"n_tokens": tokens or JUMPRELU_TOKENS, "thresholds": thresholds, **source.reading}
    report = export_jumprelu(*source.load(name), out, **how)
    return Result({"sae": str(out), **plain(report)}, f"{export_text(report)}\nSAE: {out}")


def _transcoder_set(
    to: str,
    folder: str,
    out: Path,
    *,
    labels: str = "",
    tokens: int | None = None,
    overwrite: bool = False,
    **text: Any,
) -> Result:
    from sae_italian.browser.exports.transcoder_set import export_set, set_text
    from sae_italian.browser.graph import caches_of
    from sae_italian.cli.causal import transcoder_folders

    source, (first, *others) = Source(**text), transcoder_folders(Path(folder))
    size: Any = {"n_tokens": tokens} if tokens else {}
    sae, model, corpus = source.load(str(first))
    saes = [sae, *map(sae_italian.load_sae, others)]
    caches = caches_of(Path(labels), saes) if labels else {}
    spec = {"source": Path(folder), "labels": labels or None, **text, **size}
    with claimed(out, "transcoder set", spec, resume=True, overwrite=overwrite):
        how: Any = {"name": model.loaded_from["name"], "corpus": corpus, "caches": caches, **source.reading}
        rows = export_set(saes, model, out, **how, **size)
    return Result({"folder": str(out), "to": "circuit-tracer", "layers": rows}, set_text(rows, out))


def _model_card(
    to: str, given: str, out: Path, *, sae: str = "", repository: str = "owner/name", overwrite: bool = False
) -> Result:
    """Write the README.md that `saes publish` would, and the evaluation card's files beside it."""
    from sae_italian.cache import Manifest
    from sae_italian.evaluation.card import read_card
    from sae_italian.training.publish import model_card

    folder = Path(given)
    if (folder / "manifest.json").is_file():
        folder = Path(sae or Manifest.load(folder).sae)
    if not (folder / "cfg.json").is_file():
        raise UsageError(f"{folder} is no trained SAE (no cfg.json); give the folder of one, or --sae.")
    if (card := read_card(folder)) is None:
        raise UsageError(f"{folder} has no evaluation card. Make it: sae-italian evaluate {folder}")
    file, own = out / "README.md", out.resolve() == folder.resolve()
    if own and file.exists() and not overwrite:
        raise UsageError(f"{file} exists. Add --overwrite to replace it, or give another folder.")
    spec = {"sae": str(folder.resolve()), "repository": repository}
    with nullcontext() if own else claimed(out, "model card", spec, resume=True, overwrite=overwrite):
        write_text(file, model_card(folder, card, repository, folder.resolve().name))
        card.save(out)
    return Result({"card": str(file)}, f"model card: {file}")


# format -> (the function that writes it, the settings it takes)
_CACHE = "latents model sae resume overwrite"
_NAMED = (_latents, f"{_CACHE} {' '.join(NAMES)}")
FORMATS: dict[str, tuple[Callable[..., Result], str]] = {
    **dict.fromkeys(("neuronpedia", "neuronpedia-bulk", "circuit-tracer"), _NAMED),
    "wandb": (_latents, f"{_CACHE} project wandb"),
    "delphi": (_delphi, "latents resume overwrite splits hookpoint"),
    "datasets": (_datasets, "latents resume overwrite"),
    "parquet": (_tables, ""),
    "jsonl": (_tables, ""),
    "wandb-tables": (_tables, "project"),
    "transcoder-set": (_transcoder_set, "model corpus text_column context_size tokens labels overwrite"),
    "jumprelu": (_jumprelu, "model corpus text_column context_size tokens thresholds"),
    "model-card": (_model_card, "sae repository overwrite"),
}
