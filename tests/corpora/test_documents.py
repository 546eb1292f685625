import gzip
import json

import pytest

from sae_italian.base.errors import DataError, UsageError
from sae_italian.corpora import is_held_out, iter_documents, load_corpus

ROWS = [{"text": f"Testo numero {i}: è così.", "source": "s"} for i in range(300)]


def written(path, ending):
    file = path / f"corpus{ending}"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    if ending == ".jsonl":
        file.write_text(lines, encoding="utf-8")
    elif ending == ".jsonl.gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif ending == ".txt":
        file.write_text("\r\n\r\n".join(row["text"] for row in ROWS), encoding="utf-8-sig")
    elif ending == ".csv":
        file.write_text("text,source\n" + "".join(f'"{row["text"]}",s\n' for row in ROWS), encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), file)
    return file


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".txt", ".csv", ".parquet"])
def test_every_format_gives_the_same_texts(tmp_path, ending):
    file = written(tmp_path, ending)
    for corpus in (file, tmp_path):
        documents = list(iter_documents(corpus))
        assert [document.text for document in documents] == [row["text"] for row in ROWS]
        assert len({document.doc_id for document in documents}) == len(ROWS)


def test_the_two_splits_are_disjoint_and_complete(tmp_path):
    file = written(tmp_path, ".jsonl")
    train, held_out = ([d.text for d in iter_documents(file, split)] for split in ("train", "heldout"))
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(row["text"] for row in ROWS)
    assert 3 <= len(held_out) <= 30  # 5 % of 300, give or take
    assert all(is_held_out(text) for text in held_out)


def test_the_held_out_hash_never_changes():
    """Pinned: a change here would let training see what other runs held out."""
    assert [i for i in range(100) if is_held_out(f"documento {i}")] == [4, 9, 17, 18, 42, 87, 91, 92]


def test_several_corpora_are_read_in_turn(tmp_path):
    (tmp_path / "a.txt").write_text("uno\n\ndue\n\ntre")
    (tmp_path / "b.txt").write_text("A")
    texts = [document.text for document in iter_documents(f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}")]
    assert texts == ["uno", "A", "due", "tre"]


def test_load_corpus_streams_rows_for_datasets(tmp_path):
    rows = list(load_corpus(written(tmp_path, ".jsonl"), "all", limit=5))
    assert [set(row) for row in rows] == [{"text", "doc_id", "source"}] * 5
    micro = list(load_corpus("micro-italiano", limit=3))
    assert len(micro) == 3 and micro == list(load_corpus("micro-italiano", limit=3))
    with pytest.raises(UsageError, match="limit is -1"):
        load_corpus("micro-italiano", limit=-1)
    with pytest.raises(UsageError, match="limit is 0"):  # no data set on disk is without a row
        load_corpus("micro-italiano", limit=0, streaming=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rotto.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("lista.jsonl", "[1]\n", "a JSON object was expected"),
        ("titolo.jsonl", '{"testo": "a"}\n', "no column 'text'.*it has 'testo'"),
        ("vuoto.jsonl", "", "no document"),
        ("foto.png", "", "unknown ending"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises((UsageError, DataError), match=message) as error:
        load_corpus(tmp_path / name)
        list(iter_documents(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_missing_corpus_offers_the_nearest(tmp_path):
    written(tmp_path, ".jsonl")
    with pytest.raises(UsageError, match="Did you mean 'corpus.jsonl'"):
        load_corpus(tmp_path / "corpsu.jsonl")
    with pytest.raises(UsageError, match="Did you mean 'micro-italiano'"):
        load_corpus("micro-italian")


def test_broken_utf8_and_nul_bytes_do_not_stop_a_run(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"perch\xe9 no\n\nun\x00 byte\n")
    assert len(list(iter_documents(tmp_path / "a.txt"))) == 2


@pytest.mark.parametrize("seed", [0, 3])
def test_held_out_micro_italiano_is_the_same_when_it_is_read_again(seed):
    """Of seed 0 a list says which documents are held out; positions and counts must not show it."""
    from itertools import islice

    from sae_italian.corpora import stream

    reader = stream.Reader(split="heldout", seed=seed)
    made = stream.CorpusStream("micro-italiano", reader)
    first = list(islice(made, 4))
    middle = made.state()
    rest = list(islice(made, 3))
    again = stream.CorpusStream("micro-italiano", reader)
    assert list(islice(again, 7)) == first + rest
    assert again.counts.as_dict() == made.counts.as_dict() and again.counts.as_dict()["dropped"]["other_split"] > 50
    resumed = stream.CorpusStream("micro-italiano", reader)
    resumed.load_state(middle)
    assert list(islice(resumed, 3)) == rest
    everything = stream.CorpusStream("micro-italiano", stream.Reader(seed=seed))
    assert [
        d for d in islice(everything, made.state()["parts"][0]["row"]) if stream.is_held_out(d.text)
    ] == first + rest
