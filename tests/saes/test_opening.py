"""Public functions take folders, names, or what was loaded, and find the rest in the SAE's metadata."""

import copy
import shutil

import pytest
import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKSAE, TopKSAEConfig

import sae_italian
from sae_italian.base.errors import DataError, UsageError
from sae_italian.saes import check_fits, load_sae
from tests.conftest import described


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


@pytest.mark.parametrize("given", [None, 3, {"a": "runs/x"}, ("runs/x", {}, None)])
def test_what_is_no_sae_is_told_so(mini, small_cache, given):
    what = f"the SAE is a {type(given).__name__}; give one of SAELens"
    for use in (
        lambda: sae_italian.evaluate(given, mini),
        lambda: sae_italian.build_cache(given, mini, "micro-italiano"),
        lambda: check_fits(given, mini),
        lambda: sae_italian.FeatureCache.open(small_cache, sae=given or "runs/x"),
    ):
        with pytest.raises(UsageError, match=what if given else "the SAE is a (NoneType|str); give"):
            use()


def test_a_batchtopk_in_training_is_not_measured(mini):
    """SAELens' runner returns it; its latents of a token depend on the others of the batch, and are not those it is saved with."""
    d_in = mini.config.hidden_size
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=64, k=4))
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    with pytest.raises(UsageError, match="in training, its latents depend on the batch.*save_inference_model"):
        sae_italian.evaluate(sae, mini, "micro-italiano")


def test_an_sae_that_divides_by_a_decoder_norm_of_0_is_refused(mini, tmp_path):
    """Whatever it is given, it writes NaN: the losses, the variance explained and the cosine were that, without a word."""
    sae = described(
        TopKSAE(TopKSAEConfig(d_in=128, d_sae=64, k=4, rescale_acts_by_decoder_norm=True)), "blocks.1.hook_resid_post"
    )
    check_fits(sae, mini)
    with torch.no_grad():
        sae.W_dec[[3, 5]] = 0
    sae.save_model(tmp_path)
    for use in (lambda: check_fits(sae, mini), lambda: load_sae(tmp_path)):
        with pytest.raises(DataError, match="2 rows of W_dec are 0, and it divides by their norms"):
            use()
    sae.cfg.rescale_acts_by_decoder_norm = False  # then these latents write nothing
    check_fits(sae, mini)


def test_what_the_metadata_does_not_say_is_asked_for(trained_sae, mini):
    sae = copy.deepcopy(load_sae(trained_sae))
    sae.cfg.metadata.dataset_path = None
    with pytest.raises(UsageError, match="does not name its corpus"):
        sae_italian.evaluate(sae, mini)
    sae.cfg.metadata.dataset_path, sae.cfg.metadata.model_name = "micro-italiano", None
    with pytest.raises(UsageError, match="does not name its model"):
        sae_italian.evaluate(sae)
