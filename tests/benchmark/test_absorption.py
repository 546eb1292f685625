"""Absorption: the known answers, letters with accents folded, and SAEs side by side on planted hierarchies."""

import json
from functools import reduce
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.stats import t as student

from sae_italian.analysis.treebank import Words
from sae_italian.base.errors import UsageError
from sae_italian.benchmark.absorption import (
    Absorbed,
    Absorption,
    _dense,
    _Probe,
    _scored,
    absorption,
    class_latents,
    parts,
)
from sae_italian.benchmark.material import plainly
from sae_italian.cli import main
from sae_italian.saes import load_sae

ROOT = np.sqrt(0.5)  # p is the first axis, the member's own direction the second; a token is p + c, so A = 1


@pytest.mark.parametrize(
    ("acts", "cosine", "fraction", "full"),
    [
        ([0, np.sqrt(2)], [1, ROOT], 1, True),  # (a) latent 2 = (p + c) / sqrt 2 takes the place of latent 1
        ([1, 1], [1, 0], 0, False),  # (b) latent 1 fires, latent 2 is c alone
        ([0.5, np.sqrt(1.25)], [1, 0.5 / np.sqrt(1.25)], 0.5, False),  # (c) half of it is in latent 2
        ([0, 0], [1, ROOT], 0, False),  # (d) nothing fires
        ([0.5, 0.1], [1, 0.5], 0, False),  # (e) latent 1 holds half, the rest is in no latent
    ],
)
def test_known_answers(acts, cosine, fraction, full):
    found = parts(np.array([acts], float), np.array(cosine, float), np.ones(1), [0])
    assert found[0] == pytest.approx([fraction]) and found[1].tolist() == [full]
    against = parts(np.array([acts], float), np.array(cosine, float), -np.ones(1), [0])
    assert against[0].tolist() == [0] and against[1].tolist() == [False]  # a token that is not along p at all


def test_latents_of_a_class_are_as_many_as_it_splits_into():
    rng = np.random.default_rng(0)
    y = np.arange(1200) % 3 == 0
    half = y & (np.arange(1200) % 2 == 0)
    noise = rng.random((1200, 5)) < 0.3
    against = ~y & (rng.random(1200) < 0.95)  # the largest weight of all, and below 0
    acts = scipy.sparse.csr_array(np.column_stack([noise, half, y & ~half, against / 2]).astype(float))
    latents, found = class_latents(acts, y, np.arange(1200) % 5 != 0)
    assert sorted(latents) == [5, 6] and found == 1


def test_a_class_ends_at_the_first_latent_that_brings_nothing(monkeypatch):
    """SAEBench's `add_feature_splits_to_metrics_df`: what a later one would bring is not looked at."""
    row, told = np.arange(1200), iter((0.5, 0.52, 0.9))
    acts = scipy.sparse.csr_array(np.column_stack([row % 6 == i for i in (0, 2, 4)]).astype(float))
    monkeypatch.setattr("sae_italian.benchmark.absorption.f1", lambda *_: next(told))
    latents, found = class_latents(acts, row % 2 == 0, row % 5 != 0)
    assert len(latents) == 1 and found == 0.5


@pytest.mark.parametrize("rescaled", [False, True])
def test_scored_are_test_words_that_the_probe_gets_right_whatever_the_decoders_length(monkeypatch, rescaled):
    """Half of p is in a latent of the member's own, (c) above, the rows three times as long and a third as active, or, where
    the activations have the rows' lengths in them, as active."""
    row = np.arange(40)
    child, own = row % 2 == 0, np.array([0.5, np.sqrt(1.25)])
    words = Words("", ["form=è"], scipy.sparse.csr_array(child[:, None]), row, row < 20, np.stack([row**0, row], 1))
    probe = _Probe("UPOS=AUX", row % 4 == 0, np.array([1.0, 0.0]), row != 24, 0.9)
    monkeypatch.setattr("sae_italian.benchmark.absorption.class_latents", lambda *_: ([0], 0.8))
    sae = SimpleNamespace(
        W_dec=3 * torch.tensor([[1.0, 0.0], [ROOT / 2**0.5 / own[1], 1 / own[1]]]),
        cfg=SimpleNamespace(rescale_acts_by_decoder_norm=rescaled),
    )
    acts = scipy.sparse.csr_array(np.tile(own if rescaled else own / 3, (40, 1)))
    (found,) = _scored(sae, acts, words, probe, ["form=è"], "ISDT")
    assert found.n_words == 4 and found.fraction == pytest.approx(0.5) and found.child == "è"


def test_the_probes_direction_is_that_of_the_activations_themselves():
    """Both dimensions tell the class, one at a hundred times the scale: it needs a hundredth of the weight."""
    rng, row = np.random.default_rng(0), np.arange(400)
    y = row % 2 == 0
    x = (y[:, None] + 0.3 * rng.normal(size=(400, 2))) * [1, 100]
    probe = _dense(Words("", ["UPOS=AUX"], scipy.sparse.csr_array(y[:, None]), row, row < 300, x), "UPOS=AUX")
    assert probe.f1 > 0.9 and probe.unit[1] == pytest.approx(probe.unit[0] / 100, rel=0.3)


def test_accents_are_folded():
    assert [plainly(word)[:1] for word in ("È", "e", "Ànsia", "zio")] == ["e", "e", "a", "z"]


