"""Graphs of many prompts, and what a graph names against what is known: known answers, the cases, the command."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.normalizers import Prepend, Replace, Sequence
from transformers import PreTrainedTokenizerFast

from sae_italian.analysis import treebank
from sae_italian.analysis.latent import token_of, written_directions
from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.statistics import NOTHING
from sae_italian.circuits.check import changes, foretold
from sae_italian.circuits.edges import Prompt, attribute
from sae_italian.circuits.graph import Graph, joined, nodes_of
from sae_italian.circuits.study import (
    Case,
    Study,
    _made,
    _numbers,
    _words,
    carriers,
    cases_of,
    found_among,
    patching_effects,
)
from sae_italian.cli import main
from sae_italian.models.activations import read_activations, replaced
from tests.circuits.test_graph import mistral, random_transcoder  # noqa: F401
from tests.circuits.test_show import saved  # noqa: F401


def test_found_among_by_hand():
    """Order: true, false, true, false; at 2: one of two, one of two; average precision (1 + 2/3) / 2."""
    found = found_among(np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, False]), 2)
    assert (found["precision"], found["recall"], found["share"], found["over_chance"]) == (0.5, 0.5, 0.5, 0)
    assert found["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    for share in (0, 1):  # nothing to find, or nothing else
        assert found_among(np.ones(3), np.full(3, share, dtype=bool), 2) == {"share": share}


@pytest.mark.parametrize("feature, value, other", [("number", "Plur", "Sing"), ("gender", "Fem", "Masc")])
def test_what_carries_a_feature_is_what_fires_on_words_of_one_value(mini, monkeypatch, feature, value, other):
    """Latent 0 fires on tokens that stand in words of the value alone, 1 on everything, 2 on one of those tokens, 3 on nothing."""
    monkeypatch.setattr(treebank, "read_activations", lambda _, tokens, name: tokens[..., None])
    bank, names = treebank.micro_treebank(80, 7), [f"{feature.capitalize()}={each}" for each in (value, other)]
    words = treebank.read_words(mini, "", bank, names, context_size=512)
    values, often = {}, Counter()
    for token, (is_value, is_other) in zip(words.x[:, 0].tolist(), words.labels.toarray(), strict=True):
        if is_value or is_other:
            values.setdefault(token, set()).add(value if is_value else other)
            often[token] += 1
    some = sorted((token for token, found in values.items() if found == {value}), key=lambda token: -often[token])
    assert len(some) > 10 and often[some[0]] > 5

    def fire(_, x):
        rows = torch.isin(x[:, 0], torch.tensor(some)), x[:, 0] >= 0, x[:, 0] == some[0], x[:, 0] < 0
        return torch.stack(rows, dim=1).float()

    monkeypatch.setattr(treebank, "codes", fire)
    sae = random_transcoder(2, d=1, d_sae=4, dtype="float32")
    assert carriers(mini, {2: sae}, feature, documents=80)[2].tolist() == [True, False, False, False]


def test_patching_effects_are_the_live_models_own(mistral):  # noqa: F811
    """Against a finite difference: a small step of the latent towards the counterfactual, everything live."""
    saes, pair = [random_transcoder(layer) for layer in range(3)], (5, 9)
    graph = attribute(mistral, saes, "ciao bella", logits=[5], against=9)
    assert np.allclose(graph.weights.sum(axis=1), graph.own, atol=1e-9) and graph.against == 9
    tokens = mistral.tokenizer("ciao bella").input_ids
    logits = mistral(tokens).logits[0, -1]
    assert graph.own[-1] == pytest.approx(float((logits[5] - logits[9]).detach()), abs=1e-4)
    prompt = Prompt(mistral, saes, "ciao bella")
    effects = patching_effects(prompt, graph, "ciao belle", pair)
    nodes = [graph.nodes[i] for i in graph.latents]
    assert (effects[[node.position < 10 for node in nodes]] == 0).all()  # the prompts differ at the end
    for i in np.argsort(-np.abs(effects))[:4].tolist():
        node, sae, step = nodes[i], saes[nodes[i].layer], 1e-4
        other = read_activations(mistral, mistral.tokenizer("ciao belle").input_ids, f"blocks.{node.layer}.mlp.hook_in")
        change = float(sae.encode(other)[0, node.position, node.index]) - node.value
        write = step * change * written_directions(sae, [node.index])[0]

        def moved(x, node=node, write=write):
            return x.index_add(1, torch.tensor([node.position]), write[None, None])

        with torch.no_grad(), replaced(mistral, f"blocks.{node.layer}.hook_mlp_out", moved):
            after = mistral(tokens).logits[0, -1].double()
        real = float(after[5] - after[9] - (logits[5] - logits[9]).double()) / step
        assert effects[i] == pytest.approx(real, rel=0.05, abs=1e-3)


def test_intervals_are_over_prompts_and_gains_within_one():
    rows = [{"prompt": str(i), "numbers": [{"slope": 1.0 + 0.01 * i}, {"slope": 0.5 + 0.01 * i}]} for i in range(10)]
    found = Study("x", rows)
    mine, gain = (found.estimates()["slope"][which] for which in ("these", "gain"))
    assert mine.value == pytest.approx(1.045) and mine.lo < mine.value < mine.hi
    assert gain.value == pytest.approx(0.5) == gain.lo == gain.hi
    assert "| slope |" in found.text() and "recall" not in found.text() and found.svg().startswith("<?xml")


@pytest.mark.parametrize("case", ["agreement", "attractor", "participle", "ioi"])
def test_cases_suit_the_embedded_model(mini, case):
    found = cases_of(case, mini, 20)
    assert len(found) == 20 == len({one.prompt for one in found})  # no prompt twice
    for one in found:
        lengths = {len(mini.tokenizer(text).input_ids) for text in one[:2]}
        assert len(lengths) == 1 and one.prompt != one.counterfactual and one.right != one.wrong
    assert found != cases_of(case, mini, 20, seed=1) and found == cases_of(case, mini, 20)


def test_the_verb_of_any_other_model_agrees_with_the_subject(mini):
    other = SimpleNamespace(tokenizer=mini.tokenizer)
    answers = [mini.tokenizer(text, add_special_tokens=False).input_ids[0] for text in (" è", " sono")]
    for one in cases_of("agreement", other, 20):
        plural = one.prompt.startswith(("I ", "Le "))
        assert (one.wrong, one.right) == tuple(answers[:: 1 if plural else -1])


def test_a_tokenizer_that_begins_every_text_with_a_space_of_its_own_reads_whole_answers():
    words = {word for texts in _made("participle") for text in texts for word in text.split()} | {"e"}
    tokenizer = Tokenizer(Unigram([("<unk>", 0.0), ("▁", -1.0), *((f"▁{word}", -1.0) for word in words)], unk_id=0))
    tokenizer.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    found = cases_of("participle", SimpleNamespace(tokenizer=fast), 4)
    answers = {str(fast.convert_ids_to_tokens(one.right)) for one in found}
    assert answers <= {f"▁{word}" for pair in _words()["participles"] for word in pair}
    assert fast.convert_ids_to_tokens(token_of(fast, " andata")) == "▁andata"


def test_no_latent_before_the_prompts_differ_is_true():
    """Both latents carry number, but «gatti» is read at position 1: what fires on «i» cannot know it."""
    nodes = joined([nodes_of("latent", 0, [0, 1], [0, 1], 1.0), nodes_of("logit", 1, 1, 5, 1.0)])
    graph = Graph("i gatti", "m", ("i", "gatti"), 1, nodes, np.arange(3), np.eye(3), np.ones(3), 2)
    prompt = SimpleNamespace(model=SimpleNamespace(tokenizer=lambda text: SimpleNamespace(input_ids=text.split())))
    nothing = [SimpleNamespace(**dict.fromkeys(("direct", "paths", "slope"), NOTHING))]
    found = _numbers(Case("i gatti", "i cani", 5, None), prompt, graph, nothing, {0: [True, True]})
    assert found["share"] == 0.5


FEMININE, MASCULINE = ("la", "una", "questa", "quella"), ("il", "un", "questo", "quel")


def test_gender_goes_from_the_article_to_the_ending(mini):
    """Planted from half of the prompts: at each layer a latent of feminine and one of masculine determiners.

    On the other half the graph must say that the determiner's own latent carries the noun's ending, and taking it away
    in the real model must cost the right noun what the graph foretells.
    """
    last = [(one, one.prompt.split()[-1]) for one in cases_of("participle", mini, 60)]
    cases = [(one, word in FEMININE) for one, word in last if word in FEMININE + MASCULINE]
    half, saes = len(cases) // 2, []
    for layer in range(4):
        reads, writes = [], []
        for one, feminine in cases[:half]:
            tokens = mini.tokenizer([one.prompt, one.counterfactual], return_tensors="pt").input_ids
            tokens = tokens if feminine else tokens.flip(0)  # the feminine one of the pair, then the masculine one
            reads.append(read_activations(mini, tokens, f"blocks.{layer}.mlp.hook_in")[:, -1])
            writes.append(read_activations(mini, tokens, f"blocks.{layer}.hook_mlp_out")[:, -1])
        (f, m), (wrote_f, wrote_m) = (torch.stack(each).mean(0) for each in (reads, writes))
        sae, way = random_transcoder(layer, d=128, d_sae=2, dtype="float32"), (f - m) / (f - m).square().sum()
        sae.W_enc.data = torch.stack([way, -way], dim=1)
        sae.b_enc.data = torch.stack([-(way @ (f + m) / 2), way @ (f + m) / 2])
        sae.W_dec.data = torch.stack([wrote_f - wrote_m, wrote_m - wrote_f])  # each is active at 1/2 on its mean
        sae.b_dec.data = (wrote_f + wrote_m) / 2
        saes.append(sae)
    told, real = [], []
    for one, feminine in cases[half::2]:
        graph = attribute(mini, saes, one.prompt, logits=[one.right], against=one.wrong)
        tokens = mini.tokenizer(one.prompt, return_tensors="pt").input_ids
        latents = [(node.kind, node.position, node.index) for node in graph.nodes]
        own = np.array([i for i, each in enumerate(latents) if each == ("latent", tokens.shape[1] - 1, 1 - feminine)])
        assert len(own) == 4  # one a layer, and none of the other gender
        told.append(foretold(graph)[1][own].sum())
        real.append(changes(Prompt(mini, saes, one.prompt), graph, own).sum())
    assert max(told) < -5 and max(real) < -5 and np.corrcoef(told, real)[0, 1] > 0.8


def test_a_file_of_prompts_and_what_is_no_case(mini, tmp_path):
    file = tmp_path / "prompts.tsv"
    file.write_text("La ragazza\tche\nIl ragazzo\tche\te\n", encoding="utf-8")
    found = cases_of(str(file), mini, 9)
    assert [one.prompt for one in found] == ["La ragazza", "Il ragazzo"] and found[0].wrong is None and found[1].wrong
    file.write_bytes("\ufeffLa ragazza\tche\r\n".encode())  # as Windows' Notepad saves it
    assert [one.prompt for one in cases_of(str(file), mini, 9)] == ["La ragazza"]
    for text in ("La ragazza\n", "\n"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match="a tab"):
            cases_of(str(file), mini, 1)
    file.write_bytes("La città\tche".encode("latin-1"))
    with pytest.raises(DataError, match="prompts.tsv cannot be read .* Save it as UTF-8"):
        cases_of(str(file), mini, 1)
    with pytest.raises(UsageError, match="agreement, attractor, participle, ioi"):
        cases_of("nominativo", mini, 1)


def test_the_command_studies_a_case(saved, mini, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "study"
    told = [
        "graph",
        "sae-italian-mini",
        str(saved),
        "agreement",
        "study=2",
        "max_nodes=60",
        "--out",
        str(out),
        "--json",
    ]
    assert main(told) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == 2 and (out / "graph.study.svg").exists()
    assert 0 <= found["estimates"]["replacement"]["these"]["value"] <= 1
    assert {"patching", "slope", "direct"} <= set(found["rows"][0]["numbers"][0])
    for row, one in zip(found["rows"], cases_of("agreement", mini, 2), strict=True):
        logits = mini(mini.tokenizer(one.prompt, return_tensors="pt").input_ids).logits[0, -1]
        assert row["numbers"][0]["right"] == row["numbers"][1]["right"] == float(logits[one.right] > logits[one.wrong])
