"""`sae-italian shift`: the four kinds, what lands in the folder, and what is refused in one line."""

import json

import pytest

from sae_italian.cli import main
from tests.conftest import SENTENCES


@pytest.fixture(scope="module")
def genres(tmp_path_factory):
    folder = tmp_path_factory.mktemp("genres")
    for name, sentences in (("leggi", SENTENCES[:2]), ("romanzi", SENTENCES[2:])):
        rows = [json.dumps({"text": f"Numero {i}. " + " ".join(sentences)}) for i in range(12)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(topk_sae, tmp_path_factory):
    out = tmp_path_factory.mktemp("sae") / "topk"
    topk_sae.save_model(out)
    return str(out)


def test_genres_are_the_files_of_a_folder(folder, genres, tmp_path, capsys):
    arguments = ["shift", folder, "--by", "genre", "--corpus", str(genres), "--split", "all", "--tokens", "300"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "\n**leggi**  " in text and "\nromanzi  " in text and "L0 is k by construction" in text
    result = json.loads((tmp_path / "out" / "shift.json").read_text())
    assert [bucket["name"] for bucket in result["buckets"]] == ["leggi", "romanzi"]
    assert set(result["buckets"][1]["change"]["delta_lm_loss"]) == {"value", "lo", "hi"}
    assert (tmp_path / "out" / "shift.svg").read_text().rstrip().endswith("</svg>")
    assert "![shift](shift.svg)" in (tmp_path / "out" / "shift.md").read_text()


def test_context_languages_and_models(folder, genres, tmp_path, capsys):
    common = ["--tokens", "300", "--split", "all", "--corpus", str(genres), "--json", "--out", str(tmp_path / "out")]
    assert main(["shift", folder, "packed=true", "--by", "context", "--edges", "0,32,64", *common]) == 0
    assert [b["name"] for b in json.loads(capsys.readouterr().out)["buckets"]] == ["0-32", "32-64"]
    pairs = [f"it={genres / 'leggi.jsonl'}", f"en={genres / 'romanzi.jsonl'}"]
    assert main(["shift", folder, "--by", "language", "--buckets", *pairs, *common]) == 0
    assert json.loads(capsys.readouterr().out)["reference"] == "it"
    assert main(["shift", folder, "--by", "model", "--buckets", "same=sae-italian-mini", *common]) == 0
    (_, same) = json.loads(capsys.readouterr().out)["buckets"]
    assert same["name"] == "same" and same["change"]["explained_variance"]["value"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--by", "language"], "--by language needs --buckets"),
        (["--by", "model"], "--by model needs --buckets"),
        (["packed=true", "--by", "genre"], "packed is for --by context, not for --by genre"),
        (["--by", "context", "--buckets", "a=b"], "--buckets is for --by genre, language or model"),
        (["--by", "context", "--edges", "0,x"], "--edges is '0,x'"),
        (["context_size=64", "--by", "context"], "by context give --edges"),
        (["--by", "genre"], "is no folder of files"),
        (["--by", "genre", "--buckets", "a"], "'a': NAME=VALUE was expected"),
        (["--by", "genre", "--buckets", "a=x", "a=y"], "each name once"),
        (["--by", "genre", "--buckets", "a=x.jsonl", "b=y.jsonl"], "is neither"),
        (["--by", "model", "--buckets", "a=no-such-model"], "no-such-model"),
    ],
)
def test_bad_input_is_one_line(options, message, folder, tmp_path, capsys):
    assert main(["shift", folder, *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
