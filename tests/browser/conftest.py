"""What several of the browser's tests look at: an explained cache, one of nasty texts, and a real browser."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from sae_italian.autointerp import AutointerpConfig, run_autointerp
from sae_italian.cache import FeatureCache
from tests.browser.chromium import CHROMIUM, FLAGS
from tests.browser.nasty import nasty_cache


@pytest.fixture(scope="session")
def explained(small_cache, mini, tmp_path_factory) -> FeatureCache:
    """A cache with the explanations of some latents; to be read only."""
    folder = tmp_path_factory.mktemp("explained") / "cache"
    shutil.copytree(small_cache, folder, ignore=shutil.ignore_patterns("*.sqlite*"))
    cache = FeatureCache.open(folder)
    run_autointerp(cache, mini.tokenizer, AutointerpConfig(latents=24, n_examples=20))
    return cache


@pytest.fixture(scope="session")
def nasty_texts(mini, topk_sae, tmp_path_factory) -> FeatureCache:
    """A cache over a corpus that tries everything."""
    return FeatureCache.open(nasty_cache(tmp_path_factory.mktemp("nasty"), topk_sae, mini))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is absent: pip install 'sae-italian[dev]'"
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()
