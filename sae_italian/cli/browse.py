"""The command `browse`: the latent browser of a cache, alone or beside another SAE, and the overview of a suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from sae_italian.base.errors import UsageError
from sae_italian.cli.options import Result

SENTENCE = "sentence="


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
        return _suite(source, words, out)
    settings = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    other_sae = settings.pop("other_sae", None)
    if latent is not None and (serve or compare):
        raise UsageError("--latent prints one card here; leave out --serve and --compare.")
    if to_space and (serve or latent is not None):
        raise UsageError("--to-space sends the folder of pages; leave out --serve and --latent.")
    if other_sae and not compare:
        raise UsageError("other_sae= is the SAE of --compare CACHE, which is missing.")
    which = {"sae_name": sae, "model_name": model, "compare": compare, "other_sae": other_sae}
    if serve:
        which["encoder"] = settings.pop("encoder", None)
        return _serve(source, port, _llm_settings(endpoint, llm_model, language, settings), which)
    if settings or endpoint or llm_model:
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
    from sae_italian.training.publish import check_repository

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
        value["space"] = _sent(out, space)
        text += f"Space: {value['space']}\n"
    return Result(value, f"{text}Report: {value['report']}")


def _sent(folder: Path, space: str) -> str:
    """Send a Space; return its address. Raises: UsageError where the folder alone could be written, saying how to send it."""
    from sae_italian.training.publish import send_space

    try:
        return send_space(folder, space)
    except UsageError as error:
        by_hand = f"Or from elsewhere: hf upload {space} {folder} . --repo-type space"
        raise UsageError(f"{folder} is written and not sent: {error} {by_hand}") from error


def _llm_settings(endpoint: str | None, llm_model: str | None, language: Literal["it", "en"], rare: dict[str, str]):
    """Return the settings of a language model that somebody waits for: one call at a time, and not for long."""
    from sae_italian.autointerp.llm import LLMOptions

    if bool(endpoint) != bool(llm_model):
        raise UsageError("an LLM needs --endpoint URL and --llm-model NAME, both.")
    if not endpoint:
        return None
    options = LLMOptions(explainer="llm", endpoint=endpoint, llm_model=llm_model, language=language)
    given = {"timeout": "20", "attempts": "1", "concurrency": "1"} | rare
    return options.with_words([f"{name}={value}" for name, value in given.items()])


def _serve(folder: Path, port: int, llm: Any, which: dict[str, Any]) -> Result:
    """Serve until Ctrl-C. The port is taken first: loading a model can take minutes."""
    from sae_italian.browser.server import run

    run.need_uvicorn()
    run.bind(port).close()
    from sae_italian.autointerp.llm.client import Client
    from sae_italian.browser.opening import open_pages
    from sae_italian.browser.server.app import create_app

    if llm is not None:
        Client(llm, folder)  # a wrong address or a missing key is said now
    answers = open_pages(folder, live=True, llm=llm, **which)

    def ready(address: str) -> None:
        extra = "" if answers.live else "  (without live work: the SAE or its model is not on this machine)"
        print(f"{address}{extra}   Ctrl-C ends", flush=True)

    run.serve(create_app(answers), port, ready=ready)
    return Result({"host": run.HOST, "port": port}, "stopped")


def _suite(folder: Path, words: tuple[str, ...], out: Path | None) -> Result:
    from sae_italian.browser.suite import latents_of, overview_text, read_suite, write_overview

    sentence = next((word.removeprefix(SENTENCE) for word in words if word.startswith(SENTENCE)), "")
    caches = [Path(word) for word in words if not word.startswith(SENTENCE)]
    rows, name = read_suite(folder, caches), folder.resolve().name
    found = latents_of(sentence, rows) if sentence else []
    out = out or folder.resolve().with_name(f"{name}-overview")
    index = write_overview(rows, out, f"Suite: {name}", found, sentence)
    value = {"overview": str(index), "rows": rows, "latents": found}
    return Result(value, f"{overview_text(rows, found)}\n\nOverview: {index}")
