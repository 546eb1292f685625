"""Which k, checked against truth: the L0 of a planted dictionary is found by short trainings."""

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

from sae_italian.benchmark.choose_k import projections, recommend
from tests.benchmark.test_choose_k import trial


def planted(n: int, seed: int, l0: int = 6) -> torch.Tensor:
    """Return sums of `l0` of 48 orthogonal directions in 64 dimensions, some of which like to fire together."""
    fixed, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed + 1)
    directions = torch.linalg.qr(torch.randn(64, 64, generator=fixed))[0][:48]
    loads = 0.7 * torch.randn(48, 6, generator=fixed)
    score = torch.randn(n, 6, generator=drawn) @ loads.T + torch.randn(n, 48, generator=drawn)
    on = torch.zeros(n, 48).scatter_(1, score.topk(l0).indices, 1.0)
    return (on * (1 + 0.15 * torch.randn(n, 48, generator=drawn)).relu()) @ directions


def trained(k: int, seed: int, x: torch.Tensor, n_steps: int = 800) -> TopKTrainingSAE:
    torch.manual_seed(seed)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=64, d_sae=48, k=k))
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, n_steps)
    for step in range(n_steps):
        given = {"coefficients": {}, "dead_neuron_mask": None, "n_training_steps": step, "is_logging_step": False}
        batch = x[torch.randint(len(x), (256,))]
        sae.training_forward_pass(TrainStepInput(sae_in=batch, **given)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return sae


@pytest.mark.slow
def test_the_true_l0_of_a_planted_dictionary_is_found_within_a_fifth():
    x, others = planted(20_000, 0), planted(4000, 1)
    trials = []
    for k in (4, 5, 6, 7, 9):
        for seed in (0, 1):
            trials.append(trial(k, seed, *projections(trained(k, seed, x), others).values()))
    found = recommend(trials, 0)
    assert found.k is not None and abs(found.k - 6) < 0.2 * 6, found.table()
    assert found.lo <= 6 <= found.hi
