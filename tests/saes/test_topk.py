"""Sparse TopK against SAELens' own: the same losses, gradients and training, whatever the settings."""

from typing import Any

import sae_lens
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.sae import TrainStepInput

import sae_italian.plugin

sae_italian.plugin.install()
D_IN, D_SAE, BATCH = 24, 333, 70


def pair(**settings) -> tuple[Any, Any]:
    """The same weights as SAELens' TopK SAE and as ours; every parameter away from its start values."""
    config = {"d_in": D_IN, "d_sae": D_SAE, "k": 4, "dtype": "float64", **settings}
    torch.manual_seed(0)
    stock: Any = TrainingSAE.from_dict({"architecture": "topk", **config})
    ours = TrainingSAE.from_dict({"architecture": "sparse_topk", **config})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        stock.W_dec.mul_(0.5 + torch.rand(len(stock.W_dec), 1, generator=generator, dtype=stock.dtype))
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def inputs(sae, n_rows=BATCH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_rows, sae.cfg.d_in, generator=generator, dtype=sae.dtype)


def dead_mask(sae, n_dead, seed=2):
    mask = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    mask[torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))[:n_dead]] = True
    return mask


def run(sae, x, dead=None):
    output = sae.training_forward_pass(
        TrainStepInput(sae_in=x, dead_neuron_mask=dead, coefficients={}, n_training_steps=0, is_logging_step=False)
    )
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


@settings(deadline=None, max_examples=60, derandomize=True)
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


def test_saved_as_plain_topk_that_saelens_loads(tmp_path):
    stock, ours = pair()
    x = inputs(stock)
    stock.save_inference_model(tmp_path / "stock")
    ours.save_inference_model(tmp_path / "ours")
    theirs, loaded = SAE.load_from_disk(tmp_path / "stock"), SAE.load_from_disk(tmp_path / "ours")
    assert type(loaded) is sae_lens.TopKSAE and loaded.cfg.architecture() == "topk"
    assert torch.equal(loaded(x), theirs(x))


def test_k_can_change_between_steps():
    _, ours = pair()
    x = inputs(ours)
    for k in (D_IN, 10, 1):
        ours.active_k = k
        wanted = pair(k=k)[0]
        assert_same(wanted, ours, x, None, 1e-9)
        assert torch.allclose(ours.encode(x), wanted.encode(x))
