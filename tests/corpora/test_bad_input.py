"""Files as they are found: every fault is one clear line, or is counted under its name and passed over."""

import gzip
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_italian.base.errors import DataError, UsageError
from sae_italian.corpora import iter_documents, load_corpus
from sae_italian.corpora.packing import corpus_stats
from sae_italian.corpora.rows import read_rows
from sae_italian.corpora.stream import CorpusStream, Reader, check_corpus
from tests.corpora.hub_stand_in import parquet

GOOD = '{"text": "La città è bella."}\n'


def read(path, **settings):
    stream = CorpusStream(path, Reader(**settings))
    return [document.text for document in stream], stream.counts


@pytest.mark.parametrize("name", ["vuoto.txt", "vuoto.jsonl", "vuoto.csv", "vuoto.conllu"])
def test_empty_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match="no document with text in it"):
        check_corpus(tmp_path / name)


def test_empty_texts_are_counted_in_the_message(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " \\n "}\n{"text": 3}\n{"text": null}\n')
    with pytest.raises(UsageError, match=r"3 empty, 1 not_text|1 not_text, 3 empty"):
        check_corpus(tmp_path / "a.jsonl")


def test_broken_utf8_and_nul_bytes_are_mended_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("così: ".encode() + b"perch\xe9 no\n\nun\x00 byte\n\nsano e salvo\n")
    found, counts = read(tmp_path / "a.txt")
    assert found == ["così: perch\ufffd no", "un byte", "sano e salvo"]
    assert counts.mended == {"broken_utf8": 1, "nul_bytes": 1} and counts.kept == 3
    assert "NUL characters, removed" in counts.lines()


