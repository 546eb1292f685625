"""Transcoders in the place of all MLPs at once: known answers, and what the doctor says of a set."""

import json
from importlib import import_module

import pytest
import torch

from sae_italian.circuits.check import _counted, _losses, with_transcoders
from sae_italian.cli import main
from sae_italian.evaluation.diagnosis import blocks_of
from sae_italian.models.activations import read_activations
from tests.circuits.test_graph import mistral, random_transcoder, toy  # noqa: F401
from tests.circuits.test_show import saved  # noqa: F401


def test_transcoders_that_are_their_mlps_change_nothing(mistral):  # noqa: F811
    saes, tokens = toy(mistral), mistral.tokenizer("ciao bella").input_ids
    silent, plain = tokens == 0, mistral(tokens).logits
    with torch.no_grad(), with_transcoders(mistral, dict(enumerate(saes)), silent):
        assert torch.allclose(mistral(tokens).logits, plain, atol=1e-5)
    with torch.no_grad(), with_transcoders(mistral, dict.fromkeys(range(3)), silent):
        assert not torch.allclose(mistral(tokens).logits, plain, atol=1e-2)
        written = read_activations(mistral, tokens, "blocks.1.hook_mlp_out")
        assert (written[0, 1:] == 0).all() and (written[0, 0] != 0).any()  # the MLP stays at the special token
    assert torch.equal(mistral(tokens).logits, plain)
    loss, (counted,) = _losses(mistral, tokens, silent, {}), _counted(silent).sum(1).tolist()
    log_p = plain[0, 1:-1].log_softmax(-1).gather(1, tokens[0, 2:, None])  # what follows the special token is no loss
    assert counted == tokens.shape[1] - 2 and loss.tolist() == pytest.approx((-log_p[:, 0]).tolist(), rel=1e-5)


def test_each_reads_what_the_earlier_ones_wrote(mistral):  # noqa: F811
    """By hand: the second layer's transcoder reads the stream that the first one's has changed."""
    saes, tokens = [random_transcoder(0), random_transcoder(1)], mistral.tokenizer("ciao").input_ids
    silent = tokens == 0
    with torch.no_grad(), with_transcoders(mistral, {0: saes[0]}, silent):
        read = read_activations(mistral, tokens, "blocks.1.mlp.hook_in")
    with torch.no_grad(), with_transcoders(mistral, dict(enumerate(saes)), silent):
        written = read_activations(mistral, tokens, "blocks.1.hook_mlp_out")
    assert torch.allclose(written[0, 1:], saes[1](read)[0, 1:], atol=1e-9)


def test_the_doctor_looks_at_a_set(saved, capsys, monkeypatch):  # noqa: F811
    told = ["saes", "doctor", str(saved), "--tokens", "1024", "--corpus", "micro-italiano", "--json"]
    assert main(told) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3]
    own, zero, recovered = found["ce"]["value"], found["ce_zero"]["value"], found["recovered"]["value"]
    assert own < 1.5 < zero  # the embedded model knows the text, and needs its MLPs
    assert recovered == pytest.approx((zero - found["ce_replaced"]["value"]) / (zero - own))
    assert found["recovered"]["lo"] < recovered < found["recovered"]["hi"] < 0.9  # the transcoders are random

    def of_one_document(*given):
        return [block._replace(doc=0 * block.doc) for block in blocks_of(*given)]

    monkeypatch.setattr(import_module("sae_italian.circuits.check"), "blocks_of", of_one_document)
    assert main(told) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["ce"] == {"value": pytest.approx(own), "lo": None, "hi": None}, "many windows, and one document"
    assert main(told[:-1]) == 0
    assert capsys.readouterr().out.endswith(f"\n\nNext: sae-italian graph MODEL {saved} PROMPT --out FOLDER\n")
