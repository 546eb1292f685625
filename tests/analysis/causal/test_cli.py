"""The commands as a person types them: what they print and write, and what they refuse in one line."""

import copy
import json
import re

import pytest

from sae_italian.cli import main

PROMPT = "Quando Marta e Luca sono andati al mercato, Marta ha dato un libro a"


def run(capsys, *arguments) -> tuple[int, str, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def folder(topk_sae, tmp_path_factory):
    path = tmp_path_factory.mktemp("saes") / "one"
    topk_sae.save_model(path)
    return path


@pytest.fixture(scope="module")
def later(topk_sae, tmp_path_factory):
    sae = copy.deepcopy(topk_sae)
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    path = tmp_path_factory.mktemp("saes") / "later"
    sae.save_model(path)
    return path


def test_ioi_says_whether_the_model_can_and_what_carries_the_name(capsys, folder, tmp_path):
    asked = (
        "ioi",
        "mini",
        "--sae",
        folder,
        "--n-pairs",
        2,
        "--check",
        30,
        "--thresholds",
        3,
        "--out",
        tmp_path / "ioi",
    )
    code, out, _ = run(capsys, *asked)
    assert code == 0 and "of 30 right" in out and "ABBA" in out and "\none " in out
    written = json.loads((tmp_path / "ioi" / "ioi.json").read_text())
    assert written["skill"]["accuracy"]["value"] > 0.9 and len(written["patching"]["curves"][0]["points"]) == 4
    assert (tmp_path / "ioi" / "ioi.svg").read_text().startswith("<?xml")
    code, out, _ = run(capsys, "ioi", "mini", "--check", 30, "--json")
    assert code == 0 and "patching" not in json.loads(out)


def test_ioi_refuses_what_cannot_be_measured(capsys, folder, later):
    cases = [
        (("ioi", "mini", "--language", "en", "--sae", folder, "--check", 30), "does not do the task|needs 3 names"),
        (
            ("ioi", "mini", "--sae", folder, "--sae", later, "--check", 30, "--n-pairs", 2),
            "one writes at .* later writes at",
        ),
        (("ioi", "mini", "name_tokens=7"), "names by number of tokens"),
        (("ioi", "mini", "name_tokens=many"), "name_tokens is 'many'; it should be a valid integer"),
        (("ioi", "mini", "--n-pairs", 0), "--n-pairs is 0"),
        (("steer", folder, PROMPT, "--latent", 999), "latents 0 to 299"),
        (("steer", folder, " ", "--latent", 1, "--ablate"), "prompt is empty"),
        (("ablate", folder, PROMPT, "--latent", 1), "`ablate` is now `steer --ablate`"),
        (("ioi", "mini", "--pairs", 2), "--pairs is now --n-pairs"),
        (("tree", folder, "--latent", 1), "at least two layers"),
        (("agreement", "mini", "--pairs-file", "none.tsv"), "is not a file"),
        (("tree", folder, later, "branches=x", "--latent", 1), "branches is 'x'; it should be a valid integer"),
        (("ioi", "mini", "name_token=2"), "no setting here.*Did you mean 'name_tokens'"),
        (("ioi", "mini", "--sae", folder, "--sae", folder, "--check", 30), "given twice"),
    ]
    for arguments, said in cases:
        code, out, error = run(capsys, *arguments)
        assert code == 2 and out == "" and error.count("\n") == 1, arguments
        assert re.search(said, error), error


def test_steer_and_ablate_print_a_table(capsys, folder):
    code, out, _ = run(capsys, "steer", folder, PROMPT, "--latent", 7, "--strengths", 2, 4, "--new-tokens", 4)
    assert code == 0 and len(out.strip().splitlines()) == 7 and "nats per token" in out
    code, out, _ = run(capsys, "steer", folder, PROMPT, "--latent", 7, "--ablate", "--json")
    found = json.loads(out)
    assert code == 0 and found["latent"] == 7 and len(found["tokens"]) == len(found["activations"])


def test_agreement_prints_and_writes_every_kind(capsys, folder, tmp_path):
    patching = ("--sae", folder, "--n-pairs", 2, "--thresholds", 2)
    code, out, _ = run(capsys, "agreement", "mini", "--check", 50, "--out", tmp_path, *patching)
    assert code == 0 and "\nsubject-verb, attractor  " in out and "\none " in out
    assert (tmp_path / "number.svg").is_file()
    assert json.loads((tmp_path / "agreement.json").read_text())["n"] == 50 and (tmp_path / "agreement.svg").is_file()


def test_tree_prints_and_writes_the_tree(capsys, folder, later, tmp_path, topk_sae, mini):
    from sae_italian.models.activations import read_activations

    tokens = mini.tokenizer(PROMPT, return_tensors="pt").input_ids
    latent = int(topk_sae.encode(read_activations(mini, tokens, "blocks.3.hook_resid_post")[0, 1:]).sum(0).argmax())
    options = ("contexts=2", "--latent", latent, "--tokens", 2000, "--context-size", 16, "--out", tmp_path)
    code, out, error = run(capsys, "tree", folder, later, *options)
    assert code == 0, error
    assert out.startswith(f"later {latent}") and "\n  one " in out
    assert json.loads((tmp_path / "tree.json").read_text())["latent"] == latent and (tmp_path / "tree.svg").is_file()
