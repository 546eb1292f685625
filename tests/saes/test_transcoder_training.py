"""Transcoders trained on SAELens' trainer: a planted MLP is learnt, and what is saved is what was trained."""

import pytest
import torch
from sae_lens import SAE, LoggingConfig, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig

import sae_italian  # noqa: F401  # registers the architectures
from sae_italian.saes import load_sae
from sae_italian.saes.architectures import PairScaler
from sae_italian.saes.fit import save_sae
from sae_italian.saes.jumprelu import to_jumprelu

D_IN, D_OUT, D_SAE = 24, 16, 96


class Planted:
    """Inputs of few directions at a time, and their image under one linear map: scales of 9 and 0.2."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)
        self.directions = torch.nn.functional.normalize(torch.randn(40, D_IN, generator=self.generator), dim=-1)
        self.map = torch.randn(D_IN, D_OUT, generator=self.generator)

    def __iter__(self):
        return self

    def __next__(self) -> torch.Tensor:
        on = torch.rand(256, 40, generator=self.generator) < 0.06
        x = (on * (0.5 + torch.rand(256, 40, generator=self.generator))) @ self.directions
        return torch.cat([9 * x, 0.2 * x @ self.map + 0.1], dim=-1)


def trained(architecture: str, **fields) -> tuple[SAETrainer, Planted]:
    torch.manual_seed(0)
    values = {"architecture": architecture, "d_in": D_IN, "d_out": D_OUT, "d_sae": D_SAE, **fields}
    sae = TrainingSAE.from_dict(
        values | {"apply_b_dec_to_input": False, "normalize_activations": "expected_average_only_in"}
    )
    config = SAETrainerConfig(
        total_training_samples=150 * 256,
        train_batch_size_samples=256,
        lr=1e-2,
        lr_end=1e-3,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        lr_decay_steps=50,
        n_restart_cycles=1,
        adam_beta1=0.9,
        adam_beta2=0.999,
        device="cpu",
        autocast=False,
        dead_feature_window=50,
        feature_sampling_window=200,
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=4,
    )
    data = Planted()
    trainer = SAETrainer(config, sae, data)
    trainer.activation_scaler = PairScaler(D_IN)
    return trainer, data


def explained(sae, data: Planted) -> float:
    x, y = next(data).split([D_IN, D_OUT], dim=-1)
    return 1 - ((sae(x) - y).pow(2).sum() / (y - y.mean(0)).pow(2).sum()).item()


@pytest.mark.parametrize(
    ("architecture", "fields", "saved_class"),
    [
        ("topk_transcoder", {"k": 6, "aux_loss_coefficient": 0.0, "decoder_init_norm": 0.7}, "TopKTranscoder"),
        ("transcoder", {"l1_coefficient": 0.3, "decoder_init_norm": 0.7}, "Transcoder"),
    ],
)
def test_a_linear_map_is_learnt_and_saved_for_raw_activations(architecture, fields, saved_class, tmp_path):
    trainer, data = trained(architecture, **fields)
    start = trainer.sae.W_enc.detach().clone()
    assert torch.allclose(start.norm(dim=0), torch.full((D_SAE,), 0.7)) and not torch.allclose(
        torch.nn.functional.cosine_similarity(start.T[:, :D_OUT], trainer.sae.W_dec, dim=-1).abs().mean(),
        torch.tensor(1.0),
        atol=0.5,
    ), "encoder and decoder start apart"
    trainer.fit()
    assert trainer.sae.cfg.normalize_activations == "none" and trainer.activation_scaler.scaling_factor is None
    trainer.sae.save_inference_model(tmp_path / "tc")
    sae = load_sae(tmp_path / "tc")
    assert type(sae).__name__ == saved_class and sae.cfg.d_out == D_OUT
    assert explained(sae, data) > 0.9
    x = next(data)[:, :D_IN]
    assert (sae(x) - trainer.sae(x)).abs().max() < 1e-4 * sae(x).abs().max()
    if saved_class == "Transcoder":
        assert type(SAE.load_from_disk(tmp_path / "tc")).__module__.startswith("sae_lens"), "SAELens' own class"
    else:
        assert ((sae.encode(x) != 0).sum(-1) <= 6).all() and not sae.W_skip.any()
        x, y = torch.cat([next(data) for _ in range(8)]).split([D_IN, D_OUT], dim=-1)
        exported = to_jumprelu(sae, x, y)
        plain = SAE.load_from_disk(save_sae(exported, tmp_path / "jr"))
        assert type(plain).__module__.startswith("sae_lens") and explained(plain, data) > 0.8
        assert exported.cfg.metadata.jumprelu_export["explained_variance_before"] > 0.9


def test_the_two_halves_have_scales_of_their_own(tmp_path):
    scaler, data = PairScaler(D_IN), Planted()
    scaler.estimate_scaling_factor(D_IN, data, 8)
    x, y = scaler(next(data)).split([D_IN, D_OUT], dim=-1)
    assert x.norm(dim=-1).mean() == pytest.approx(D_IN**0.5, rel=0.1)
    assert y.norm(dim=-1).mean() == pytest.approx(D_OUT**0.5, rel=0.1)
    scaler.save(str(tmp_path / "scaler.json"))
    again = PairScaler(D_IN)
    again.load(tmp_path / "scaler.json")
    batch = next(data)
    assert torch.equal(again(batch), scaler(batch))
