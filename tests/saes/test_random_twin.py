"""The random twin fires as the SAE does: as often on a token, and each latent as often as one of the SAE's."""

from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE

from sae_italian.base.errors import UsageError
from sae_italian.evaluation.diagnosis import held_out_activations
from sae_italian.saes.baselines import CALIBRATION_TOKENS, _cutoff, random_twin
from sae_italian.saes.fit import firing_counts
from sae_italian.saes.loading import load_sae
from sae_italian.training import load_spec, train
from tests.conftest import described

D_IN, D_SAE = 128, 400
TOKENS = 16_384  # that the made SAEs are calibrated on: none of their latents is rarer than 1 %
ARCHITECTURES = ["standard", "jumprelu", "gated", "transcoder", "jumprelu_transcoder"]


def trained(architecture: str, x: torch.Tensor) -> Any:
    """An SAE whose latents read the data's own directions, each firing on a share of tokens from 1 % to 60 %."""
    torch.manual_seed(0)
    config = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": False}
    sae: Any = described(SAE.from_dict(config | ({"d_out": D_IN} if "transcoder" in architecture else {})))
    with torch.no_grad():
        sae.W_enc.copy_(torch.nn.functional.normalize(x[:: len(x) // D_SAE][:D_SAE] - x.mean(0), dim=-1).T)
        sae.W_dec.copy_(sae.W_enc.T)
        shares = torch.logspace(-2, -0.22, D_SAE)
        cut = (x @ sae.W_enc).sort(0, descending=True).values.gather(0, (shares * len(x)).long()[None])[0]
        thresholds = torch.rand(D_SAE) if hasattr(sae, "threshold") else torch.zeros(D_SAE)
        for name, value in (("b_enc", thresholds - cut), ("threshold", thresholds), ("b_gate", -cut), ("b_mag", -cut)):
            if getattr(sae, name, None) is not None:
                getattr(sae, name).copy_(value)
        if architecture == "gated":
            sae.r_mag.normal_(std=0.1)
            sae.b_mag.add_(0.5)
    return sae


@pytest.fixture(scope="module")
def rows(mini):
    """Activations of held-out text: those to calibrate on, and those of other documents."""
    plain = described(SAE.from_dict({"architecture": "standard", "d_in": D_IN, "d_sae": 8}))
    x, *_ = held_out_activations(plain, mini, "micro-italiano", 2 * TOKENS)
    return x[:TOKENS], x[TOKENS + 128 :]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_twin_fires_as_often_on_documents_it_was_not_calibrated_on(architecture, rows):
    """L0 within 2 %, every decile of the sorted firing rates within 10 %; before, b_enc was zero and thresholds kept."""
    fitted, others = rows
    sae = trained(architecture, fitted)
    twin = random_twin(sae, 1, lambda: fitted)
    here, there = (firing_counts(each, others).double().sort().values / len(others) for each in (sae, twin))
    assert there.sum().item() == pytest.approx(here.sum().item(), rel=0.02)
    deciles = torch.arange(0.1, 1.0, 0.1).double()
    assert torch.allclose(there.quantile(deciles), here.quantile(deciles), rtol=0.1)
    again = random_twin(sae, 1, lambda: fitted)
    assert all(torch.equal(one, other) for one, other in zip(twin.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_the_calibration_each_latent_fires_exactly_as_often(architecture, rows):
    sae = trained(architecture, rows[0])
    with torch.no_grad():  # one that never fires, one that always does
        for name in ("b_enc", "b_gate", "b_mag"):
            if getattr(sae, name, None) is not None:
                getattr(sae, name)[:2] = torch.tensor([-1e4, 1e4])
    twin = random_twin(sae, 0, lambda: rows[0])
    off = firing_counts(twin, rows[0]) - firing_counts(sae, rows[0])
    # tokens whose activations are equal (a first word that many documents have) fire together
    assert off[:2].tolist() == [0, 0] and off.abs().max() <= 0.001 * TOKENS


@pytest.mark.parametrize("count", range(11))
def test_so_many_values_lie_above_the_cutoff(count):
    values = np.random.default_rng(0).permutation(10.0 + np.arange(10))
    assert (values > _cutoff(values, count)).sum() == count
    assert _cutoff(values, 0) > 20  # so that on other tokens too none is above it


def test_a_top_k_needs_no_activations_and_others_say_so(topk_sae, rows):
    twin = random_twin(topk_sae, 0, lambda: pytest.fail("they were asked for"))
    assert firing_counts(twin, rows[0][:200]).sum() == firing_counts(topk_sae, rows[0][:200]).sum()
    assert torch.equal(twin.W_enc, twin.W_dec.T) and not twin.b_enc.any()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(random_twin(topk_sae, 0).W_enc, twin.W_enc)  # another control was drawn
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(UsageError, match="twin of a standard SAE is calibrated on activations; none are given"):
        random_twin(trained("standard", rows[0]))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["batchtopk", "jumprelu", "gated"])
def test_the_twin_of_a_trained_sae_fires_as_often_rare_latents_too(recipe, mini, tmp_path):
    """On other documents: L0 within 2 %, each decile within 10 %; with an eighth of the tokens rare ones were 14 and 40 % off."""
    sae = load_sae(train(load_spec(f"mini/{recipe}", "training_tokens=300_000"), tmp_path / recipe))
    x, *_ = held_out_activations(sae, mini, "micro-italiano", 2 * CALIBRATION_TOKENS)
    others, fitted = x[:CALIBRATION_TOKENS], x[CALIBRATION_TOKENS + 128 :]
    here, there = (firing_counts(each, others) for each in (sae, random_twin(sae, 1, lambda: fitted)))
    assert there.sum().item() == pytest.approx(here.sum().item(), rel=0.02)
    deciles = torch.arange(0.1, 1.0, 0.1).double()
    assert torch.allclose(there.double().quantile(deciles), here.double().quantile(deciles), rtol=0.1)