def test_two_saes_are_told_apart_only_beyond_the_interval():
    def pair(child: str, fraction: float) -> Absorbed:
        return Absorbed("ISDT", f"class of {child}", child, fraction, 0.0, 40, 0.9, [3], 0.8)

    own = {"topk": [0.5, 0.4, 0.6, 0.5, 0.5], "matryoshka": [0.1, 0.1, 0.2, 0.1, 0.1], "twin": [0.5] * 5}
    pairs = {name: [pair(f"form{i}", v) for i, v in enumerate(values)] for name, values in own.items()}
    found = Absorption(pairs, dict.fromkeys(own, 8.0), (3, 21))
    apart, same = (found.differences()[name] for name in ("matryoshka", "twin"))
    assert apart.hi < 0 and same.lo < 0 < same.hi
    assert "twin less topk: +0.000" in found.table() and found.table().count("not distinguishable") == 1
    assert "reads 3 of 21" in found.table() and "equal L0" not in found.table()
    assert "Its L0 is 1.50 times" in Absorption(pairs, {**found.l0, "twin": 12.0}, (3, 21)).table()


def test_each_treebank_has_pairs_of_its_own_and_a_pair_that_time_left_out_is_not_compared():
    def pairs(a: float, b: float) -> list[Absorbed]:
        both = (("ISDT", a), ("ParTUT", b))
        return [Absorbed(bank, "UPOS=AUX", f"form{i}", v, 0.0, 40, 0.9, [3], 0.8) for i in range(6) for bank, v in both]

    found = Absorption(
        {"first": pairs(0.5, 0.1), "second": pairs(0.6, 0.3)[:-1]}, {"first": 8.0, "second": 8.0}, (3, 21)
    )
    assert found.differences()["second"].value == pytest.approx((6 * 0.1 + 5 * 0.2) / 11)
    rows = [row for row in found.table().splitlines() if "form5" in row]
    assert [row.split(" | ")[-2:] for row in rows] == [["0.500", "0.600 |"], ["0.100", "- |"]]


def absorbed(values: np.ndarray) -> Absorption:
    """One SAE's fractions [classes, members]."""
    pairs = [Absorbed("ISDT", f"c{i}", f"m{j}", v, 0.0, 40, 0.9, [3], 0.8) for (i, j), v in np.ndenumerate(values)]
    return Absorption({"sae": pairs}, {"sae": 8.0}, (3, 21))


@pytest.mark.parametrize("shared", ["members", "classes"])
def test_pairs_of_one_member_or_of_one_class_count_once_in_the_interval(shared):
    values = np.random.default_rng(0).uniform(0.4, 0.6, 6)
    often = np.tile(values, (6, 1)) if shared == "members" else np.tile(values, (6, 1)).T
    half = student.ppf(0.975, 5) * np.sqrt(np.var(values, ddof=1) / 6)  # as of six values, not of 36
    expected = pytest.approx((values.mean(), values.mean() - half, values.mean() + half))
    assert absorbed(often).means()["sae"]["fraction"] == expected
    found = absorbed(often)
    unread = found.pairs["sae"][0]._replace(child="x", fraction=float("nan"))  # no word of it is read right
    found.pairs["sae"].append(unread)
    assert found.means()["sae"]["fraction"] == expected
    assert np.isnan(absorbed(often[:4]).means()["sae"]["fraction"].lo), "four classes say nothing of how classes differ"


def test_two_saes_that_differ_by_class_at_random_are_seldom_told_apart():
    """Six classes whose members all differ by what the class' latents are: over members alone, 28 % of such are told apart."""
    rng, told = np.random.default_rng(0), []
    for _ in range(100):
        gap = rng.normal(0, 0.35, (6, 1)) + rng.normal(0, 0.3, (6, 8))
        one, other = absorbed(np.zeros((6, 8))), absorbed(gap)
        lo, hi = Absorption({"a": one.pairs["sae"], "b": other.pairs["sae"]}, {}, (3, 21)).differences()["b"][1:]
        told.append(not lo <= 0 <= hi)
    assert np.mean(told) <= 0.1


@pytest.mark.parametrize(
    ("of", "told"), [("metadata.hook_name_out", "toy is a transcoder"), ("normalize_activations", "another direction")]
)
def test_what_reads_and_writes_on_different_scales_is_refused(trained_sae, mini, of, told):
    sae = load_sae(trained_sae)
    value = {"metadata.hook_name_out": "blocks.1.hook_mlp_out", "normalize_activations": "layer_norm"}[of]
    *path, name = of.split(".")
    setattr(reduce(getattr, path, sae.cfg), name, value)
    with pytest.raises(UsageError, match=told):
        absorption({"toy": sae}, mini, ["micro-italiano"])


def test_saes_of_several_hooks_are_refused(trained_sae, mini):
    one, other = load_sae(trained_sae), load_sae(trained_sae)
    other.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    with pytest.raises(UsageError, match="these compare at one place only"):  # all were read at the last one's hook
        absorption({"one": one, "other": other}, mini, ["micro-italiano"])


def test_the_command_on_the_mini_model(trained_sae, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sae_italian.benchmark.absorption.PARENTS", ("UPOS=AUX",))
    run = ["absorption", str(trained_sae), "--out", str(tmp_path / "a"), "--json"]
    assert main(run) == 0
    told = json.loads(capsys.readouterr().out)
    (pairs,) = told["pairs"].values()
    assert ("UPOS=AUX", "è") in {(p["parent"], p["child"]) for p in pairs}
    assert all(0 <= p["fraction"] <= 1 and p["n_words"] > 0 and p["dense_f1"] > 0.6 for p in pairs)
    assert told["letters"][0] < 15, "the mini model does not know letters, and says how many"
    assert (tmp_path / "a/absorption.md").is_file()
    assert main([*run, "--ud", "x"]) == 2 and "holds another absorption run (ud was None" in capsys.readouterr().err

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sae_italian.cli.benchmark.absorbed", stop)  # the same command goes on, as it says
    assert main(run) == 130 and "the same command continues" in capsys.readouterr().err
    assert main(["absorption"]) == 2 and "no SAE" in capsys.readouterr().err
