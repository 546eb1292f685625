"""The options of an LLM behind an endpoint, and what they make of a run of `autointerp`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.cli.base import positive


def llm_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--explainer", choices=("rule", "llm"), default="rule", help="who explains (default: rule)")
    sub.add_argument("--judge", choices=("rule", "llm"), help="who judges (default: as --explainer)")
    sub.add_argument("--endpoint", help="an OpenAI-compatible server, such as http://localhost:8000/v1")
    sub.add_argument("--llm-model", help="the model's name there")
    sub.add_argument("--language", choices=("it", "en"), default="it", help="of prompts and explanations")
    sub.add_argument("--estimate", action="store_true", help="print calls, tokens and cost of the LLM; send nothing")
    sub.add_argument("--max-usd", type=float, help="stop before this run's calls can cost more")
    sub.add_argument("--concurrency", type=int, default=8, help="calls in flight at once (default 8)")
    sub.add_argument("--key-env", help="environment variable that holds the key (default LLM_API_KEY, if set)")
    sub.add_argument("--prices", type=Path, help="a price file in the place of the one that comes along")
    sub.add_argument("--context-tokens", type=int, help="the LLM's context: examples are dropped until prompts fit")
    sub.add_argument("--shown", choices=("deciles", "top"), default="deciles", help="which examples are explained")
    sub.add_argument("--promoted", action="store_true", help="show the explainer the promoted tokens too")
    sub.add_argument("--llm-tokenizer", help="a folder or model whose tokenizer counts tokens (default: approximate)")
    sub.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for one answer (default 120)")


def wants_llm(options: argparse.Namespace) -> bool:
    """Return whether an LLM is asked for. Raises: UsageError when what it needs is missing."""
    options.judge = options.judge or options.explainer
    if "llm" not in (options.explainer, options.judge):
        if options.endpoint or options.llm_model or options.estimate:
            raise UsageError("--endpoint, --llm-model and --estimate are for --explainer llm or --judge llm; add one.")
        return False
    if options.judge == "rule":
        raise UsageError("the rule judge executes rules and cannot read a text: --explainer llm needs --judge llm.")
    if not options.llm_model or not (options.endpoint or options.estimate):
        raise UsageError("an LLM needs --endpoint URL and --llm-model NAME.")
    positive("--context-tokens", options.context_tokens)
    for name, value in (("--max-usd", options.max_usd), ("--timeout", options.timeout)):
        if value is not None and not value > 0:  # not a number is refused too: no sum would ever pass it
            raise UsageError(f"{name} is {value:g}; it must be above 0.")
    return True


def counter_of(options: argparse.Namespace) -> Any:
    """Return what counts the tokens of prompts."""
    from sae_italian.autointerp.llm.prices import TokenCounter
    from sae_italian.models import load_tokenizer

    if options.llm_tokenizer:
        return TokenCounter.of(load_tokenizer(options.llm_tokenizer), options.llm_tokenizer)
    return TokenCounter()


def explainer_settings(options: argparse.Namespace) -> Any:
    from sae_italian.autointerp.llm.explainer import ExplainerConfig

    return ExplainerConfig(options.language, options.shown, promoted=options.promoted, context=options.context_tokens)


def client_of(options: argparse.Namespace, ledger: Path) -> Any:
    """Return the client of the options, its calls kept in the store `ledger`."""
    from sae_italian.autointerp.llm.client import Client
    from sae_italian.autointerp.llm.prices import PRICE_FILE

    return Client(
        options.endpoint,
        options.llm_model,
        ledger,
        concurrency=options.concurrency,
        max_usd=options.max_usd,
        prices=options.prices or PRICE_FILE,
        key_variable=options.key_env,
        timeout=options.timeout,
        counter=counter_of(options),
    )


def estimate_llm(
    options: argparse.Namespace, cache: Any, tokenizer: Any, config: Any, sae: Any, control: bool
) -> dict[str, Any]:
    """Return what the LLM of the options would be asked and what that would cost; nothing is sent.

    The random SAE's part is worked out on its cache, and taken to be as much as the trained one's before there is one.
    """
    from sae_italian.autointerp.control import twin_cache
    from sae_italian.autointerp.llm.estimate import estimate
    from sae_italian.autointerp.llm.prices import PRICE_FILE

    settings: dict[str, Any] = {
        "explain": explainer_settings(options) if options.explainer == "llm" else None,
        "language": options.language,
        "counter": counter_of(options),
        "prices": options.prices or PRICE_FILE,
    }
    found = estimate(cache, tokenizer, options.llm_model, config, sae=sae, **settings)
    if control:
        twin = twin_cache(cache, sae, config.seed)
        other = (
            found if twin is None else estimate(twin[0], tokenizer, options.llm_model, config, sae=twin[1], **settings)
        )
        found = found.with_control(other)
    return {"estimate": found.as_dict(), "text": found.text()}


def run_llm(
    options: argparse.Namespace, cache: Any, model: Any, config: Any, sae: Any, control: bool
) -> dict[str, Any]:
    """Explain and judge with the LLM of the options, beside the rules; return summaries, spending and what was noticed.

    With `control` the same explainer and judge then do the same latents' number of the random SAE, on the same budget
    and the same ledger.
    """
    from sae_italian.autointerp.compare import side_by_side
    from sae_italian.autointerp.control import random_sae_control
    from sae_italian.autointerp.llm.explainer import LLMExplainer
    from sae_italian.autointerp.llm.judge import LLMJudge
    from sae_italian.autointerp.run import STORE_FILE, run_autointerp
    from sae_italian.autointerp.store import Store

    path, twin = cache.folder / STORE_FILE, None
    with client_of(options, path) as client:
        explainers = [LLMExplainer(client, explainer_settings(options))] if options.explainer == "llm" else []
        judges = [LLMJudge(client, options.language)]
        run_autointerp(cache, model.tokenizer, config, store=path, sae=sae, explainers=explainers, judges=judges)
        if control:
            twin = random_sae_control(cache, sae, model, config, explainers=explainers, judges=judges)
    with Store(path, {}) as store:
        for feature, why in client.missing.items():
            store.note(f"endpoint without {feature}", f"{options.llm_model}: {why}")
        spending = store.spending()
        flagged = sum(
            bool((explanation.notes or {}).get("wrong_language"))
            for explainer in explainers
            for _, explanation in store.explanations(explainer.name).values()
        )
    return {
        "summaries": [summary.as_dict() for summary in side_by_side(path)],
        "random": [] if twin is None else [summary.as_dict() for summary in side_by_side(twin)],
        "calls": client.counts,
        "endpoint_without": client.missing,
        "wrong_language": flagged,
        "spending": spending,
    }


def llm_text(result: dict[str, Any], path: Path) -> str:
    """Return the side-by-side table, what was spent and what was noticed."""
    from sae_italian.autointerp.compare import comparison_table, side_by_side
    from sae_italian.autointerp.control import TWIN_FOLDER

    twin = path.parent / TWIN_FOLDER / path.name
    lines = [comparison_table(side_by_side(path), side_by_side(twin) if result["random"] else []), ""]
    counts = result["calls"]
    lines.append(
        f"calls: {counts['asked']} asked, {counts['from ledger']} from the ledger, {counts['retries']} retries, "
        f"{counts['failed']} failed"
    )
    for model, row in result["spending"].items():
        usd = "cost not known" if row["usd"] is None else f"${row['usd']:.4f}"
        lines.append(f"{model}, ever: {row['tokens_in'] or 0:,} tokens in, {row['tokens_out'] or 0:,} out, {usd}")
    lines += [f"the endpoint does without {feature}: {why}" for feature, why in result["endpoint_without"].items()]
    if result["wrong_language"]:
        lines.append(f"{result['wrong_language']} explanations are in another language than asked for (flagged)")
    return "\n".join(lines)
