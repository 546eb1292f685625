"""An LLM to explain with while somebody waits: any OpenAI-compatible endpoint, one short call at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_italian.autointerp.protocols import LatentExamples
from sae_italian.autointerp.store import Explanation
from sae_italian.base.errors import UsageError

TIMEOUT, ATTEMPTS = 20.0, 1  # a person is waiting, and everybody behind


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, as `sae-italian autointerp --explainer llm` does; the key comes from the environment."""

    url: str
    model: str
    language: str = "it"
    key_variable: str | None = None
    max_usd: float | None = None
    prices: Path | None = None

    def client(self, ledger: Path) -> Any:
        """Return the client, not yet opened. Raises: UsageError for an address, a key or a budget that cannot hold."""
        from sae_italian.autointerp.llm.client import Client
        from sae_italian.autointerp.llm.settings import LLMSettings

        settings = LLMSettings(
            explainer="llm",
            endpoint=self.url,
            llm_model=self.model,
            language=self.language,  # pyright: ignore[reportArgumentType]
            max_usd=self.max_usd,
            prices=self.prices,
            key_env=self.key_variable,
            timeout=TIMEOUT,
            attempts=ATTEMPTS,
            concurrency=1,
        )
        return Client(settings, ledger)

    def explain(self, examples: LatentExamples, ledger: Path) -> Explanation:
        """Return one explanation; the call is kept in the ledger, which answers when it is asked again."""
        from sae_italian.autointerp.llm.explainer import LLMExplainer

        with self.client(ledger) as client:
            explainer = LLMExplainer(client)
            try:
                return explainer.explain(examples)[0]
            except UsageError as error:  # the server is down: the rule beside it is shown all the same
                notes = {"problem": str(error)}
                return Explanation(examples.latent, explainer.name, "no answer", "", "", None, "llm", "", notes)