def test_lone_surrogates_do_not_reach_the_tokenizer(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "emoji rotta \\ud83d qui"}\n')
    assert read(tmp_path / "a.jsonl")[0] == ["emoji rotta ? qui"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.jsonl.gz"])
def test_one_line_of_50_mb(tmp_path, name):
    """It is never held in memory as a whole: refused by name of file and line, or counted and passed over."""
    long = "a" * 50_000_000
    if "jsonl" in name:
        content = GOOD + json.dumps({"text": long}) + "\n" + GOOD
    elif "csv" in name:
        content = f"text\nuno\n{long}\ndue\n"
    else:
        content = f"uno\n\n{long}\n\ndue\n"
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    with pytest.raises(DataError, match="longer than .*on_broken=skip"):
        read(tmp_path / name)
    found, counts = read(tmp_path / name, on_broken="skip")
    assert len(found) == 2 and counts.dropped == {"too_long": 1}
    if name == "a.jsonl":
        assert len(read(tmp_path / name, max_chars=60_000_000)[0]) == 3


def test_a_broken_line_in_the_middle_is_refused_or_skipped_by_choice(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(GOOD * 2 + '{"text": "tronca\n' + "[1]\n" + GOOD)
    with pytest.raises(DataError, match="line 3: not JSON .*on_broken=skip"):
        read(file)
    found, counts = read(file, on_broken="skip")
    assert len(found) == 3 and counts.dropped == {"broken_json": 2} and counts.read == 5
    ids = [document.doc_id for document in CorpusStream(file, Reader(on_broken="skip"))]
    assert ids == ["a.jsonl:0", "a.jsonl:1", "a.jsonl:4"]


def test_a_truncated_local_gz(tmp_path):
    content = gzip.compress("".join(json.dumps({"text": f"riga {i} {i**5}"}) + "\n" for i in range(5000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(content[: len(content) // 2])
    (tmp_path / "b.jsonl").write_text(GOOD)
    with pytest.raises(DataError, match="a.jsonl.gz ends early"):
        read(tmp_path)
    found, counts = read(tmp_path, on_broken="skip")
    assert counts.dropped == {"truncated_shard": 1} and 1000 < len(found) < 5000 and found[-1] == "La città è bella."


def test_parquet_of_another_schema_and_no_parquet_at_all(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet([{"text": "Buongiorno."}]))
    (tmp_path / "b.parquet").write_bytes(parquet([{"text": ["una", "lista"]}]))
    (tmp_path / "c.parquet").write_bytes(parquet([{"testo": "Ciao."}]))
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="b.parquet: column 'text' holds list.*strings were expected"):
        read(tmp_path)
    with pytest.raises(UsageError, match="it has 'testo'"):
        read(tmp_path / "c.parquet")
    with pytest.raises(DataError, match="no whole parquet file"):
        read(tmp_path / "d.parquet")
    found, counts = read(tmp_path, on_broken="skip")
    assert found == ["Buongiorno."] and counts.dropped == {"other_schema": 2, "broken_shard": 1}


def test_a_local_shard_that_disappears(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text(GOOD)
    stream = CorpusStream(tmp_path, Reader())
    next(stream)
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(DataError, match="b.jsonl disappeared while it was read"):
        list(stream)
    (tmp_path / "b.jsonl").write_text(GOOD)
    stream = CorpusStream(tmp_path, Reader(on_broken="skip"))
    next(stream)
    (tmp_path / "b.jsonl").unlink()
    assert len(list(stream)) == 1 and stream.counts.dropped == {"shard_gone": 1}


def test_folders_of_save_to_disk_and_conllu(tmp_path):
    table = datasets.Dataset.from_dict({"text": [f"riga {i}" for i in range(7)], "source": ["s"] * 7})
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": table.select([0]), "train": table}).save_to_disk(tmp_path / "splits")
    for folder in ("saved", "splits"):
        found = list(iter_documents(tmp_path / folder))
        assert [d.text for d in found] == [f"riga {i}" for i in range(7)] and found[0].source == "s"
    (tmp_path / "ud.conllu").write_text(
        "# sent_id = 1\n# text = Vado al mare.\n1\tVado\t_\n\n# text = È tardi.\n1\tÈ\t_\n\n"
    )
    assert [d.text for d in iter_documents(tmp_path / "ud.conllu")] == ["Vado al mare.", "È tardi."]


def test_mixtures_are_drawn_by_weight_with_the_seed(tmp_path):
    for name, n in (("a", 3000), ("b", 3000)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(n)))
    mixture = f"0.8*{tmp_path / 'a.jsonl'},0.2*{tmp_path / 'b.jsonl'}"
    found = [document.text for document in iter_documents(mixture, seed=1)]
    assert len(found) == len(set(found)) == 6000
    share = sum(text.startswith("a") for text in found[:3000]) / 3000
    assert 0.77 < share < 0.83  # 0.8 with a standard error of 0.007
    assert (
        found == [d.text for d in iter_documents(mixture, seed=1)] != [d.text for d in iter_documents(mixture, seed=2)]
    )
    for bad in (f"0*{tmp_path / 'a.jsonl'},1*micro-italiano", f"0.5*{tmp_path / 'a.jsonl'},micro-italiano"):
        with pytest.raises(UsageError, match="needs a weight above 0"):
            next(iter_documents(bad))


def test_settings_that_do_not_exist(tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'heldout'"):
        Reader(split="held-out")  # pyright: ignore
    with pytest.raises(UsageError, match="Valid: refuse, skip"):
        Reader(on_broken="ignore")  # pyright: ignore
    with pytest.raises(UsageError, match="has no end"):
        load_corpus("micro-italiano", streaming=False)


def test_a_dataset_that_is_not_streamed_follows_its_files(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(GOOD)
    assert len(load_corpus(file, "all", streaming=False)) == 1
    file.write_text(GOOD + '{"text": "Un altro."}\n')
    table = load_corpus(file, "all", streaming=False)
    assert table["text"][:] == ["La città è bella.", "Un altro."]


ITALIAN = ["Perché la città è più bella?", "Così è, se vi pare: «già».", "È l'università dell'Aquila; però..."]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_csv_as_excel_writes_it(tmp_path, mark, encoding):
    lines = [mark.join(["n", "text"]), *(f'{i}{mark}"{text}"' for i, text in enumerate(ITALIAN))]
    (tmp_path / "a.csv").write_text("\r\n".join(lines), encoding=encoding, newline="")
    found, counts = read(tmp_path / "a.csv")
    assert found == ITALIAN and counts.mended == {}


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_latin_1_text_is_read_and_an_odd_byte_in_utf_8_stays_one(tmp_path, name):
    latin = [text.replace("«", '"').replace("»", '"') for text in ITALIAN]
    text = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in latin)
    data = (text if name == "a.jsonl" else "\n\n".join(latin)).encode("latin-1")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read(tmp_path / name)[0] == latin
    (tmp_path / "b.txt").write_bytes("Perché? ".encode() + b"\xe8")
    assert read(tmp_path / "b.txt")[0] == ["Perché? \ufffd"]


@pytest.mark.parametrize("broken", ['"aperte e mai chiuse', '"chiuse" e poi altro'])
def test_a_quote_in_a_csv_that_does_not_end_its_cell_is_told_with_its_line(tmp_path, broken):
    file = tmp_path / "a.csv"
    file.write_text(f'text,fonte\n"uno, due",a\n{broken},b\ntre,c\n', "utf-8")
    with pytest.raises(DataError, match="a.csv, line 3: not CSV .*on_broken=skip"):
        read(file)
    assert read(file, on_broken="skip")[1].dropped == {"broken_csv": 1}


def test_a_csv_without_the_text_column_lists_its_columns_and_names_the_option(tmp_path):
    (tmp_path / "a.csv").write_text("Titolo;Note\nuno;due, tre\n")
    with pytest.raises(UsageError, match="no column 'text'; it has 'Titolo', 'Note'. .*--text-column") as error:
        check_corpus(tmp_path / "a.csv")
    assert "Did you mean" not in str(error.value)
    assert read(tmp_path / "a.csv", text_column="Note")[0] == ["due, tre"]


@pytest.mark.parametrize("whole", [2**28, 0])
def test_a_file_rewritten_with_the_same_size_is_another_corpus(tmp_path, monkeypatch, whole):
    """The same text with another date is the same corpus where the whole of it is read to know; of more, the date tells."""
    monkeypatch.setattr("sae_italian.corpora.rows.HASHED_WHOLE", whole)
    file = tmp_path / "a.txt"

    def written(text, date):
        file.write_text(text * 10)
        os.utime(file, ns=(date, date))
        return CorpusStream(file).spec(), load_corpus(file, "all", streaming=False, limit=1)["text"][0][:4]

    (old, old_text), (new, new_text) = written("uno ", 10**18), written("due ", 10**18 if whole else 10**18 + 1)
    assert old != new and (old_text, new_text) == ("uno ", "due ")
    assert (written("due ", 10**18 + 2)[0] == new) == bool(whole)


def test_one_letter_changed_anywhere_with_the_date_put_back_is_another_corpus(tmp_path):
    file = tmp_path / "a.txt"
    text = bytearray(b"uno due tre " * 420_000)
    seen = set()
    for place in (0, 300_000, 2_500_000, len(text) - 1):
        text[place] ^= 1
        file.write_bytes(text)
        os.utime(file, ns=(10**18, 10**18))
        seen.add(json.dumps(CorpusStream(file).spec()))
    assert len(seen) == 4


@pytest.mark.parametrize("line", ['{"text": "a", "n": ' + "9" * 6000 + "}", "[" * 100_000, '{"text": "a\x00'])
def test_endless_numbers_and_deep_brackets_are_a_broken_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(GOOD + line + "\n" + GOOD)
    with pytest.raises(DataError, match="a.jsonl, line 2: not JSON") as error:
        read(tmp_path / "a.jsonl")
    assert "\n" not in str(error.value)
    found, counts = read(tmp_path / "a.jsonl", on_broken="skip")
    assert len(found) == 2 and counts.dropped == {"broken_json": 1}


def test_saelens_tokens_are_named_where_text_is_asked_for(tmp_path):
    """A folder of its PretokenizeRunner is read by the trainer (tests/corpora/test_pretokenize.py); it holds no text."""
    datasets.Dataset.from_dict({"input_ids": [[1, 2]]}).save_to_disk(tmp_path / "theirs")
    with pytest.raises(UsageError, match="no column 'text'; it has 'input_ids'"):
        check_corpus(tmp_path / "theirs")


def test_a_folder_that_vanishes_while_a_corpus_is_listed_is_passed_over(tmp_path, monkeypatch):
    """As another program's temporary folder does; its files are no part of the corpus."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "testi.txt").write_text("La casa è là.", encoding="utf-8")
    (tmp_path / "gone").mkdir()
    scandir = os.scandir

    def listing(path):
        if str(path).endswith("gone"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listing)
    assert [document.text for document in iter_documents(tmp_path)] == ["La casa è là."]


def test_a_row_without_the_text_column_costs_that_row_alone(tmp_path):
    """All that came after it was lost, counted as one file of another schema."""
    file = tmp_path / "a.jsonl"
    file.write_text(GOOD * 2 + '{"id": 3}\n' + GOOD * 3)
    with pytest.raises(DataError, match=r"line 3 has no column 'text'; it has 'id'.*--text-column.*on_broken=skip"):
        read(file)
    found, counts = read(file, on_broken="skip")
    assert len(found) == 5 and counts.dropped == {"not_text": 1} and counts.read == 6


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_bytes_that_are_not_utf_8_in_a_parquet_file_are_mended_and_counted(tmp_path, kind):
    width = 4 if kind == pa.string() else 8
    ends = b"".join(n.to_bytes(width, "little") for n in (0, 3, 9, 9, 13))
    texts = pa.Array.from_buffers(kind, 4, [None, pa.py_buffer(ends), pa.py_buffer(b"unoperch\xe9bene")])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    found, counts = read(tmp_path / "a.parquet")
    assert found == ["uno", "perch\ufffd", "bene"]
    assert counts.mended == {"broken_utf8": 1} and counts.dropped == {"empty": 1}


def test_a_truncated_zst_keeps_the_rows_before(tmp_path):
    content = pa.compress(
        "".join(json.dumps({"text": f"riga {i} {i**5}"}) + "\n" for i in range(20_000)).encode(), "zstd", True
    )
    (tmp_path / "a.jsonl.zst").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="Truncated"):
        read(tmp_path)
    found, counts = read(tmp_path, on_broken="skip")
    assert counts.dropped == {"broken_shard": 1} and 1000 < len(found) < 20_000


@pytest.mark.parametrize("content", ["n,testo.it\n1,Ciao.\n", '{"testo.it": "Ciao."}\n', "\n\r\nn;testo.it\n1;Ciao.\n"])
def test_a_column_with_a_point_in_its_name_and_a_csv_that_begins_with_blank_lines(tmp_path, content):
    file = tmp_path / ("a.jsonl" if "{" in content else "a.csv")
    file.write_text(content)
    assert read(file, text_column="testo.it")[0] == ["Ciao."]


def test_an_endless_paragraph_is_not_held_in_memory(tmp_path, monkeypatch):
    """Of a file with no blank line as many characters were held as it has."""
    monkeypatch.setattr("sae_italian.corpora.rows.MAX_LINE", 1000)
    (tmp_path / "a.txt").write_text("uno due\n" * 10_000 + "\ntre\n")
    found, counts = read(tmp_path / "a.txt", on_broken="skip", max_chars=900)
    assert found == ["tre"] and counts.dropped == {"too_long": 1}
    assert len(read(tmp_path / "a.txt")[0][0]) < 1200


@pytest.mark.parametrize("corpus", ["", "a.txt,", ",a.txt", "a.txt,,a.txt"])
def test_a_name_that_is_missing_is_not_the_working_folder(tmp_path, monkeypatch, corpus):
    """All text below it was read for the nothing behind a comma."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("uno")
    (tmp_path / "segreto.txt").write_text("due")
    with pytest.raises(UsageError, match="lacks a name"):
        CorpusStream(corpus)


def test_a_file_may_have_a_comma_in_its_path_and_micro_italiano_in_its_name(tmp_path):
    folder = tmp_path / "testi, 2*vari"
    folder.mkdir()
    file = folder / "micro-italiano.txt"
    file.write_text("uno\n\ndue\n")
    for corpus in (folder, file, str(file)):
        assert read(corpus)[0] == ["uno", "due"]
    assert len(load_corpus(file, "all", streaming=False)) == 2  # which has an end


def test_a_mixture_with_micro_italiano_has_no_end_either(tmp_path):
    (tmp_path / "a.txt").write_text("uno")
    with pytest.raises(UsageError, match="has no end: say how many documents"):
        corpus_stats(f"micro-italiano,{tmp_path / 'a.txt'}", None, n=None)
    for n in (0, -1, "3", 2.5, float("nan")):
        with pytest.raises(UsageError, match="documents is .*; it must be 1 or more, a whole number"):
            corpus_stats(tmp_path / "a.txt", None, n=n)  # pyright: ignore


def test_a_file_name_that_is_not_utf_8_gives_ids_that_are(tmp_path):
    """As archives of old Windows machines unpack them; no Arrow table could hold the name."""
    for letter in (b"\xe8", b"\xe9"):
        with open(os.fsencode(tmp_path) + b"/perch" + letter + b".txt", "w") as handle:  # noqa: PTH123
            handle.write("uno")
    ids = [document.doc_id for document in iter_documents(tmp_path)]
    assert ids == [r"perch\xe8.txt:0", r"perch\xe9.txt:0"]
    assert load_corpus(tmp_path, "all", streaming=False)["source"][:] == [r"perch\xe8", r"perch\xe9"]


@pytest.mark.parametrize("name", ["a.tsv", "a.jsonl"])
def test_small_tables_from_windows_and_with_odd_white_space(tmp_path, name):
    """A mark of the byte order hid the first column; U+2028, U+0085 or a form feed in a text ended its row."""
    text = "Perché?\u2028Così\x85e\x0ccosì."
    if name == "a.tsv":
        content = f"sen\tn\r\n{text}\t1\r\n"
    else:
        content = json.dumps({"sen": text, "n": "1"}, ensure_ascii=False) + "\r\n"
    (tmp_path / name).write_text(content, encoding="utf-8-sig", newline="")
    assert [row for _, row in read_rows(tmp_path / name)] == [{"sen": text, "n": "1"}]
