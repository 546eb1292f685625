"""CoNLL-U: surface tokens with the labels of their words, placed in the text; broken lines named."""

import re

import numpy as np
import pytest

from sae_italian.analysis import treebank as module
from sae_italian.analysis.treebank import (
    Sentence,
    Word,
    _tokenised,
    category,
    last_tokens,
    read_conllu,
    read_treebank,
)
from sae_italian.base.errors import DataError, UsageError

TEXT = "Dell'amica gliel'ho detto."
ROWS = (
    "1-2\tDell'\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No",
    "1\tDi\tdi\tADP\tE\t_\t3\tcase\t_\t_",
    "2\tl'\til\tDET\tRD\tGender=Fem|Number=Sing|PronType=Art\t3\tdet\t_\t_",
    "3\tamica\tamica\tNOUN\tS\tGender=Fem|Number=Sing\t7\tobl\t_\t_",
    "4-5\tgliel'\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No",
    "4\tgli\tgli\tPRON\tPC\tGender=Masc|Number=Sing|Person=3\t7\tiobj\t_\t_",
    "5\tl'\tlo\tPRON\tPC\tNumber=Sing|Person=3\t7\tobj\t_\t_",
    "6\tho\tavere\tAUX\tVA\tMood=Ind|Number=Sing|Person=1|Tense=Pres|VerbForm=Fin\t7\taux\t_\t_",
    "6.1\t_\t_\t_\t_\t_\t_\t_\t_\tthis is an empty node",
    "7\tdetto\tdire\tVERB\tV\tGender=Masc|Number=Sing|Tense=Past|VerbForm=Part\t0\troot\t_\tSpaceAfter=No",
    "8\t.\t.\tPUNCT\tFS\t_\t7\tpunct\t_\t_",
)


def written(tmp_path, rows=ROWS, text=TEXT, name="prova.conllu"):
    file = tmp_path / name
    comment = [f"# text = {text}"] if text else []
    file.write_text("\n".join(["# sent_id = 1", *comment, *rows, "", ""]), encoding="utf-8")
    return file


def test_a_file_as_windows_saves_it_is_the_same(tmp_path):
    file = written(tmp_path)
    plain = list(read_conllu(file))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert list(read_conllu(file)) == plain


@pytest.mark.parametrize("text", [TEXT, ""])
def test_a_contraction_is_one_word_with_the_labels_of_both(tmp_path, text):
    """Also where the file does not give the text, but says where there is no space."""
    ((found, words),) = read_conllu(written(tmp_path, text=text))
    assert found == TEXT
    assert [found[word.start : word.end] for word in words] == ["Dell'", "amica", "gliel'", "ho", "detto", "."]
    assert words[0].labels == {"UPOS=ADP", "UPOS=DET", "Gender=Fem", "Number=Sing", "Gender=Fem,Number=Sing"}
    assert {"UPOS=PRON", "Gender=Masc", "Person=3", "Person=3,Number=Sing"} <= words[2].labels
    assert {"Mood=Ind,Tense=Pres", "Person=1,Number=Sing", "VerbForm=Fin"} <= words[3].labels
    assert words[5].labels == {"UPOS=PUNCT"}
    assert category("Mood=Ind,Tense=Pres") == "Mood+Tense"


@pytest.mark.parametrize(
    ("number", "row", "message"),
    [
        (3, "3\tamica\tamica\tNOUN", "4 columns; CoNLL-U has 10"),
        (3, ROWS[3].replace("amica\tamica", "amica\t"), "an empty column"),
        (3, "x" + ROWS[3], "'x3' is no word id"),
        (3, ROWS[3].replace("3", "³", 1), "'³' is no word id"),
        (3, ROWS[3].replace("3", "9" * 5000, 1), "9' is no word id"),
        (3, ROWS[3].replace("3", "9", 1), "word 9 where word 3 was expected"),
        (3, ROWS[3].replace("Gender=Fem", "Gender"), "feature 'Gender' is not of the form Name=Value"),
        (3, ROWS[3].replace("amica", "nemica"), "'nemica' does not come next in the sentence's text"),
        (0, ROWS[0].replace("1-2", "2-1"), "'2-1' is no word id"),
        (4, ROWS[4].replace("4-5", "3-5"), "word 3 where word 4 was expected"),
        (10, ROWS[0].replace("1-2", "8-9").replace("Dell'", "."), "before word 9 of a multi-word token"),
    ],
)
def test_a_broken_line_is_named(tmp_path, number, row, message):
    rows = [*ROWS[:number], row, *ROWS[number + 1 :]]
    if number == 10:
        rows.append(ROWS[10])
    with pytest.raises(DataError, match="prova.conllu, line ") as error:
        list(read_conllu(written(tmp_path, rows)))
    assert message in str(error.value)
    expected = 3 + number if number != 10 else 14
    assert f"line {expected}:" in str(error.value)


def test_other_files_that_are_no_treebank(tmp_path):
    (tmp_path / "latin.conllu").write_bytes(b"1\tperch\xe9" + b"\t_" * 8)
    with pytest.raises(DataError, match="latin.conllu is not UTF-8"):
        list(read_conllu(tmp_path / "latin.conllu"))
    (tmp_path / "vuota").mkdir()
    with pytest.raises(UsageError, match="holds no file ending in .conllu"):
        read_treebank(tmp_path / "vuota")
    with pytest.raises(UsageError, match="does not exist"):
        read_treebank(tmp_path / "manca.conllu")
    (tmp_path / "niente.conllu").write_text("# only a comment\n")
    with pytest.raises(DataError, match="holds no sentence"):
        read_treebank(tmp_path / "niente.conllu")


