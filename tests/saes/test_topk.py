"""Sparse TopK against SAELens' own: the same losses, gradients and training, whatever the settings."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import sae_lens
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE, LoggingConfig, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput

from sae_italian.saes.sparse import annealed_k, tune

D_IN, D_SAE, BATCH = 24, 333, 70


def pair(**settings) -> tuple[Any, Any]:
    """The same weights as SAELens' TopK SAE and as ours; every parameter away from its start values."""
    config = {"d_in": D_IN, "d_sae": D_SAE, "k": 4, "dtype": "float64", **settings}
    torch.manual_seed(0)
    stock: Any = TrainingSAE.from_dict({"architecture": "topk", **config})
    ours = TrainingSAE.from_dict({"architecture": "sparse_topk", **config})
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        stock.W_dec.mul_(0.5 + torch.rand(len(stock.W_dec), 1, dtype=stock.dtype))
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def inputs(sae, n_rows=BATCH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_rows, sae.cfg.d_in, generator=generator, dtype=sae.dtype)


def dead_mask(sae, n_dead, seed=2):
    mask = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    mask[torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))[:n_dead]] = True
    return mask


def step_input(x, dead=None):
    return TrainStepInput(sae_in=x, dead_neuron_mask=dead, coefficients={}, n_training_steps=0, is_logging_step=False)


def run(sae, x, dead=None):
    output = sae.training_forward_pass(step_input(x, dead))
    sae.zero_grad()
    output.loss.backward()
    return output, {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}


def furthest(a, b):
    """The largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def assert_same(stock, ours, x, dead, tolerance):
    (theirs, their_grads), (output, grads) = run(stock, x, dead), run(ours, x, dead)
    assert furthest(output.loss, theirs.loss) < tolerance
    assert furthest(output.sae_out, theirs.sae_out) < tolerance
    assert furthest(output.feature_acts.to_dense(), theirs.feature_acts) < tolerance
    for name in theirs.losses:
        assert furthest(output.losses[name], theirs.losses[name]) < tolerance, name
    for name in their_grads:
        assert furthest(grads[name], their_grads[name]) < tolerance, name


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    d_in=st.integers(2, 40),
    d_sae=st.integers(2, 700),
    batch=st.integers(1, 150),
    kept=st.floats(0, 1),
    dead=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    rescale=st.booleans(),
    bias_on_input=st.booleans(),
)
def test_losses_and_gradients_are_saelens_own(d_in, d_sae, batch, kept, dead, rescale, bias_on_input):
    """Any shape, k from 1 to d_sae, from no dead latent to all."""
    k = max(1, round(kept**3 * d_sae))
    stock, ours = pair(
        d_in=d_in, d_sae=d_sae, k=k, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=bias_on_input
    )
    assert_same(stock, ours, inputs(stock, batch), dead_mask(stock, round(dead * d_sae)), 1e-9)


@pytest.mark.parametrize("n_dead", [0, 5, 300])
@pytest.mark.parametrize("rescale", [True, False])
def test_float32_agrees_to_a_thousandth(n_dead, rescale):
    stock, ours = pair(dtype="float32", rescale_acts_by_decoder_norm=rescale)
    assert_same(stock, ours, inputs(stock), dead_mask(stock, n_dead), 1e-3)


@pytest.mark.parametrize("n_dead", [0, 300])
def test_under_bfloat16_autocast_ours_is_as_near_the_exact_numbers(n_dead):
    """SAELens rounds every product to bfloat16, ours the encoder's only: same latents, errors no larger than theirs."""
    stock, ours = pair(dtype="float32")
    x, dead = inputs(stock), dead_mask(stock, n_dead)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (theirs, their_grads), (output, grads) = run(stock, x, dead), run(ours, x, dead)
    kept = theirs.feature_acts > 0
    assert torch.equal(output.feature_acts.to_dense() > 0, kept)
    assert furthest(output.loss, theirs.loss) < 1e-3
    for name in grads:
        assert furthest(grads[name], their_grads[name]) < 2e-2, name
    if not n_dead:  # the exact numbers for the latents that bfloat16 selects
        exact, _ = pair(dtype="float64")
        hidden = (x.double() - exact.b_dec) @ exact.W_enc + exact.b_enc
        out = (hidden.relu() * kept) @ exact.W_dec + exact.b_dec
        (out - x.double()).pow(2).sum(-1).mean().backward()
        for name, parameter in exact.named_parameters():
            assert furthest(grads[name], parameter.grad) < 1.2 * furthest(their_grads[name], parameter.grad), name


