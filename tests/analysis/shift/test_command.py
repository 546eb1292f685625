"""`sae-italian shift`: the four kinds, what lands in the folder, and what is refused in one line."""

import json

import pytest

from sae_italian.analysis.shift import genres as genres_of
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


def test_a_genre_is_a_files_name_with_all_its_dots(tmp_path):
    """`it.leggi.jsonl` and `it.romanzi.jsonl` were both `it`, and the last of them stood for all."""
    for name in ("it.leggi.jsonl", "it.romanzi.JSONL", "it.web.jsonl.gz", "note.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "d.v2").mkdir()
    (tmp_path / "d.v2" / "a.txt").write_text("testo")
    assert [*genres_of(str(tmp_path))] == ["d.v2", "it.leggi", "it.romanzi", "it.web"]


def test_a_genre_is_a_subfolder_a_column_or_a_bucket_with_its_own_text_column(folder, genres, tmp_path, capsys):
    """Three ways to the same two texts; of a folder with subfolders, the files of one are one genre."""
    rows = {name: (genres / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("leggi", "romanzi")}
    for name, lines in rows.items():
        (tmp_path / "folders" / name).mkdir(parents=True)
        for part in (0, 1):
            file = tmp_path / "folders" / name / f"{part}.txt"
            file.write_text("\n\n".join(json.loads(line)["text"] for line in lines[part::2]), encoding="utf-8")
    marked = [{**json.loads(line), "source": name} for name, lines in rows.items() for line in lines]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, marked)), encoding="utf-8")
    other = [line.replace('"text"', '"testo"') for line in rows["romanzi"]]
    (tmp_path / "other.jsonl").write_text("\n".join(other), encoding="utf-8")
    buckets = ["--buckets", f"leggi={genres / 'leggi.jsonl'}", f"romanzi={tmp_path / 'other.jsonl'}"]
    found = {}
    for name, options in {
        "files": ["--corpus", genres],
        "folders": ["--corpus", tmp_path / "folders"],
        "column": ["--corpus", tmp_path / "one.jsonl"],
        "buckets": ["text_column=romanzi:testo", *buckets],
    }.items():
        out = ["--by", "genre", "--split", "all", "--tokens", 2000, "--json", "--out", tmp_path / "out"]
        assert main([str(part) for part in ("shift", folder, *options, *out)]) == 0
        found[name] = json.loads(capsys.readouterr().out)["buckets"]
    counts = {name: [(b["name"], b["n_documents"]) for b in buckets] for name, buckets in found.items()}
    assert counts == dict.fromkeys(found, [("leggi", 11), ("romanzi", 11)])  # the twelfth fills no window
    for way in ("column", "buckets"):
        assert [b["ce_loss"]["value"] for b in found[way]] == [b["ce_loss"]["value"] for b in found["files"]]


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
        (["--by", "language"], "--by language --buckets NAME=CORPUS is needed, 2 or more; 0 given"),
        (["--by", "model"], "--by model --buckets NAME=MODEL is needed"),
        (["packed=true", "--by", "genre"], "packed is for --by context, not for --by genre"),
        (["--by", "context", "--buckets", "a=b"], "--buckets is for --by genre, language, model, not for --by context"),
        (["--by", "context", "--edges", "0,x"], "--edges is '0,x'"),
        (["context_size=64", "--by", "context"], "context_size is for --by genre, language, model"),
        (["--by", "genre", "--corpus", "ONE"], "has no genres: a folder with a subfolder or table for each"),
        (["--by", "genre", "--corpus", "TXT"], "are taken for documents, not for genres"),
        (
            ["text_column=a:testo,c:testo", "--by", "language", "--buckets", "a=x.jsonl", "b=y.jsonl"],
            "each NAME of a, b",
        ),
        (["--by", "genre", "--buckets", "a"], "'a': NAME=VALUE was expected"),
        (["--by", "genre", "--buckets", "a=x", "a=y"], "each name once"),
        (["--by", "genre", "--buckets", "a=x.jsonl", "b=y.jsonl"], "is neither"),
        (["--by", "model", "--buckets", "a=no-such-model"], "no-such-model"),
    ],
)
def test_bad_input_is_one_line(options, message, folder, genres, tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("Una riga.\n\nUn'altra.\n")
    corpora = {"ONE": str(genres / "leggi.jsonl"), "TXT": str(tmp_path)}
    arguments = [corpora.get(option, option) for option in options]
    assert main(["shift", folder, *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