def test_official_files_say_what_is_for_test_else_a_hash_does(tmp_path):
    folder = tmp_path / "UD_Italian-Prova"
    folder.mkdir()
    written(folder, name="it_prova-ud-dev.conllu")
    written(folder, name="it_prova-ud-test.conllu")
    bank = read_treebank(folder)
    assert bank.name == "UD Prova" and [sentence.train for sentence in bank.sentences] == [True, False]
    many = [f"# text = {i}\n{i_row(i)}\n" for i in range(400)]
    (tmp_path / "altro.conllu").write_text("\n".join(many), encoding="utf-8")
    first, again = (read_treebank(tmp_path / "altro.conllu") for _ in range(2))
    share = np.mean([sentence.train for sentence in first.sentences])
    assert 0.87 < share < 0.93 and first == again and first.name == "altro"
    alone = read_treebank(folder / "it_prova-ud-test.conllu")
    assert alone.name == "UD PROVA" and alone.sentences[0].train  # with nothing to train on beside it a hash says
    assert read_treebank(tmp_path / "Prova") == bank  # the name alone, beside a clone of the treebank


def i_row(i: int) -> str:
    return f"1\t{i}\t{i}\tNUM\tN\t_\t0\troot\t_\t_"


def test_micro_italiano_is_a_treebank_too(monkeypatch):
    monkeypatch.setattr(module, "MICRO_DOCUMENTS", 4)
    bank = read_treebank("micro-italiano")
    assert [sentence.train for sentence in bank.sentences] == [True, False, True, False]
    labels = {label for sentence in bank.sentences for word in sentence.words for label in word.labels}
    assert {"UPOS=NOUN", "Gender=Fem,Number=Sing"} <= labels


def test_what_micro_italiano_writes_as_one_word_is_of_both():
    """As in CoNLL-U: «della» is of di and la, «vederla» of vedere and la."""
    for sentence in module.micro_treebank(60).sentences:
        for word in sentence.words:
            form = sentence.text[word.start : word.end].lower()
            if re.fullmatch(r"(a|da|de|ne|su)(l|ll[oae'])|(a|da|de|ne|su)(i|gli)", form):
                assert {"UPOS=ADP", "UPOS=DET"} <= word.labels, form
            if re.fullmatch(r"\w{2,}(ar|er|ir|ando|endo)(lo|la|li|le|gli|mi|ti|si|ci|ne)", form):
                assert "UPOS=VERB" not in word.labels or "UPOS=PRON" in word.labels, form


def test_each_word_is_read_at_the_token_that_completes_it(mini):
    texts = ["Perché l'aria della città è «più» bella?", "Il 23° caffè: «però…»"]
    for text in texts:
        words, start = [], 0
        for form in text.replace("«", "« ").replace("»", " »").replace("'", "' ").split():
            start = text.index(form, start)
            words.append(Word(start, start + len(form), frozenset()))
            start += len(form)
        sentence = Sentence(text, words, True)
        _, (spans,) = _tokenised([sentence], mini.tokenizer, 128)
        for word, last in zip(words, last_tokens(sentence, spans, 127).tolist(), strict=True):
            assert last >= 0 and spans[last, 1] >= word.end and spans[last, 0] < word.end
            assert last + 1 == len(spans) or spans[last + 1, 1] > word.end  # the last one, of a character in bytes too


def test_tokens_that_cut_words_across_and_sentences_that_are_cut():
    sentence = Sentence("ab cd ef", [Word(0, 2, frozenset()), Word(3, 5, frozenset()), Word(6, 8, frozenset())], True)
    assert last_tokens(sentence, np.array([[0, 1], [1, 4], [4, 5], [5, 8]]), 9).tolist() == [1, 2, 3]
    assert last_tokens(sentence, np.array([[0, 2], [2, 4]]), 9).tolist() == [0, -1, -1]
    assert last_tokens(sentence, np.zeros((0, 2), int), 9).tolist() == [-1, -1, -1]
    bytes_of_b = np.array([[0, 1], [1, 2], [1, 2], [2, 5]])  # a letter in two tokens
    assert last_tokens(sentence, bytes_of_b, 4)[:2].tolist() == [2, 3]
    assert last_tokens(sentence, bytes_of_b, 2)[:2].tolist() == [-1, -1], "the context ends within the letter"


@pytest.mark.shared
def test_the_real_treebanks_are_read_whole(shared):
    isdt, partut = (read_treebank(shared / "data" / "ud" / name) for name in ("ISDT", "ParTUT"))
    assert (len(isdt.sentences), len(partut.sentences)) == (1046, 2090)
    assert isdt.name == "UD ISDT" and sum(s.train for s in isdt.sentences) == 564
    for sentence in isdt.sentences[:50]:
        assert all(sentence.text[word.start : word.end].strip() for word in sentence.words)
        assert all(a.end <= b.start for a, b in zip(sentence.words, sentence.words[1:], strict=False))
