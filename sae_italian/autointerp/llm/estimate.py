"""What a run would ask and cost, before anything is sent: the same explainer, judge and scorers on a stand-in client."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sae_italian.autointerp.llm.explainer import ExplainerConfig, LLMExplainer
from sae_italian.autointerp.llm.judge import LLMJudge
from sae_italian.autointerp.llm.ledger import Reply, Request
from sae_italian.autointerp.llm.prices import Price, TokenCounter, price_of
from sae_italian.autointerp.run import AutointerpConfig, run_autointerp
from sae_italian.cache import FeatureCache

SAMPLE = 5  # latents that are worked out; the rest is taken to be like them
EXPLANATION = "parola o desinenza che si ripete negli esempi, di solito dopo un articolo o una preposizione articolata"
OUT_EXPLANATION, OUT_NUMBER, OUT_FRAME = 40, 2, 10  # tokens an answer is taken to have


class DryClient:
    """Takes questions as a client does, counts them and answers them without asking anybody."""

    def __init__(self, model: str, counter: TokenCounter):
        self.model, self.counter, self.concurrency = model, counter, 1
        self.calls = self.tokens_in = self.tokens_constant = self.tokens_out = self.tokens_out_most = 0
        self._seen: set[str] = set()

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Reply:
        (key, value), *_ = (request.schema or {})["properties"].items()
        n = value.get("minItems", 0)
        fingerprint = request.key(self.model, {})
        if fingerprint not in self._seen:
            self._seen.add(fingerprint)
            self.calls += 1
            self.tokens_in += self.counter.messages(request.messages)
            self.tokens_constant += self.counter.messages(request.messages[:-1])
            self.tokens_out += OUT_FRAME + OUT_NUMBER * n if n else OUT_EXPLANATION
            self.tokens_out_most += request.max_tokens
        answer = [0] * n if n else f"{EXPLANATION} {self.calls}"  # no two explanations are the same
        return Reply("ok", json.dumps({key: answer}), "stop")

    def estimate(self, latents: int, sampled: int, prices: Path) -> Estimate:
        """Return what `latents` take when `sampled` of them took what was asked so far."""
        scale = latents / max(1, sampled)
        price = price_of(self.model, prices)
        sums = [round(scale * n) for n in (self.calls, self.tokens_in, self.tokens_constant, self.tokens_out)]
        return Estimate(
            self.model,
            latents,
            sampled,
            *sums,
            usd=None if price is None else price.usd(sums[1], sums[3]),
            usd_at_most=None if price is None else 2 * price.usd(sums[1], round(scale * self.tokens_out_most)),
            counted_with=self.counter.how,
            price=_from(price),
        )


@dataclass(frozen=True)
class Estimate:
    """Calls, tokens and dollars of a whole run. `usd` is None where the price is not known."""

    model: str
    latents: int
    sampled: int
    calls: int
    tokens_in: int
    tokens_constant: int  # of tokens_in: the same in every call of a kind, so that a server may have them cached
    tokens_out: int
    usd: float | None
    usd_at_most: float | None  # every answer as long as it may be, and everything asked twice (repairs)
    counted_with: str
    price: str
    of_random: int = 0  # of the latents: the randomly initialised SAE's

    def with_control(self, other: Estimate) -> Estimate:
        """Return what this run and the same one on the randomly initialised SAE take together."""
        names = ("latents", "sampled", "calls", "tokens_in", "tokens_constant", "tokens_out", "usd", "usd_at_most")
        sums: dict[str, Any] = {}
        for name in names:
            ours, theirs = getattr(self, name), getattr(other, name)
            sums[name] = None if ours is None or theirs is None else ours + theirs
        return replace(self, **sums, of_random=other.latents)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        cost = "not known (no price in the price file)"
        if self.usd is not None and self.usd_at_most is not None:
            cost = f"about ${self.usd:.2f}, at most ${self.usd_at_most:.2f} ({self.price})"
        random = f", {self.of_random} of them of the random SAE" if self.of_random else ""
        return "\n".join(
            (
                f"model      {self.model}",
                f"latents    {self.latents}{random} (worked out on {self.sampled})",
                f"calls      {self.calls:,}",
                f"tokens in  {self.tokens_in:,}, of which {self.tokens_constant:,} constant; by {self.counted_with}",
                f"tokens out {self.tokens_out:,}",
                f"cost       {cost}",
            )
        )


def estimate(
    cache: FeatureCache,
    tokenizer: Any,
    model: str,
    config: AutointerpConfig,
    *,
    explain: ExplainerConfig | None,
    language: str,
    counter: TokenCounter,
    prices: Path,
    sae: Any = None,
) -> Estimate:
    """Return what a run from nothing would take, from a few of its latents; nothing is sent and nothing kept."""
    live = int((cache.statistics["count"] > 0).sum())
    wanted = live if config.latents is None else min(config.latents, live)
    client = DryClient(model, counter)
    with tempfile.TemporaryDirectory() as folder:
        store = run_autointerp(
            cache,
            tokenizer,
            replace(config, latents=min(SAMPLE, wanted)),
            store=Path(folder) / "estimate.sqlite",
            sae=sae,
            explainers=[] if explain is None else [LLMExplainer(client, explain)],
            judges=[LLMJudge(client, language)],
        )
        assert store.is_file()
    return client.estimate(wanted, min(SAMPLE, wanted), prices)


def _from(price: Price | None) -> str:
    return "" if price is None else f"prices of {price.date}, {price.source}"
