"""Where an SAE starts: at zero, or at the centre of its first batch."""

from typing import Any

import pytest
import torch
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput

from sae_italian.saes.architectures import _centre

D = 16
ARCHITECTURES = {
    "sparse_topk": {"k": 4}, "started_topk": {"k": 4}, "started_batchtopk": {"k": 4}, "started_standard": {},
    "started_jumprelu": {}, "started_gated": {}, "started_matryoshka_batchtopk": {"k": 4, "matryoshka_widths": [16, 64]},
}  # fmt: skip


def rows(seed: int = 0) -> torch.Tensor:
    """Rows far from zero: their mean has a norm of about 40, what differs of about 4."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(512, D, generator=generator) + 10


def step(sae: Any, x: torch.Tensor, n: int = 0) -> Any:
    return sae.training_forward_pass(TrainStepInput(x, {"l1": 0.1, "l0": 0.1}, None, n, False))


def sae_of(architecture: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    return TrainingSAE.from_dict({"architecture": architecture, "d_in": D, "d_sae": 64, **fields})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_starts_at_the_mean_of_its_first_batch_alone(architecture):
    sae = sae_of(architecture, start="mean", **ARCHITECTURES[architecture])
    x = rows()
    step(sae, x)
    assert torch.allclose(sae.b_dec, x.mean(0), atol=1e-5)
    step(sae, rows(1), 1)
    assert torch.allclose(sae.b_dec, x.mean(0), atol=1e-5)
    zero = sae_of(architecture, **ARCHITECTURES[architecture])
    step(zero, x)
    assert not zero.b_dec.any()


def test_the_encoder_is_centred_either_way():
    """With x - b_dec as its input or with a bias that does the same, the latents of a row are the same."""
    inside, beside = (sae_of("sparse_topk", k=4, start="mean", apply_b_dec_to_input=given) for given in (True, False))
    one, other = (step(sae, rows()) for sae in (inside, beside))
    assert torch.allclose(one.feature_acts.to_dense(), other.feature_acts.to_dense(), atol=1e-4)
    assert torch.allclose(one.sae_out, other.sae_out, atol=1e-4)
    assert one.losses["mse_loss"] < 0.05 * step(sae_of("sparse_topk", k=4), rows()).losses["mse_loss"]


def test_a_transcoder_starts_at_the_mean_of_its_target():
    sae = sae_of("topk_transcoder", k=4, d_out=8, start="mean")
    x, y = rows(), rows(1)[:, :8] * 3
    output = step(sae, torch.cat([x, y], dim=-1))
    assert torch.allclose(sae.b_dec, y.mean(0), atol=1e-4)
    assert torch.allclose(sae.b_enc, -x.mean(0) @ sae.W_enc, atol=1e-4)
    assert output.losses["mse_loss"] < 0.2 * (y**2).sum(-1).mean()


def test_rows_of_massive_norm_do_not_count():
    x = rows()
    x[0] = 1e5  # as a BOS that was not left out
    x[1:60] = 25  # and some that are not massive
    assert (x.mean(0) - 10).abs().min() > 100
    assert torch.allclose(_centre(x), x[1:].mean(0))


def test_a_gated_sae_that_reads_x_itself_cannot_be_centred():
    with pytest.raises(ValueError, match="apply_b_dec_to_input"):
        step(sae_of("started_gated", start="mean", apply_b_dec_to_input=False), rows())


def a_loop(said: list[str], start: str = "zero") -> Any:
    from types import SimpleNamespace

    from sae_italian.training.loop import HOPELESS_AFTER
    from sae_italian.training.processes import ALONE

    spec = SimpleNamespace(lr_warm_up_steps=0, sae={"architecture": "topk", "d_sae": 4_096, "start": start})
    runs = {"sae": SimpleNamespace(spec=spec)}
    bar = SimpleNamespace(write=lambda text, file: said.append(text))
    first = SimpleNamespace(n_steps=HOPELESS_AFTER)
    return bar, SimpleNamespace(warned=set(), dead={}, runs=runs, first=first, processes=ALONE)


def test_a_start_that_is_too_far_is_said_once_and_while_it_is_cheap():
    from sae_italian.training.loop import Loop

    said: list[str] = []
    bar, loop = a_loop(said)
    Loop._warn_of_the_start(loop, bar, "sae", -12.1, 40)
    assert not said  # too early to tell
    loop.first.n_steps += 1
    Loop._warn_of_the_start(loop, bar, "sae", 0.3, 40)
    assert not said
    for _ in range(2):
        Loop._warn_of_the_start(loop, bar, "sae", -2.8, 3_765)
    assert len(said) == 1 and "3,765 of 4,096 latents dead" in said[0] and "Set sae.start=mean." in said[0]
    assert "\n" not in said[0]


def test_latents_that_die_are_said_though_the_variance_is_explained():
    """The zero start on a real model at lr 4e-3: explained variance 0.15 after 30 steps, 92 % dead."""
    from sae_italian.training.loop import Loop

    said: list[str] = []
    bar, loop = a_loop(said, "mean")
    loop.first.n_steps += 1
    Loop._warn_of_the_start(loop, bar, "sae", 0.15, 4_000)
    loop.warned.clear()
    said.clear()
    Loop._warn_of_the_start(loop, bar, "sae", 0.15, 3_767)  # they come back: healthy
    assert not said
    Loop._warn_of_the_start(loop, bar, "sae", 0.15, 3_800)
    assert len(said) == 1 and "Lower lr" in said[0]


@pytest.mark.parametrize(("architecture", "more"), [("topk", {"k": 4}), ("sparse_topk", {"k": 4}), ("standard", {})])
def test_a_config_that_says_nothing_starts_at_the_mean(architecture, more):
    from sae_italian.training import spec_from_dict

    def config(**start: str) -> Any:
        sae = {"architecture": architecture, "d_sae": 64, **more, **start}
        values = {"model": "sae-italian-mini", "hook_name": "blocks.1.hook_resid_post", "training_tokens": 4_096}
        return spec_from_dict({**values, "sae": sae}).sae_config()

    assert config().start == "mean"
    zero = config(start="zero")
    assert zero.architecture() == architecture and getattr(zero, "start", "zero") == "zero"


def test_stock_saelens_settings_keep_their_start():
    """A runner config of SAELens' own trains here from zero, as it does there; one of ours keeps what it says."""
    from sae_italian.training import RunSpec, load_spec

    for words, start in ((["sae.start=zero"], "zero"), (["sae.start=mean"], "mean")):
        spec = load_spec("mini/topk", *words)
        assert RunSpec.from_saelens(spec.to_saelens()).sae["start"] == start
