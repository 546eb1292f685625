"""Caches to export: one with explanations, and one over a nasty corpus."""

import shutil

import pytest

from sae_italian.autointerp import AutointerpConfig, run_autointerp
from sae_italian.browser.exports import export
from sae_italian.cache import FeatureCache
from sae_italian.saes import load_sae
from tests.browser.nasty import nasty_cache

LATENTS = (0, 11)


@pytest.fixture(scope="package")
def cache(small_cache, mini, tmp_path_factory) -> FeatureCache:
    folder = tmp_path_factory.mktemp("exports") / "cache"
    shutil.copytree(small_cache, folder, ignore=shutil.ignore_patterns("*.sqlite*"))
    found = FeatureCache.open(folder)
    run_autointerp(found, mini.tokenizer, AutointerpConfig(latents=24, n_examples=20))
    return found


@pytest.fixture(scope="package")
def sae(trained_sae):
    return load_sae(trained_sae)


@pytest.fixture(scope="package")
def nasty(mini, topk_sae, tmp_path_factory) -> FeatureCache:
    return FeatureCache.open(nasty_cache(tmp_path_factory.mktemp("nasty"), topk_sae, mini))


@pytest.fixture(scope="package")
def bulk(cache, sae, mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("bulk") / "out"
    return export(cache, mini.tokenizer, out, "neuronpedia-bulk", sae=sae, model=mini, latents=LATENTS)


@pytest.fixture(scope="package")
def batch(cache, sae, mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("batch") / "out"
    return export(cache, mini.tokenizer, out, "neuronpedia", sae=sae, model=mini, latents=LATENTS)
