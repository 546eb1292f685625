"""A language model beside the rules: what a run would ask and cost, the run itself, and its table."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_italian.autointerp.llm.client import Client, EndpointError
from sae_italian.autointerp.llm.cost import CostEstimate, DryClient
from sae_italian.autointerp.llm.explainer import LLMExplainer
from sae_italian.autointerp.llm.judge import LLMJudge
from sae_italian.autointerp.llm.settings import LLMSettings
from sae_italian.autointerp.run import STORE_FILE, TWIN_FOLDER, random_sae_control, run_autointerp, twin_cache
from sae_italian.autointerp.store import Store
from sae_italian.autointerp.summary import comparison_table, side_by_side
from sae_italian.autointerp.work import AutointerpConfig
from sae_italian.cache import FeatureCache

SAMPLE = 5  # latents that an estimate is worked out on; the rest is taken to be like them


def estimate_beside(
    cache: FeatureCache, tokenizer: Any, config: AutointerpConfig, sae: Any, settings: LLMSettings, *, control: bool
) -> CostEstimate:
    """Return what a run from nothing would take, from a few of its latents; nothing is sent and nothing kept.

    With `control` the random SAE's part is worked out on its cache, and taken to be as much as the trained one's before
    there is one.
    """
    found = _estimate(cache, tokenizer, config, sae, settings)
    if not control:
        return found
    twin = twin_cache(cache, sae, config.seed)
    return found.with_control(found if twin is None else _estimate(twin[0], tokenizer, config, twin[1], settings))


def _estimate(
    cache: FeatureCache, tokenizer: Any, config: AutointerpConfig, sae: Any, settings: LLMSettings
) -> CostEstimate:
    live = int((cache.statistics["count"] > 0).sum())
    wanted = live if config.latents is None else min(config.latents, live)
    config, client = replace(config, latents=min(SAMPLE, wanted)), DryClient(settings)
    with tempfile.TemporaryDirectory() as folder:
        explainers = [LLMExplainer(client)] if settings.explainer == "llm" else []
        where = Path(folder) / STORE_FILE
        run_autointerp(cache, tokenizer, config, store=where, sae=sae, explainers=explainers, judges=[LLMJudge(client)])
    return client.estimate(wanted, min(SAMPLE, wanted))


def run_beside(
    cache: FeatureCache, model: Any, config: AutointerpConfig, sae: Any, settings: LLMSettings, *, control: bool
) -> dict[str, Any]:
    """Explain and judge with a language model, beside the rules; return summaries, spending and what was noticed.

    With `control` the same explainer and judge then do the same latents' number of the random SAE, on the same budget
    and the same ledger. Raises: EndpointError, also when there was something to ask and not one answer.
    """
    path, twin = cache.folder / STORE_FILE, None
    with Client(settings, path) as client:
        explainers = [LLMExplainer(client)] if settings.explainer == "llm" else []
        judges = [LLMJudge(client)]
        run_autointerp(cache, model.tokenizer, config, store=path, sae=sae, explainers=explainers, judges=judges)
        if control:
            twin = random_sae_control(cache, sae, model, config, explainers=explainers, judges=judges)
    if client.counts["failed"] and not client.counts["asked"]:
        raise EndpointError(
            f"{settings.endpoint} answered none of {client.counts['failed']} questions: {client.problem}."
        )
    with Store(path, {}) as store:
        for feature, why in client.missing.items():
            store.note({f"endpoint without {feature}": f"{settings.llm_model}: {why}"})
        found = [e for explainer in explainers for _, e in store.explanations(explainer.name).values()]
        spending = store.spending()
    return {
        "summaries": [summary.as_dict() for summary in side_by_side(path)],
        "random": [] if twin is None else [summary.as_dict() for summary in side_by_side(twin)],
        "calls": client.counts,
        "problem": client.problem,
        "endpoint_without": client.missing,
        "wrong_language": sum(bool((explanation.notes or {}).get("wrong_language")) for explanation in found),
        "spending": spending,
    }


def beside_text(result: dict[str, Any], path: Path) -> str:
    """Return the side-by-side table of a store, what was spent and what was noticed."""
    twin = path.parent / TWIN_FOLDER / path.name
    counts = result["calls"]
    lines = [
        comparison_table(side_by_side(path), side_by_side(twin) if result["random"] else []),
        "",
        f"calls: {counts['asked']} asked, {counts['from ledger']} from the ledger, {counts['retries']} retries, "
        f"{counts['failed']} failed{', the last: ' + result['problem'] if counts['failed'] else ''}",
    ]
    if counts["cut"]:
        lines.append(f"{counts['cut']} answers were cut at the token limit; max_output_tokens=N gives them more room")
    for model, row in result["spending"].items():
        usd = "cost not known" if row["usd"] is None else f"${row['usd']:.4f}"
        lines.append(f"{model}, ever: {row['tokens_in'] or 0:,} tokens in, {row['tokens_out'] or 0:,} out, {usd}")
    lines += [f"the endpoint does without {feature}: {why}" for feature, why in result["endpoint_without"].items()]
    if result["wrong_language"]:
        lines.append(f"{result['wrong_language']} explanations are in another language than asked for (flagged)")
    return "\n".join(lines)
