"""Training on activations that SAELens cached: the model's own, each once, from a saved place on; and what does not fit."""

import pytest
import torch

from sae_italian.base.errors import UsageError
from sae_italian.corpora import iter_documents
from sae_italian.corpora.pretokenize import CachedActivations
from sae_italian.models.activations import read_activations
from sae_italian.saes import load_sae
from sae_italian.training import load_config, load_spec, train
from sae_italian.training.run import open_stream

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def spec(cached_activations, small_spec):
    changes = {
        "use_cached_activations": True,
        "cached_activations_path": str(cached_activations),
        "training_tokens": 10_240,
    }
    return small_spec.model_copy(update=changes)


def test_batches_are_the_cached_rows_and_a_saved_stream_goes_on(spec, mini, cached_activations, tmp_path, monkeypatch):
    from datasets import load_from_disk

    stream = open_stream(spec, mini, HOOK)
    with monkeypatch.context() as patch:
        patch.setattr("sae_italian.training.stream.read_many", None)  # the model has nothing to do
        served = [next(stream) for _ in range(6)]
    tokens = torch.tensor(load_from_disk(str(cached_activations))[:40]["token_ids"])
    acts = read_activations(mini, tokens, HOOK)[tokens != mini.tokenizer.bos_token_id]
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
    assert torch.cdist(torch.cat(served)[:50], acts, **exact).min(dim=1).values.max() < 1e-3
    stream.save(tmp_path)
    expected = [next(stream) for _ in range(20)]
    again = open_stream(spec, mini, HOOK)
    again.load(tmp_path)
    assert all(torch.equal(next(again), batch) for batch in expected)


def test_it_trains_here_and_from_saelens_own_config(spec, cached_activations, tmp_path, monkeypatch):
    """The same keys as SAELens'; `load_config` hands them on, and `train` takes them back."""
    sae = load_sae(train(spec, tmp_path / "sae"))
    assert sae.cfg.metadata.hook_name == HOOK
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ("use_cached_activations=true", f"cached_activations_path={cached_activations}", "training_tokens=10k")
    config = load_config("mini/topk", *words, "train_batch_size_tokens=512", "buffer_tokens=4096", "sae.d_sae=256")
    assert config.use_cached_activations and config.cached_activations_path == str(cached_activations)
    assert (train(config, tmp_path / "theirs") / "sae_weights.safetensors").is_file()


def test_lists_without_a_shape_are_refused(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({HOOK: [[[0.0]]], "token_ids": [[1]]}).save_to_disk(str(tmp_path / "a"))
    with pytest.raises(UsageError, match="as lists without a shape. SAELens' CacheActivationsRunner makes them"):
        CachedActivations(tmp_path / "a", [HOOK], 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cached_activations_path": "nowhere"}, "'nowhere' holds no activations .*CacheActivationsRunner makes them"),
        ({"hook_name": "blocks.2.hook_resid_post"}, f"has no 'blocks.2.hook_resid_post', only {HOOK}, token_ids"),
        ({"context_size": 64}, "windows of 128 tokens and 128 dimensions at .* context_size is 64"),
        ({"training_tokens": 40_960}, "20,480 training tokens, fewer than the 40,960"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(spec, changes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        train(spec.model_copy(update=changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert load_spec("mini/topk").use_cached_activations is False


def test_a_folder_of_activations_given_as_a_corpus_is_named(cached_activations):
    with pytest.raises(
        UsageError, match="activations that SAELens kept: `train` reads them: use_cached_activations=true"
    ):
        next(iter_documents(str(cached_activations)))
