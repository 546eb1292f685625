"""What commit 2c011dc wrote opens: an SAE, a feature cache and a store, with the numbers they had there.

`tests/data/old` was written by that commit: `train mini/topk sae.d_sae=48 sae.k=4 training_tokens=40000`, `cache build
--tokens 3000`, `autointerp --latents 6 --no-random-control`.
"""

import shutil
from pathlib import Path

import pytest
import torch

from sae_italian.base.errors import UsageError
from sae_italian.cache import FeatureCache
from sae_italian.saes import load_sae

OLD = Path(__file__).parent / "data" / "old"


def test_an_old_sae_encodes_as_it_did():
    sae = load_sae(OLD / "sae")
    with torch.no_grad():
        latents = sae.encode(torch.linspace(-1, 1, 128)[None])
        assert latents.nonzero().tolist() == [[0, 3], [0, 33], [0, 34], [0, 36]]
        assert latents[latents != 0].tolist() == pytest.approx([0.931667, 0.570547, 0.631856, 0.674104], abs=1e-5)
        assert float(sae.decode(latents).sum()) == pytest.approx(-0.040944, abs=1e-4)


def test_an_old_cache_opens_whole(tmp_path):
    cache = FeatureCache.open(shutil.copytree(OLD / "cache", tmp_path / "cache"), check=True)
    manifest = cache.manifest
    assert (manifest.schema_version, manifest.d_sae, manifest.k) == (2, 48, 4)
    assert sum(shard.nnz for shard in manifest.shards) == 12_052
    facts = cache.latent(7).statistics
    assert (facts["count"], facts["n_documents"], facts["max"]) == (145, 35, 9.4375)
    assert facts["token_ids"][:3] == [380, 342, 353] and facts["cofiring_ids"][0] == 41
    assert facts["histogram"][:10] == [0, 0, 0, 0, 0, 0, 2, 9, 3, 16]


def test_an_old_store_is_read_or_says_what_to_do(tmp_path):
    from sae_italian.autointerp.store import Store

    path = shutil.copytree(OLD / "cache", tmp_path / "cache") / "autointerp.sqlite"
    try:
        with Store(path, {}, read_only=True) as store:
            assert len(store.explanations("rules")) == 6
    except UsageError as error:
        assert "autointerp" in str(error) and "again" in str(error)
