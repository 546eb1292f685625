"""One cache with its SAE and model, as the server gets it: the texts are nasty, the explanations a rule's."""

import shutil
from collections.abc import Iterator

import pytest
import torch

starlette = pytest.importorskip("starlette", reason="needs the serve extra")

from starlette.testclient import TestClient as Client  # noqa: E402

from sae_italian.browser import server  # noqa: E402
from sae_italian.browser.live import Live  # noqa: E402
from sae_italian.browser.opening import PageAnswers, beside  # noqa: E402
from sae_italian.browser.source import LatentSource  # noqa: E402
from sae_italian.cache import FeatureCache, build_cache  # noqa: E402
from sae_italian.saes import load_sae  # noqa: E402
from tests.browser.nasty import nasty_corpus  # noqa: E402

ADDRESS = "http://127.0.0.1:8765"


def create_app(source, live=None, *, other=None, encoder=None):
    return server.Server(PageAnswers(source, live, other, encoder))


def open_with_live(cache, tokenizer, *, sae, model):
    return LatentSource(cache, tokenizer, sae=sae, model=model), Live(cache, sae, model)


class TestClient(Client):
    """A client that was told the whole address, with the token."""

    def __init__(self, app, **options):
        super().__init__(app, headers={"x-token": app.token}, **options)


@pytest.fixture(scope="package")
def cache(explained, tmp_path_factory) -> FeatureCache:
    """A copy: what is explained on demand is kept in it."""
    folder = tmp_path_factory.mktemp("served") / "cache"
    return FeatureCache.open(shutil.copytree(explained.folder, folder))


@pytest.fixture(scope="package")
def opened(cache, mini, trained_sae):
    return open_with_live(cache, mini.tokenizer, sae=load_sae(trained_sae), model=mini)


@pytest.fixture(scope="package")
def compared(opened, cache, mini, topk_sae, tmp_path_factory):
    """Another SAE of the same model beside it."""
    corpus = nasty_corpus(tmp_path_factory.mktemp("other"))
    folder = tmp_path_factory.mktemp("other") / "cache"
    build_cache(topk_sae, mini, str(corpus), folder, n_tokens=None, split="all", sae_name="altra")
    source, _ = open_with_live(FeatureCache.open(folder), mini.tokenizer, sae=topk_sae, model=mini)
    return beside(opened[0], source)


@pytest.fixture(scope="package")
def live(opened) -> Live:
    return opened[1]


@pytest.fixture(scope="package")
def nasty(nasty_texts, mini, topk_sae):
    """Source and live work over a corpus that tries everything."""
    return open_with_live(nasty_texts, mini.tokenizer, sae=topk_sae, model=mini)


@pytest.fixture(scope="package")
def client(opened) -> Iterator[TestClient]:
    torch.set_num_threads(1)
    with TestClient(create_app(*opened), base_url=ADDRESS, raise_server_exceptions=False) as found:
        yield found


@pytest.fixture(scope="package")
def active(cache) -> int:
    """A latent that fires on many tokens."""
    return int(cache.statistics["count"].argmax())
