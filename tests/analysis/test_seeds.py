"""Seeds: which latents another training finds again, by hand and by the commands, down to the browser's record."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sae_italian.analysis.geometry import compared, mutual
from sae_italian.base.statistics import wilson
from sae_italian.cli import main
from sae_italian.saes import load_sae


def rows(*numbers: int) -> SimpleNamespace:
    return SimpleNamespace(W_dec=2 * torch.eye(8)[list(numbers)])


def test_only_mutual_nearest_neighbours_match():
    a = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 0, 1.0]]), dim=-1)
    b = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    cosine, index = mutual(a, b)
    assert cosine.tolist()[:2] == [1.0, -1.0], "the second row's nearest has a nearer one"
    assert index[0] == 0


def test_counts_shares_and_labels_by_hand():
    """Seed 0 has latents 0 to 4, the last one dead; seed 1 finds three of them, seed 2 two; one partner has another label."""
    saes = [rows(0, 1, 2, 3, 7), rows(2, 1, 0, 5), rows(1, 0, 4, 6)]
    alive = [np.array([True] * 4 + [False]), np.ones(4, bool), np.ones(4, bool)]
    labels = [np.array([3, 4, -1, 5, 3]), np.array([-1, 4, 3, 0]), np.array([4, 9, -1, -1])]
    found = compared([7, 8, 9], saes, alive, labels)
    assert found.found == [3, 3, 2, 1, None]
    assert found.share.value == 0.5 and found.share.lo < 0.5 < found.share.hi
    assert found.labelled == 3 and found.same_label.value == pytest.approx(3 / 6)
    assert found.curve["0.7"][0] == pytest.approx(5 / 8) and 0 <= found.random < 0.5
    assert found.same_label_chance == pytest.approx((2 / 9 + 1 / 6) / 2)
    assert "50.0% (" in found.table() and "random directions" in found.table()


def test_a_label_found_again_is_held_against_as_many_partners_and_latents_count_once():
    """Of eight latents of two labels half are found again, in both other seeds, and all of these agree."""
    first, other = rows(0, 1, 2, 3, 4, 5, 6, 7), rows(0, 1, 2, 3)
    other.W_dec = torch.cat([other.W_dec, torch.eye(8)[4:].flip(0) * -1])
    label = np.arange(8) % 2
    found = compared([0, 1, 2], [first, other, other], [np.ones(8, bool)] * 3, [label] * 3)
    assert found.same_label.value == 0.5
    assert found.same_label_chance == 0.25, "half have a partner, of which half would agree; 0.5 if all had one"
    alone = wilson(8, 16)
    assert found.same_label.hi - found.same_label.lo > 1.3 * (alone.hi - alone.lo), "not as of 16 latents"


def test_a_config_with_seeds_trains_them_on_one_pass_and_the_browser_says_so(tmp_path, capsys):
    out, words = tmp_path / "sae", ["sae.d_sae=64", "training_tokens=20_000"]
    assert main(["train", "mini/topk", *words, "seeds=2", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["seeds"]
    first, other = (load_sae(folder) for folder in (out, out / "seeds/seed-43"))
    assert told["seeds"] == [42, 43] and not torch.equal(first.W_dec, other.W_dec)
    assert set(told["found"]) <= {1, 2, None} and len(told["found"]) == 64
    assert main(["train", "mini/topk", *words, "--out", str(tmp_path / "alone")]) == 0
    assert torch.equal(load_sae(tmp_path / "alone").W_enc, first.W_enc), "another seed beside it changes nothing"
    assert main(["train", str(out), "--resume"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(out), "--tokens", "1000"]) == 0
    assert re.search(r"Latents found in 2 of 2 seeds: [\d.]+% \(", capsys.readouterr().out)
    assert main(["cache", "build", str(out), "--tokens", "2000", "--out", str(tmp_path / "cache")]) == 0
    from sae_italian.browser.source import LatentSource
    from sae_italian.cache import FeatureCache
    from sae_italian.models import load_tokenizer

    source = LatentSource(FeatureCache.open(tmp_path / "cache"), load_tokenizer("sae-italian-mini"))
    latent = next(i for i, count in enumerate(told["found"]) if count)
    assert source.card(latent)["seeds"] == {"found": told["found"][latent], "of": 2}


def test_a_suite_takes_no_seeds(tmp_path, capsys):
    for word in ("seeds=2", "shard_latents=true"):
        assert main(["train", "mini/suite", word, "--out", str(tmp_path / "suite")]) == 2
        said = capsys.readouterr().err
        assert "seeds and shard_latents are for a training of one SAE" in said or "sparse_topk alone" in said
