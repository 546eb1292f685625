"""The card on SAEs whose numbers are known, and against SAELens' own evals on the same tokens."""

import json

import pytest
import torch

from sae_italian.errors import UsageError
from sae_italian.models.train_mini import Recipe, build_model
from sae_italian.saes import load_sae, random_twin, weights_hash
from sae_italian.training import evaluate


def test_identity(identity_sae, mini):
    card = evaluate(identity_sae, mini, "micro-italiano", n_tokens=4000)
    assert card.explained_variance.value == pytest.approx(1, abs=1e-6)
    assert card.explained_variance_uncentred.value == pytest.approx(1, abs=1e-6)
    assert card.ce_loss_recovered.value == pytest.approx(1, abs=1e-6)
    assert card.kl_div_with_sae.value == pytest.approx(0, abs=1e-5)
    assert card.l0.value == pytest.approx(mini.config.hidden_size, rel=0.01)


def test_zero(identity_sae, mini):
    import copy

    sae = copy.deepcopy(identity_sae)
    with torch.no_grad():
        sae.W_dec.zero_()
    card = evaluate(sae, mini, "micro-italiano", n_tokens=4000)
    assert card.explained_variance_uncentred.value == pytest.approx(0, abs=1e-6)
    assert card.explained_variance.value < 0.05  # below 0: it does not even get the mean right
    assert card.ce_loss_recovered.value == 0


def test_mean(identity_sae, mini):
    """An SAE that always gives the mean explains no variance."""
    import copy

    from sae_italian.corpora import iter_documents, pack
    from sae_italian.models.activations import read_activations

    sae = copy.deepcopy(identity_sae)
    block = next(pack(iter_documents("micro-italiano", "heldout"), mini.tokenizer, 128, windows_per_block=32))
    tokens = torch.from_numpy(block.tokens)
    acts = read_activations(mini, tokens, "blocks.2.hook_resid_post")[tokens != mini.tokenizer.bos_token_id]
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(acts.mean(0))
    card = evaluate(sae, mini, "micro-italiano", n_tokens=4096)
    assert card.explained_variance.value == pytest.approx(0, abs=1e-4)
    assert card.l0.value > 0


def test_numbers_equal_saelens_evals_on_the_same_tokens(trained_sae, mini):
    from sae_lens import ActivationsStore
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    from sae_italian.corpora import iter_documents, pack
    from sae_italian.models import load_model

    sae = load_sae(trained_sae)
    card = evaluate(sae, mini, "micro-italiano", n_tokens=4096)
    block = next(pack(iter_documents("micro-italiano", "heldout"), mini.tokenizer, 128, windows_per_block=32))
    hooked = load_model("sae-italian-mini", "hooked")
    from datasets import Dataset

    store = ActivationsStore.from_sae(
        hooked,
        sae,
        dataset=Dataset.from_dict({"tokens": block.tokens.tolist()}),
        store_batch_size_prompts=16,
        streaming=False,
    )
    config = EvalConfig(
        batch_size_prompts=16,
        n_eval_reconstruction_batches=2,
        n_eval_sparsity_variance_batches=2,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    theirs, _ = run_evals(sae, store, hooked, ActivationScaler(), config, exclude_special_tokens=True)
    preserved, behaviour = theirs["model_performance_preservation"], theirs["model_behavior_preservation"]
    assert card.ce_loss.value == pytest.approx(preserved["ce_loss_without_sae"], rel=1e-4)
    assert card.ce_loss_with_sae.value == pytest.approx(preserved["ce_loss_with_sae"], rel=1e-4)
    # SAELens ablates BOS too, where it does not apply the SAE; ours leaves it, so that a zero SAE recovers exactly 0.
    assert card.ce_loss_with_ablation.value != pytest.approx(preserved["ce_loss_with_ablation"], rel=1e-4)
    assert card.kl_div_with_sae.value == pytest.approx(behaviour["kl_div_with_sae"], rel=1e-3)
    assert card.explained_variance.value == pytest.approx(
        theirs["reconstruction_quality"]["explained_variance"], rel=1e-3
    )
    assert card.l0.value == pytest.approx(theirs["sparsity"]["l0"], rel=1e-4)


def test_intervals_hold_the_value_and_shrink_with_more_text(trained_sae, mini):
    sae = load_sae(trained_sae)
    few, many = (evaluate(sae, mini, "micro-italiano", n_tokens=n) for n in (3000, 24_000))
    for card in (few, many):
        for name in ("explained_variance", "ce_loss_recovered", "ce_loss"):
            estimate = getattr(card, name)
            assert estimate.lo < estimate.value < estimate.hi
    assert many.ce_loss.hi - many.ce_loss.lo < few.ce_loss.hi - few.ce_loss.lo


def test_the_card_is_saved_as_json_and_markdown(trained_sae, mini, tmp_path):
    card = evaluate(load_sae(trained_sae), mini, "micro-italiano", n_tokens=2000)
    card.save(tmp_path)
    assert json.loads((tmp_path / "card.json").read_text())["l0"]["value"] == 8
    assert "| explained_variance |" in (tmp_path / "card.md").read_text()


def test_an_sae_of_another_width_is_refused(topk_sae):
    import types

    other = build_model(Recipe(d_model=64, n_heads=2, d_mlp=64, vocab_size=300)).eval()
    other.tokenizer = types.SimpleNamespace()
    with pytest.raises(UsageError, match="d_in.*the model has 64.*sae-italian-mini"):
        evaluate(topk_sae, other, "micro-italiano", n_tokens=100)


def test_a_corpus_too_short_for_the_tokens_asked(topk_sae, mini, jsonl):
    with pytest.raises(UsageError, match="has about .* fewer than the 9,000,000"):
        evaluate(topk_sae, mini, str(jsonl), split="all", n_tokens=9_000_000)


def test_a_context_longer_than_the_models(topk_sae, mini):
    with pytest.raises(UsageError, match="512 positions"):
        evaluate(topk_sae, mini, "micro-italiano", n_tokens=100, context_size=1000)


def test_a_random_twin_is_another_sae_of_the_same_kind(topk_sae):
    before = weights_hash(topk_sae)
    twin = random_twin(topk_sae, seed=1)
    assert type(twin) is type(topk_sae) and twin.cfg.k == topk_sae.cfg.k
    assert weights_hash(twin) != before == weights_hash(topk_sae)
    assert weights_hash(random_twin(topk_sae, seed=1)) == weights_hash(twin)
    assert torch.allclose(twin.W_dec.norm(dim=-1), torch.ones(topk_sae.cfg.d_sae))
