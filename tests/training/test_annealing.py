"""K-annealing: k at each step, L0 at the start and at the end, and start norms of Llama Scope's recipe."""

import json
import types

import pytest
import torch
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput

from sae_italian.base.errors import UsageError
from sae_italian.saes import load_sae
from sae_italian.saes.sparse import annealed_k
from sae_italian.training import load_config, load_spec, train

SMALL = (
    "training_tokens=20480",
    "sae.d_sae=256",
    "train_batch_size_tokens=512",
    "buffer_tokens=4096",
    "store_batch_size_prompts=8",
    "lr_warm_up_steps=0",
    "lr_decay_steps=8",
    "k_anneal_share=0.5",
)


def k_at(step: int, steps: int, d_in: int, k: int) -> float:
    return annealed_k(step, types.SimpleNamespace(d_in=d_in, d_sae=8 * d_in, k=k, k_anneal_steps=steps))


def test_k_falls_linearly_from_d_in_to_k():
    """390,625 steps of the 8x recipe: 39,062 of annealing, as `k_warmup_steps` in a published config."""
    k = [k_at(step, 39_062, 4096, 50) for step in (0, 9_766, 19_531, 39_061, 39_062, 390_624)]
    assert k == [4096, 3084, 2073, 50, 50, 50]
    assert k_at(0, 0, 4096, 50) == 50
    assert k_at(3, 50, 32, 50) == 50, "it never starts below k"
    falling = [k_at(step, 30, 128, 8) for step in range(40)]
    assert falling == sorted(falling, reverse=True) and falling[29] > 8 and falling[30] == 8
    recipe = load_spec("llama-scope/minerva-1b")
    assert recipe.training_tokens // recipe.train_batch_size_tokens * 0.1 == pytest.approx(39_062, abs=1)


@pytest.mark.parametrize("architecture", ["started_topk", "started_abstopk", "sparse_topk", "started_batchtopk"])
def test_as_many_latents_fire_as_the_step_says(architecture):
    values = {"architecture": architecture, "d_in": 16, "d_sae": 64, "k": 4, "k_anneal_steps": 10}
    sae = TrainingSAE.from_dict({**values, "rescale_acts_by_decoder_norm": True})
    with torch.no_grad():
        sae.b_enc.fill_(5.0)  # all are positive
    for step, k in ((0, 16), (5, 10), (10, 4)):
        given = TrainStepInput(torch.randn(20, 16), {}, None, step, False)
        acts = sae.training_forward_pass(given).feature_acts
        assert (acts.to_dense() != 0).sum() == 20 * k
    assert sae.cfg.k == 4, "what is saved is the last k"


def test_an_sae_without_k_is_refused_before_training():
    with pytest.raises(UsageError, match="k_anneal_share needs an SAE with a k"):
        load_spec("mini/cunningham-2023", "k_anneal_share=0.1").to_saelens()


def test_the_stock_runner_starts_and_anneals_too(tmp_path, monkeypatch):
    """SAELens' own runner, from `load_config` alone; what it saves is a plain topk with the last k."""
    from sae_lens import SAE, LanguageModelSAETrainingRunner

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = load_config("mini/llama-scope", *SMALL, "sae.start=mean")
    config.output_path = str(tmp_path / "out")
    sae = LanguageModelSAETrainingRunner(config).run()
    assert sae.cfg.k_anneal_steps == 20 and sae.activation_fn.k == 8 and sae.cfg.start == "mean"
    saved = SAE.load_from_disk(tmp_path / "out")
    assert saved.cfg.architecture() == "topk" and saved.cfg.k == 8


def test_the_recipe_starts_and_ends_as_llama_scope_says(tmp_path):
    """Start norms sqrt(2 / expansion), encoder the decoder's transpose, L0 from many to k; k is saved."""
    spec = load_spec("mini/llama-scope", *SMALL, "sae.decoder_init_norm=1.0")
    sae = TrainingSAE.from_dict(spec.sae_config().to_dict())
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.full((256,), (2 / 2) ** 0.5)) and torch.equal(
        sae.W_enc, sae.W_dec.T
    )
    assert not sae.b_enc.any() and not sae.b_dec.any() and sae.cfg.apply_b_dec_to_input is False
    out = train(spec, tmp_path / "sae")
    l0 = {row["step"]: row["metrics/l0"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())}
    assert 100 < l0[0] <= 128, "of 128 allowed, those that are positive"
    assert l0[10] == k_at(10, 20, 128, 8) == 68 and l0[20] == l0[30] == 8
    saved = load_sae(out)
    assert saved.cfg.k == 8 and saved.cfg.architecture() == "topk" and saved.cfg.normalize_activations == "none"


def test_shipped_start_norms_are_sqrt_of_two_over_the_expansion():
    for name, expansion in (("llama-scope/minerva-1b", 8), ("llama-scope/llama-3.1-8b", 8), ("mini/llama-scope", 8)):
        assert load_spec(name).sae["decoder_init_norm"] == pytest.approx((2 / expansion) ** 0.5)
