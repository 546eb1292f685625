"""The bilingual table of labels: whole, in order, in both languages."""

import dataclasses

import pytest

from sae_italian.base.labels import label, labels, page_labels
from sae_italian.evaluation.card import EvaluationCard


def test_a_label_in_each_language():
    assert label("card.dead_in_100k", "en") == "Dead latents in 100,000 tokens"
    assert label("card.dead_in_100k", "it") == "Latenti morti in 100.000 token"
    assert label("gold.gender=fem", "it") == "femminile"
    with pytest.raises(KeyError):
        label("card.none")


def test_every_key_has_both_languages_and_only_text():
    both = page_labels()
    assert both["scorer.detection"] == ["Detection", "Detection"] and len(both) > 130
    assert all(isinstance(text, str) and text for texts in both.values() for text in texts)


def test_the_card_names_all_its_numbers_in_its_order():
    numbers = [field.name for field in dataclasses.fields(EvaluationCard) if field.type == "Estimate"]
    assert list(labels("card")) == numbers
