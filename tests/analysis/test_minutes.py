"""Every analysis takes `minutes=N`: it ends with what it has, and its result and its folder say so."""

import copy
import json
from contextlib import nullcontext

import pytest

from sae_italian.analysis import treebank as treebank_module
from sae_italian.cli import main

PROMPT = "La ragazza vede il"


@pytest.fixture(scope="module")
def folders(topk_sae, tmp_path_factory):
    later = copy.deepcopy(topk_sae)
    later.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    found = {"SAE": tmp_path_factory.mktemp("saes") / "one", "LATER": tmp_path_factory.mktemp("saes") / "later"}
    topk_sae.save_model(found["SAE"])
    later.save_model(found["LATER"])
    return {name: str(path) for name, path in found.items()}


ANALYSES = {
    "shift": "shift SAE --by language --buckets it=TEXT en=micro-italiano --tokens 5000 --split all --out OUT",
    "language": "language SAE --ud micro-italiano --out OUT",
    "languages": "language SAE --languages it=TEXT en=micro-italiano --tokens 5000 --out OUT",
    "geometry": "geometry SAE LATER --out OUT",
    "ioi": "ioi mini --check 100 --sae SAE --n-pairs 4 --thresholds 3 --anyway --out OUT",
    "agreement": "agreement mini --check 100 --out OUT",
    "steer": "steer SAE PROMPT --latent 3",
    "evaluate": "evaluate SAE --corpus micro-italiano --tokens 20000",
    "tree": "tree SAE LATER --latent 3 --tokens 1000 --corpus TEXT --out OUT",
}


@pytest.mark.parametrize("analysis", ANALYSES)
def test_it_ends_with_what_it_has_and_says_so(analysis, folders, jsonl, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(treebank_module, "MICRO_DOCUMENTS", 40)
    places = folders | {"TEXT": str(jsonl), "OUT": str(tmp_path / "out"), "PROMPT": PROMPT}
    words = ANALYSES[analysis]
    for name, place in places.items():
        words = words.replace(f"={name} ", f"={place} ")
    given = [places.get(word, word) for word in words.split()]
    if analysis == "tree":
        import torch

        from sae_italian.saes import load_sae

        sae = load_sae(folders["LATER"])
        given[given.index("--latent") + 1] = str(int(torch.argmax(sae.W_enc.norm(dim=0))))
    assert main([*given, "minutes=0.00001", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["cut_short"] and all("stopped by the time bound at" in what for what in value["cut_short"])
    if "OUT" in ANALYSES[analysis]:
        files = (tmp_path / "out").glob("*.json")
        assert any(json.loads(file.read_text()).get("cut_short") for file in files)


@pytest.mark.parametrize(
    "command", ["shift", "language", "geometry", "ioi", "agreement", "steer", "tree", "graph", "reproduce", "evaluate"]
)
def test_the_help_says_it(command, capsys):
    main([command, "--help"])
    assert "minutes=N" in capsys.readouterr().out


@pytest.mark.parametrize("words, minutes", [([], 8.0), (["minutes=3"], 3.0), (["minutes=inf"], float("inf"))])
def test_patching_is_bounded_by_itself_where_nothing_is_said(words, minutes, monkeypatch):
    asked = []

    def bound(given):
        asked.append(given)
        return nullcontext([])

    monkeypatch.setattr("sae_italian.base.pace.time_bound", bound)
    assert main(["agreement", "mini", "--check", "2", *words]) == 0
    assert asked == [minutes]


def test_a_bound_must_be_a_number_above_0_and_another_word_is_refused(folders, capsys):
    assert main(["agreement", "mini", "minutes=0"]) == 2
    assert "minutes is 0; a number above 0 was expected" in capsys.readouterr().err
    assert main(["agreement", "mini", "minuti=3"]) == 2
    assert "'minuti=3' is too much; no further word is taken but minutes=N" in capsys.readouterr().err
    assert main(["steer", folders["SAE"], PROMPT, "minutes=soon", "--latent", "3"]) == 2
    assert "minutes is 'soon'" in capsys.readouterr().err
