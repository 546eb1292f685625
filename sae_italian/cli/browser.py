"""The command `browse`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_italian.base.errors import UsageError
from sae_italian.cli.base import Commands, Result


def add_commands(root: Commands) -> None:
    sub = root.add("browse", _browse, "write the latent browser of a cache: a folder that opens from disk")
    sub.add_argument("cache", type=Path)
    sub.add_argument("--out", type=Path, help="default: <cache>-report beside the cache")
    sub.add_argument("--latent", type=int, help="print this latent's card here instead of writing the folder")
    sub.add_argument("--model", help="default: the model the cache was built with")
    sub.add_argument(
        "--serve", action="store_true", help="serve it on this machine instead, with live work; Ctrl-C ends"
    )
    sub.add_argument("--compare", type=Path, metavar="CACHE", help="the cache of another SAE, to see best matches in")
    sub.add_argument("--other-sae", help="compare: the other cache's SAE")
    sub.add_argument("--port", type=int, default=8765, help="of the server (default 8765)")
    sub.add_argument(
        "--endpoint", help="serve: an OpenAI-compatible server for `explain now`; key in LLM_API_KEY, if any"
    )
    sub.add_argument("--llm-model", help="serve: the model's name there")
    sub.add_argument("--language", choices=("it", "en"), default="it", help="serve: of the LLM's explanations")
    sub.add_argument("--key-env", help="serve: environment variable that holds the key")
    sub.add_argument(
        "--sae", help="for the map, the logits and live work (default: the SAE that the cache names, if it is there)"
    )


def _browse(options: argparse.Namespace) -> Result:
    from sae_italian.cache import FeatureCache
    from sae_italian.models import load_tokenizer

    if options.latent is not None and (options.serve or options.compare):
        raise UsageError("--latent prints one card here; leave out --serve and --compare.")
    if options.other_sae and not options.compare:
        raise UsageError("--other-sae is the SAE of --compare CACHE, which is missing.")
    if options.serve:
        return _serve(options)
    cache = FeatureCache.open(options.cache)
    tokenizer = load_tokenizer(options.model or cache.manifest.model)
    if options.latent is not None:
        from sae_italian.browser.report import latent_card
        from sae_italian.browser.text import card_text

        row, card = latent_card(cache, tokenizer, options.latent)
        return {**row, **card}, card_text(row, card)
    from sae_italian.browser.compare import open_other
    from sae_italian.browser.report import open_source
    from sae_italian.browser.write import write_browser

    out = options.out or options.cache.resolve().with_name(f"{options.cache.resolve().name}-report")
    source = open_source(cache, tokenizer, decoder=True, sae_name=options.sae)
    other = open_other(source, options.compare, sae_name=options.other_sae) if options.compare else None
    index = write_browser(out, source, other=other)
    return {"report": str(index)}, f"Report: {index}"


def _serve(options: argparse.Namespace) -> Result:
    """Serve until Ctrl-C. The port is taken first: loading a model can take minutes."""
    from sae_italian.browser.server.run import HOST, bind, need_uvicorn, serve

    need_uvicorn()
    if bool(options.endpoint) != bool(options.llm_model):
        raise UsageError("an LLM needs --endpoint URL and --llm-model NAME, both.")
    bind(options.port).close()
    from sae_italian.browser.compare import open_other
    from sae_italian.browser.live import open_with_live
    from sae_italian.browser.llm import Endpoint
    from sae_italian.browser.report import loaded
    from sae_italian.browser.server.app import create_app
    from sae_italian.cache import FeatureCache
    from sae_italian.models import load_tokenizer

    endpoint = None
    if options.endpoint:
        endpoint = Endpoint(options.endpoint, options.llm_model, options.language, options.key_env)
        endpoint.client(options.cache)  # a wrong address or a missing key is said now
    cache = FeatureCache.open(options.cache)
    tokenizer = load_tokenizer(options.model or cache.manifest.model)
    weights = loaded(cache, options.sae, options.model)
    source, live = open_with_live(cache, tokenizer, endpoint=endpoint, **weights)
    other = None
    if options.compare:
        other = open_other(source, options.compare, sae_name=options.other_sae, model=weights.get("model"))

    def ready(address: str) -> None:
        extra = "" if live else "  (without live work: the SAE or its model is not on this machine)"
        print(f"{address}{extra}   Ctrl-C ends", flush=True)

    serve(create_app(source, live, other=other), options.port, ready=ready)
    return {"host": HOST, "port": options.port}, "stopped"