def trainer_of(sae, **settings):
    config = SAETrainerConfig(
        total_training_samples=100 * BATCH,
        train_batch_size_samples=BATCH,
        device="cpu",
        autocast=False,
        lr=1e-3,
        lr_end=1e-4,
        lr_scheduler_name="constant",
        lr_warm_up_steps=3,
        lr_decay_steps=0,
        n_restart_cycles=1,
        adam_beta1=0.9,
        adam_beta2=0.999,
        dead_feature_window=2,
        feature_sampling_window=1000,
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(cfg=config, sae=sae, data_provider=iter(()))


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-5), ("float32", 1e-3)])
@pytest.mark.parametrize("tuned", [False, True])
def test_ten_steps_of_saelens_own_trainer_end_at_the_same_weights(dtype, tolerance, tuned):
    """With latents that die after two steps; weights, firing counts and logged metrics agree."""
    saes = pair(dtype=dtype)
    stock, ours = (trainer_of(sae) for sae in saes)
    if tuned:
        assert all(group["fused"] for group in tune(ours).optimizer.param_groups)
    for step in range(10):
        x = inputs(saes[0], seed=step)
        theirs, output = stock.step(x), ours.step(x)
        stock.n_training_steps += 1
        ours.n_training_steps += 1
    assert stock.dead_neurons.any() and not stock.dead_neurons.all()
    for name, parameter in saes[0].named_parameters():
        assert furthest(dict(saes[1].named_parameters())[name], parameter) < tolerance, name
    assert torch.equal(ours.act_freq_scores, stock.act_freq_scores)
    assert torch.equal(ours.n_forward_passes_since_fired, stock.n_forward_passes_since_fired)
    wanted, row = stock.build_train_step_log_dict(theirs, 1), ours.build_train_step_log_dict(output, 1)
    assert row == pytest.approx(wanted, rel=tolerance)


def test_ties_and_rows_of_zeros():
    """Equal latents: k of them, whichever. A row without a positive pre-activation gives the decoder's bias."""
    _, ours = pair(rescale_acts_by_decoder_norm=False, apply_b_dec_to_input=False)
    with torch.no_grad():
        ours.W_enc[:] = 1
        ours.b_enc[:] = 0
    x = inputs(ours).abs()
    x[3] = 0
    x[5] = -1
    output, grads = run(ours, x)
    acts = output.feature_acts.to_dense()
    assert (acts[0] > 0).sum() == 4 and torch.allclose(acts[0][acts[0] > 0], x[0].sum())
    assert not acts[[3, 5]].any() and torch.equal(output.sae_out[[3, 5]], ours.b_dec.expand(2, -1))
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_fewer_positive_than_k():
    """What TopK keeps of a row with one positive latent is that latent; the rest is zero and gets no gradient."""
    stock, ours = pair(k=40)
    for sae in (stock, ours):
        with torch.no_grad():
            sae.b_enc.fill_(-1e3)
            sae.b_enc[7] = 1e3
    assert_same(stock, ours, inputs(stock), None, 1e-9)
    _, grads = run(ours, inputs(ours))
    assert grads["b_enc"].nonzero().flatten().tolist() == [7]


def test_the_input_gets_its_gradient():
    stock, ours = pair()
    gradients = []
    for sae in (stock, ours):
        x = inputs(sae).requires_grad_()
        sae.training_forward_pass(step_input(x)).loss.backward()
        gradients.append((x.grad, sae.b_dec.grad))
    for wanted, got in zip(*gradients, strict=True):
        assert furthest(got, wanted) < 1e-9


def test_k_can_change_between_steps():
    ours = pair(k_anneal_steps=24 - 4)[1]
    for step, k in ((0, D_IN), (10, 14), (20, 4)):
        wanted = pair(k=k)[0]
        given = step_input(inputs(ours))
        given.n_training_steps = step
        theirs, output = (sae.training_forward_pass(given) for sae in (wanted, ours))
        assert furthest(output.sae_out, theirs.sae_out) < 1e-9
        assert torch.allclose(ours.encode(given.sae_in), wanted.encode(given.sae_in))
    assert ours.cfg.k == 4


def test_k_falls_linearly_from_d_in_to_k():
    """390,625 steps of Llama Scope's 8x recipe: 39,062 of annealing, as `k_warmup_steps` in a published config."""

    def ks(d_in, k, n_steps, steps):
        cfg: Any = SimpleNamespace(d_in=d_in, d_sae=2 * d_in, k=k, k_anneal_steps=n_steps)
        return [annealed_k(step, cfg) for step in steps]

    steps = (0, 9_766, 19_531, 39_061, 39_062, 390_624)
    assert ks(4096, 50, 39_062, steps) == [4096, 3084, 2073, 50, 50, 50]
    assert ks(64, 50, 0, (0, 3)) == [50, 50]
    assert ks(32, 50, 50, (3,)) == [50], "it never starts below k"
    narrow: Any = SimpleNamespace(d_in=64, d_sae=32, k=4, k_anneal_steps=10)
    assert annealed_k(0, narrow) == 32, "it has no more latents"
    falling = ks(128, 8, 30, range(40))
    assert falling == sorted(falling, reverse=True) and falling[29] > 8 and falling[30] == 8


