"""`sae-italian corpora ...`: what is printed, refused and written."""

import json

import pytest

from sae_italian.corpora import catalogue
from tests.test_cli import run


def test_list_and_show(capsys):
    code, out, _ = run(capsys, "corpora", "list")
    assert code == 0 and all(name in out for name in catalogue.catalogue()) and "micro-italiano" in out
    code, out, _ = run(capsys, "corpora", "show", "wikipedia-it")
    assert code == 0 and "CC-BY-SA-3.0" in out and "20231101.it/train-*.parquet" in out and "trap" in out
    code, out, err = run(capsys, "corpora", "show", "wikipedia-itt")
    assert code == 2 and "Did you mean 'wikipedia-it'" in err and err.count("\n") == 1


def test_the_catalogue_is_complete():
    for entry in catalogue.catalogue().values():
        assert (
            all(entry[key] for key in ("licence", "routes", "text_columns", "traps")) and entry["hub"].count("/") == 1
        )
        assert set(entry) == set(catalogue.ENTRY), "a key that nobody reads"
        for route in entry["routes"].values():
            assert route["files"] and set(route) == set(catalogue.ROUTE)
    gated = {entry["name"] for entry in catalogue.catalogue().values() if entry["gated"]}
    assert gated == {"culturax-it", "oscar-it"}


def test_show_prints_documents_and_refuses_what_is_broken(capsys, jsonl, tmp_path):
    code, out, _ = run(capsys, "corpora", "show", jsonl, "split=heldout", "--documents", 2)
    assert code == 0 and out.count("· prova]") == 2
    (tmp_path / "a.jsonl").write_text('{"text": "Ciao."}\n{"text":\n{"text": "Addio."}\n')
    code, _, err = run(capsys, "corpora", "show", tmp_path / "a.jsonl")
    assert code == 2 and "line 2: not JSON" in err and err.count("\n") == 1
    code, out, _ = run(capsys, "corpora", "show", tmp_path / "a.jsonl", "on_broken=skip")
    assert code == 0 and "Addio." in out
    (tmp_path / "b.jsonl").write_text("")
    code, _, err = run(capsys, "corpora", "show", tmp_path / "b.jsonl")
    assert code == 2 and "has no document with text in it (it is empty). Name another." in err and err.count("\n") == 1
    for word, message in (
        ("splitt=all", "Did you mean 'split'"),
        ("seed=due", "seed is 'due'; it should be a valid integer"),
        ("x", "key=value"),
    ):
        code, _, err = run(capsys, "corpora", "show", jsonl, word)
        assert code == 2 and message in err


def test_old_spellings_are_answered_with_the_new_ones(capsys, jsonl):
    code, _, err = run(capsys, "corpora", "preview", jsonl, "-n", 2)
    assert code == 2 and "corpora show" in err
    code, _, err = run(capsys, "corpora", "stats", jsonl, "--split", "heldout")
    assert code == 2 and "split=" in err


def test_stats_and_the_picture(capsys, mini, jsonl, tmp_path):
    picture = tmp_path / "lunghezze.svg"
    arguments = ("corpora", "stats", jsonl, "--model", "sae-italian-mini", "--documents", 100, "--out", picture)
    code, out, _ = run(capsys, *arguments, "--json")
    stats = json.loads(out)
    assert code == 0 and stats["documents"] == 100 and stats["italian_share"] == 1.0
    assert stats["fertility"] == pytest.approx(stats["tokens"] / stats["words"]) and stats["fertility"] > 1
    assert sum(bin_["documents"] for bin_ in stats["histogram"]) == 100
    assert "<svg" in picture.read_text() and "100 documents" in picture.read_text()
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "a word (sae-italian-mini)" in out and "█" in out and "kept" in out
    before = jsonl.read_bytes()
    code, _, err = run(capsys, "corpora", "stats", jsonl, "--out", jsonl)  # the corpus itself is no place for a picture
    assert code == 2 and 'must have extension "svg"' in err and jsonl.read_bytes() == before


def test_pretokenize_and_resume(capsys, mini, jsonl, tmp_path):
    arguments = (
        "corpora",
        "pretokenize",
        jsonl,
        "--model",
        "sae-italian-mini",
        "--out",
        tmp_path / "out",
        "--context-size",
        32,
    )
    code, out, _ = run(capsys, *arguments, "--json")
    result = json.loads(out)
    assert code == 0 and result["tokens"] == 32 * result["windows"] and result["counts"]["dropped"]["other_split"] > 0
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "--resume" in err
    code, out, _ = run(capsys, *arguments, "--resume")
    assert code == 0 and f"{result['windows']:,} windows" in out


@pytest.mark.shared
def test_the_counts_over_all_shared_text(shared):
    """56,857 documents as data/README.md says; the same from each file."""
    from sae_italian.corpora.stream import CorpusStream, Reader

    stream = CorpusStream(shared / "data" / "italian", Reader())
    ids = [document.doc_id for document in stream]
    assert len(ids) == len(set(ids)) == stream.counts.kept == 56_857
    assert stream.counts.dropped == {} and stream.counts.mended.get("nul_bytes", 0) == 0
