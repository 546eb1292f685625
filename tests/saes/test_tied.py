"""The tied SAE against the loss of Cunningham et al. written out, and as SAELens' `standard` on disk."""

import pytest
import torch
from sae_lens import SAE, StandardSAE, TrainingSAE
from sae_lens.saes.sae import TrainStepInput

import sae_italian  # noqa: F401  # registers the architecture
from sae_italian.saes.tied import TiedTrainingSAEConfig

D_IN, D_SAE, ALPHA = 24, 60, 8.6e-4


@pytest.fixture
def sae():
    torch.manual_seed(0)
    config = TiedTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, l1_coefficient=ALPHA * D_IN)
    sae = TrainingSAE.from_dict(config.to_dict())
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.3, 4, D_SAE)[:, None])
        sae.b_enc.normal_(std=0.1)
    return sae


def their_loss(W: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """FunctionalTiedSAE.loss of HoagyC/sparse_coding, written out: the mean over the batch and over d."""
    directions = W / W.norm(2, dim=-1)[:, None]
    c = torch.clamp(torch.einsum("nd,bd->bn", directions, x) + bias, min=0.0)
    x_hat = torch.einsum("nd,bn->bd", directions, c)
    return (x - x_hat).pow(2).mean() + ALPHA * c.norm(1, dim=-1).mean()


def step(x: torch.Tensor) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x, coefficients={"l1": ALPHA * D_IN}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )


def test_loss_and_gradients_are_theirs_times_d_in(sae):
    x = torch.randn(50, D_IN)
    loss = sae.training_forward_pass(step(x)).loss
    loss.backward()
    W, bias = (p.detach().clone().requires_grad_() for p in (sae.W_dec, sae.b_enc))
    theirs = their_loss(W, bias, x)
    theirs.backward()
    assert loss.item() == pytest.approx(D_IN * theirs.item(), rel=1e-5)
    assert torch.allclose(sae.W_dec.grad, D_IN * W.grad, atol=1e-6)
    assert torch.allclose(sae.b_enc.grad, D_IN * bias.grad, atol=1e-6)
    assert sae.b_dec.grad is None and {name for name, _ in sae.named_parameters()} == {"W_dec", "b_enc", "b_dec"}


def test_the_penalty_warms_up_as_its_config_says():
    config = TiedTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, l1_coefficient=3.0, l1_warm_up_steps=7)
    (l1,) = TrainingSAE.from_dict(config.to_dict()).get_coefficients().values()
    assert (l1.value, l1.warm_up_steps) == (3.0, 7)


def test_an_orthonormal_dictionary_reconstructs_what_is_positive_in_it(sae):
    """With W = I on the first d_in rows, far negative biases on the others and b = 0, x^ = ReLU(x)."""
    with torch.no_grad():
        sae.W_dec[:D_IN] = 3 * torch.eye(D_IN)
        sae.b_enc[:D_IN], sae.b_enc[D_IN:] = 0, -1e4
    x = torch.randn(9, D_IN)
    assert torch.allclose(sae(x), x.relu(), atol=1e-6)
    assert sae.training_forward_pass(step(x)).losses["l1_loss"].item() == pytest.approx(
        ALPHA * D_IN * x.relu().sum(-1).mean().item(), rel=1e-5
    )


def test_it_is_saved_as_saelens_standard(sae, tmp_path):
    x = torch.randn(40, D_IN)
    sae.save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path)
    assert type(saved) is StandardSAE and saved.cfg.architecture() == "standard"
    assert torch.allclose(saved(x), sae(x), atol=1e-6) and torch.allclose(saved.encode(x), sae.encode(x), atol=1e-6)
    assert torch.equal(saved.W_enc, saved.W_dec.T) and not saved.b_dec.any()
    assert torch.allclose(saved.W_dec.norm(dim=-1), torch.ones(D_SAE))


def test_folding_an_input_scale_keeps_it_tied(sae, tmp_path):
    x, scale = torch.randn(40, D_IN), 0.037
    before = sae(scale * x) / scale
    sae.fold_activation_norm_scaling_factor(scale)
    assert torch.allclose(sae(x), before, atol=1e-4)
    sae.save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path)
    assert torch.equal(saved.W_enc, saved.W_dec.T) and torch.allclose(saved(x), before, atol=1e-4)


def test_a_checkpoint_is_read_back(sae, tmp_path):
    sae.save_model(tmp_path)
    torch.manual_seed(5)
    other = TrainingSAE.from_dict(sae.cfg.to_dict())
    other.load_weights_from_checkpoint(tmp_path)
    assert torch.equal(other.W_dec, sae.W_dec) and torch.equal(other.b_enc, sae.b_enc)


def test_it_finds_planted_directions():
    """Few of 16 orthogonal directions are on at a time; each is found by some latent."""
    torch.manual_seed(1)
    true = torch.linalg.qr(torch.randn(16, 16))[0]
    sae = TrainingSAE.from_dict(TiedTrainingSAEConfig(d_in=16, d_sae=32, l1_coefficient=0.1).to_dict())
    optimizer = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(1000):
        codes = torch.rand(128, 16) * (torch.rand(128, 16) < 0.12)
        inputs = TrainStepInput(codes @ true, {"l1": 0.1}, None, 0, False)
        optimizer.zero_grad()
        sae.training_forward_pass(inputs).loss.backward()
        optimizer.step()
    assert (sae.directions() @ true.T).max(dim=0).values.min() > 0.95
