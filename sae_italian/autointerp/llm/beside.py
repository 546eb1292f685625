"""A language model beside the rules: what a run would ask and cost, the run itself, and its table."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_italian.autointerp.llm.askers import LLMExplainer, LLMJudge
from sae_italian.autointerp.llm.calls import DryClient
from sae_italian.autointerp.llm.client import Client
from sae_italian.autointerp.llm.settings import LLMSettings
from sae_italian.autointerp.run import STORE_FILE, random_sae_control, run_autointerp, twin_cache
from sae_italian.autointerp.store import Store
from sae_italian.autointerp.summary import comparison_table, side_by_side
from sae_italian.autointerp.work import AutointerpConfig
from sae_italian.base.report import plain
from sae_italian.cache import FeatureCache

SAMPLE = 5  # latents that an estimate is worked out on; the rest is taken to be like them


def estimate_beside(
    cache: FeatureCache, tokenizer: Any, config: AutointerpConfig, sae: Any, settings: LLMSettings, *, control: bool
) -> dict[str, Any]:
    """Return what a run from nothing would take, from a few of its latents; nothing is sent and nothing kept.

    With `control` the random SAE's part is worked out on its cache, and taken to be as much as the trained one's before
    there is one.
    """
    client, twin = DryClient(settings), twin_cache(cache, sae, config.seed) if control else None
    counted = []  # latents, and of these those that are asked about here
    for one, its_sae in ((cache, sae), *([] if twin is None else [twin])):
        live = int((one.statistics["count"] > 0).sum())
        wanted = live if config.latents is None else min(config.latents, live)
        counted.append((wanted, min(SAMPLE, wanted)))
        with tempfile.TemporaryDirectory() as folder:
            few, store = replace(config, latents=min(SAMPLE, wanted)), Path(folder) / STORE_FILE
            run_autointerp(one, tokenizer, few, store=store, sae=its_sae, **_askers(client))
    of_random = counted[-1][0] if control else 0
    return client.estimate(counted[0][0] + of_random, sum(sampled for _, sampled in counted), of_random)


def _askers(client: Client | DryClient) -> dict[str, Any]:
    """Return the explainers and judges that the client's settings ask for, as a run takes them."""
    explainers = [LLMExplainer(client)] if client.settings.explainer == "llm" else []
    return {"explainers": explainers, "judges": [LLMJudge(client)]}


def run_beside(
    cache: FeatureCache, model: Any, config: AutointerpConfig, sae: Any, settings: LLMSettings, *, control: bool
) -> tuple[dict[str, Any], str]:
    """Explain and judge with a language model, beside the rules.

    Return summaries, what became of the questions, spending and what was noticed; and the same as a table and lines. With
    `control` the same explainer and judge then do the same latents' number of the random SAE, on the same budget and the
    same ledger. Raises: EndpointError, also when there was something to ask and not one answer.
    """
    path, random = cache.folder / STORE_FILE, []
    with Client(settings, path) as client:
        askers = _askers(client)
        run_autointerp(cache, model.tokenizer, config, store=path, sae=sae, **askers)
        if control:
            random = side_by_side(random_sae_control(cache, sae, model, config, **askers))
    client.must_have_answered()
    with Store(path, {}) as store:
        store.note({f"endpoint without {name}": f"{client.model}: {why}" for name, why in client.missing.items()})
        found = [e for explainer in askers["explainers"] for _, e in store.explanations(explainer.name).values()]
        spending = store.spending()
    n_foreign = sum(bool((explanation.notes or {}).get("wrong_language")) for explanation in found)
    facts = {
        "summaries": side_by_side(path),
        "random": random,
        "calls": client.counts,
        "why": client.told()[1:],
        "endpoint_without": client.missing,
        "wrong_language": n_foreign,
        "spending": spending,
    }
    lines = [comparison_table(facts["summaries"], random), "", *client.told()]
    for name, row in spending.items():
        usd = "cost not known" if row["usd"] is None else f"${row['usd']:.4f}"
        lines.append(f"{name}, ever: {row['tokens_in'] or 0:,} tokens in, {row['tokens_out'] or 0:,} out, {usd}")
    lines += [f"the endpoint does without {feature}: {why}" for feature, why in client.missing.items()]
    if n_foreign:
        lines.append(f"{n_foreign} explanations are in another language than asked for (flagged)")
    return plain(facts), "\n".join(lines)