def test_saelens_own_trainer_anneals_k_and_a_saved_sae_says_nothing_of_it(tmp_path):
    ours = pair(k_anneal_steps=6)[1]
    with torch.no_grad():
        ours.b_enc.fill_(50.0)  # all are positive
    trainer, kept = trainer_of(ours), []
    for step in range(8):
        acts = trainer.step(inputs(ours, seed=step)).feature_acts
        trainer.n_training_steps += 1
        kept.append(int(acts._values().count_nonzero()) // BATCH)
    assert kept == [24, 21, 17, 14, 11, 7, 4, 4]
    ours.save_inference_model(tmp_path / "ours")
    loaded = SAE.load_from_disk(tmp_path / "ours")
    assert type(loaded) is sae_lens.TopKSAE and loaded.cfg.k == 4


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_saelens_own_architectures_have_an_annealed_twin(architecture):
    config = {"d_in": 16, "d_sae": 64, "k": 4, "k_anneal_steps": 10, "rescale_acts_by_decoder_norm": True}
    sae: Any = TrainingSAE.from_dict({"architecture": f"started_{architecture}", **config})
    with torch.no_grad():
        sae.b_enc.fill_(5.0)  # all are positive
    for step, k in ((0, 16), (5, 10), (10, 4)):
        given = TrainStepInput(torch.randn(20, 16), {}, None, step, False)
        acts = sae.training_forward_pass(given).feature_acts
        assert int((acts.to_dense() if acts.is_sparse else acts).count_nonzero()) == 20 * k


def test_saved_as_plain_topk_that_saelens_loads(tmp_path):
    stock, ours = pair()
    x = inputs(stock)
    stock.save_inference_model(tmp_path / "stock")
    ours.save_inference_model(tmp_path / "ours")
    theirs, loaded = SAE.load_from_disk(tmp_path / "stock"), SAE.load_from_disk(tmp_path / "ours")
    assert type(loaded) is sae_lens.TopKSAE and loaded.cfg.architecture() == "topk"
    assert torch.equal(loaded(x), theirs(x))


def test_a_checkpoint_of_either_continues_as_the_other(tmp_path):
    """And memory keeps a latent in one piece, which the kernels want, after every way of loading."""
    stock, ours = pair()
    for sae, name in ((stock, "stock"), (ours, "ours")):
        sae.save_model(tmp_path / name)
    blank = TrainingSAE.from_dict({"architecture": "sparse_topk", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float64"})
    blank.load_weights_from_checkpoint(tmp_path / "stock")
    loaded: Any = TrainingSAE.load_from_disk(tmp_path / "ours")
    for sae in (blank, loaded, copy.deepcopy(ours)):
        assert torch.equal(sae.W_enc, stock.W_enc) and sae.W_enc.T.is_contiguous()
    assert type(loaded) is type(ours)


def test_a_gradient_that_is_held_is_not_overwritten():
    """A gradient that somebody can still see stays; gradients that are not cleared add up."""
    _, ours = pair()
    x, other = inputs(ours), inputs(ours, seed=9)
    _, first = run(ours, x)
    held = [ours.W_enc.grad, ours.W_dec.grad.view(-1), ours.W_dec.grad.numpy()]
    copies = [copy.deepcopy(tensor) for tensor in held]
    _, second = run(ours, other)
    assert all((a == b).all() for a, b in zip(held, copies, strict=True))
    del held
    ours.zero_grad()
    for batch in (x, other):  # without zero_grad in between, they add up
        ours.training_forward_pass(step_input(batch)).loss.backward()
    for name, parameter in ours.named_parameters():
        assert furthest(parameter.grad, first[name] + second[name]) < 1e-9, name


def test_whoever_hooks_the_activations_sees_all_of_them():
    stock, ours = pair()
    seen = []
    ours.hook_sae_acts_pre.add_hook(lambda value, hook: seen.append(value.shape))
    assert_same(stock, ours, inputs(stock), None, 1e-9)
    assert seen == [(BATCH, D_SAE)]


def test_auxiliary_loss_refuses_what_saelens_refuses():
    _, ours = pair(normalize_activations="layer_norm")
    run(ours, inputs(ours))
    with pytest.raises(ValueError, match="layer_norm"):
        run(ours, inputs(ours), dead_mask(ours, 3))
