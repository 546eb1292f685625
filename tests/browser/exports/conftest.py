"""Caches to export: one with explanations, and one over a nasty corpus."""

import pytest

from sae_italian.browser.exports import export
from sae_italian.cache import FeatureCache
from sae_italian.saes import load_sae
from tests.browser.exports.field_check import checked

LATENTS = (0, 11)


@pytest.fixture(scope="package")
def cache(explained) -> FeatureCache:
    return explained


@pytest.fixture(scope="package")
def sae(trained_sae):
    return load_sae(trained_sae)


@pytest.fixture(scope="package")
def nasty(nasty_texts) -> FeatureCache:
    return nasty_texts


@pytest.fixture(scope="package")
def bulk(cache, sae, mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("bulk") / "out"
    return checked(export(cache, mini.tokenizer, out, "neuronpedia-bulk", sae=sae, model=mini, latents=LATENTS))


@pytest.fixture(scope="package")
def batch(cache, sae, mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("batch") / "out"
    return checked(export(cache, mini.tokenizer, out, "neuronpedia", sae=sae, model=mini, latents=LATENTS))
