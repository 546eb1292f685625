"""The mini model has learnt its language: figures asked for by the project, on text of other seeds than training."""

import json
from pathlib import Path

from sae_italian import micro_italiano
from sae_italian.analysis import agreement_accuracy, ioi_logit_differences
from sae_italian.models import catalogue


def test_determiner_noun_agreement(mini):
    accuracy = agreement_accuracy(mini, micro_italiano.agreement_pairs(300, seed=1001))
    assert accuracy["all"] >= 0.9 and accuracy["gender"] >= 0.85 and accuracy["number"] >= 0.85, accuracy


def test_indirect_object(mini):
    differences = ioi_logit_differences(mini, micro_italiano.ioi_prompts(300, seed=1001))
    assert differences.mean() > 0 and (differences > 0).mean() >= 0.8, (differences.mean(), (differences > 0).mean())


def test_both_orders_of_the_names_are_right(mini):
    """A model that always names the first (or the last) person would fail one of them."""
    prompts = micro_italiano.ioi_prompts(300, seed=1002)
    differences = ioi_logit_differences(mini, prompts)
    for order in ("ABBA", "BABA"):
        chosen = [d for d, prompt in zip(differences, prompts, strict=True) if prompt.order == order]
        assert len(chosen) > 50 and sum(d > 0 for d in chosen) / len(chosen) >= 0.7, order


def test_the_training_record_lies_beside_the_weights():
    record = json.loads((Path(catalogue()["sae-italian-mini"].official) / "training.json").read_text())
    assert record["command"].startswith("python -m sae_italian.micro_italiano.train_mini")
    assert {"seed", "tokens", "minutes", "held_out_loss_nats", "curve", "recipe", "versions"} <= set(record)
