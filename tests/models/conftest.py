import pytest

from tests.models.hub import SHRUNKEN, put_in_cache, random_model, save_model


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory):
    """A hub cache that holds a shrunken copy of every family of the catalogue."""
    cache = tmp_path_factory.mktemp("hub")
    for repo_id, config in SHRUNKEN.items():
        folder = tmp_path_factory.mktemp("saved") / "model"
        put_in_cache(cache, repo_id, save_model(random_model(config), folder))
    return cache


@pytest.fixture
def cached_hub(hub_cache, monkeypatch):
    """The same, as this process's hub cache."""
    use_cache(monkeypatch, hub_cache)
    return hub_cache


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    use_cache(monkeypatch, tmp_path / "hub")
    return tmp_path / "hub"


def use_cache(monkeypatch, folder):
    import huggingface_hub.constants

    monkeypatch.setattr("sae_italian.models.loading._HUB_CONFIGS", {})  # of the hub before
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
