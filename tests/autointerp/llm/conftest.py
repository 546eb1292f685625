"""Clients, examples and price files for tests of the LLM side."""

from __future__ import annotations

import numpy as np
import pytest

from sae_italian.autointerp.examples import Example, LatentExamples
from sae_italian.autointerp.llm import LLMSettings
from sae_italian.autointerp.llm.client import Client
from sae_italian.autointerp.store import Explanation

MODEL = "prova"


@pytest.fixture
def client_of(tmp_path, monkeypatch):
    """A function from an endpoint and settings to a client that does not wait long."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)

    def make(server, ledger="store.sqlite", llm_model=MODEL, counter=None, **settings):
        url = server if isinstance(server, str) else server.url
        settings = {"explainer": "llm", "endpoint": url, "llm_model": llm_model, "timeout": 5.0, **settings}
        client = Client(LLMSettings(**settings), tmp_path / ledger)
        client.counter = counter or client.counter
        return client

    return make


def an_example(text: str, active: dict[str, float] | None = None, *, marked: bool = True, decile: int = 9) -> Example:
    """An example with one token per word; `active` gives the activations of some words."""
    active = active or {}
    spans, start = [], 0
    for word in text.split(" "):
        spans.append((start, start + len(word)))
        start += len(word) + 1
    values = np.array([active.get(text[a:b], 0.0) for a, b in spans])
    marks = values >= 0.3 * values.max() if marked and values.any() else None
    tokens = np.arange(len(spans))
    return Example(text, np.array(spans), tokens, values, "doc", bool(active), None, marks, decile=decile)


def a_latent(n: int = 12, latent: int = 3) -> LatentExamples:
    train = tuple(an_example(f"la pera numero {i} è rossa", {"pera": 1.0 + i}, decile=i % 10) for i in range(n))
    test = tuple(an_example(f"prova {i} di testo", {"prova": 1.0} if i % 2 else None, marked=False) for i in range(n))
    return LatentExamples(latent, float(n), train, test, test, promoted=("rossa", "verde"))


def an_explanation(text: str = "parole che iniziano con p", latent: int = 3) -> Explanation:
    return Explanation(latent, "prova", "ok", text, "", None)
