"""Public functions take folders, names, or what was loaded, and find the rest in the SAE's metadata."""

import copy
import shutil

import pytest

import sae_italian
from sae_italian.base.errors import UsageError
from sae_italian.saes import load_sae


def test_a_folder_is_enough(trained_sae, mini, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_sae, tmp_path / "runs" / "x")
    card = sae_italian.evaluate("runs/x", n_tokens=1000, loss_tokens=200)
    same = sae_italian.evaluate(load_sae(trained_sae), mini, "micro-italiano", n_tokens=1000, loss_tokens=200)
    assert card.sae == "runs/x" and repr(card.estimates()) == repr(same.estimates())
    folder = sae_italian.build_cache("runs/x", n_tokens=3000)
    cache = sae_italian.FeatureCache.open(folder)
    assert str(folder) == "caches/x" and cache.manifest.sae == str(tmp_path / "runs" / "x")
    assert cache.manifest.corpus == "micro-italiano" and cache.manifest.model == "sae-italian-mini"


def test_what_the_metadata_does_not_say_is_asked_for(trained_sae, mini):
    sae = copy.deepcopy(load_sae(trained_sae))
    sae.cfg.metadata.dataset_path = None
    with pytest.raises(UsageError, match="does not name its corpus"):
        sae_italian.evaluate(sae, mini)
    sae.cfg.metadata.dataset_path, sae.cfg.metadata.model_name = "micro-italiano", None
    with pytest.raises(UsageError, match="does not name its model"):
        sae_italian.evaluate(sae)
