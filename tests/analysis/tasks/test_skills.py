"""The mini model has learnt its language: figures asked for by the project, on text of other seeds than training."""

import json
from pathlib import Path

from sae_italian.analysis import ioi_pairs, ioi_score, italian_skills, words_for
from sae_italian.models import catalogue


def test_determiner_noun_agreement_and_the_indirect_object(mini):
    skills = italian_skills(mini)
    assert skills["agreement, all"] >= 0.9, skills
    assert skills["agreement, gender"] >= 0.85 and skills["agreement, number"] >= 0.85, skills
    assert skills["indirect object, mean difference"] > 0 and skills["indirect object, right"] >= 0.8, skills


def test_both_orders_of_the_names_are_right(mini):
    """A model that always names the first (or the last) person would fail one of them."""
    pairs = ioi_pairs(300, mini.tokenizer, words_for("sae-italian-mini"), n_name_tokens=None, seed=1002)
    found = ioi_score(mini, mini.tokenizer, pairs)
    assert set(found.by_kind) == {"ABBA", "BABA"} and all(share.value >= 0.7 for share in found.by_kind.values())


def test_the_training_record_lies_beside_the_weights():
    record = json.loads((Path(catalogue()["sae-italian-mini"].official) / "training.json").read_text())
    assert ".train_mini --out" in record["command"]
    assert {"seed", "tokens", "minutes", "held_out_loss_nats", "curve", "recipe", "versions"} <= set(record)
