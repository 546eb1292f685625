"""Agreement pairs: one wrong form each, balanced; MultiBLiMP's files as they are; broken ones refused."""

from collections import Counter
from types import SimpleNamespace

import pytest

from sae_italian import micro_italiano
from sae_italian.analysis.tasks import (
    KINDS,
    MinimalPair,
    agreement_pairs,
    number_pairs,
    read_minimal_pairs,
    score_choices,
)
from sae_italian.base.errors import DataError, UsageError

# As in the authors' pipeline: an unnamed index, and columns that we do not need.
TSV = (
    "\tsen\tverb\tchild\tprefix\twrong_sen\tphenomenon\n"
    "0\tLe chiavi sono qui.\tsono\tchiavi\tLe chiavi\tLe chiavi è qui.\tSV-#\n"
    '1\t"Disse: ""vado"" e andò."\tandò\tDisse\t"Disse: ""vado"" e"\t"Disse: ""vado"" e andarono."\tSV-#\n'
)

ITALIAN = [
    "I disegni erano vecchi",
    "Il vestito vicino alla lettera sarà nero",
    "La penna",
    "Il cappello era",
    "La penna vicino ai cappelli sarà",
]


def test_a_pair_differs_in_its_last_word_alone_and_the_kinds_take_turns():
    pairs = agreement_pairs(300)
    assert Counter(pair.kind for pair in pairs) == dict.fromkeys(KINDS, 60)
    for pair in pairs:
        right, wrong = pair.right.split(), pair.wrong.split()
        assert right[:-1] == wrong[:-1] and right[-1] != wrong[-1] and pair.right[0].isupper()
        assert ("vicino" in right) == pair.kind.endswith("attractor")


def test_every_form_is_as_often_right_as_wrong():
    """A model that always prefers one form gets half of them: no kind can be done without agreement."""
    pairs = agreement_pairs(2000, seed=3)
    for kind in ("subject-verb", "subject-verb, attractor"):
        right = Counter(pair.right.split()[-1] in ("sono", "erano", "saranno") for pair in pairs if pair.kind == kind)
        assert right[True] == right[False]
    for kind in ("gender", "gender, attractor"):
        feminine = Counter(pair.right.split()[-1][-1] in "ae" for pair in pairs if pair.kind == kind)
        assert feminine[True] == feminine[False]


def test_italian_pairs_are_what_they_were_before_there_was_another_language():
    assert [pair.right for pair in agreement_pairs(5)] == ITALIAN
    assert agreement_pairs(5, language="it") == agreement_pairs(5)


def test_english_pairs_need_the_number_of_the_first_noun_alone():
    """No kind is of gender; «the» agrees with both numbers, so it decides nothing; each form is as often right as wrong."""
    pairs = agreement_pairs(1200, language="en")
    assert Counter(pair.kind for pair in pairs) == dict.fromkeys([k for k in KINDS if "gender" not in k], 400)
    for pair in pairs:
        *said, right = pair.right.split()
        assert said == pair.wrong.split()[:-1] and right != pair.wrong.split()[-1]
        plural = right.endswith("s") if pair.kind == "number" else right in ("are", "were", "have")
        assert plural == (said[0] == "These" if pair.kind == "number" else said[1].endswith("s"))
        if pair.kind.endswith("attractor"):
            assert said[2:4] == ["near", "the"] and said[4].rstrip("s") != said[1].rstrip("s")
            assert said[4].endswith("s") != plural
    for kind in ("subject-verb", "subject-verb, attractor"):
        right = Counter(pair.right.split()[-1] in ("are", "were", "have") for pair in pairs if pair.kind == kind)
        assert right[True] == right[False]
    with pytest.raises(UsageError, match="language 'eng' is unknown. Did you mean 'en'"):
        agreement_pairs(1, language="eng")


def test_english_subjects_to_patch_differ_in_number_alone():
    def words(text):
        return SimpleNamespace(input_ids=text.split())

    for index, (base, other) in enumerate(number_pairs(6, words, language="en")):
        (article, noun, *rest), (other_article, other_noun, *other_rest) = base.split(), other.split()
        assert article == other_article == "The" and rest == other_rest and rest[:2] == ["near", "the"]
        assert (noun, other_noun)[index % 2].rstrip("s") in (noun, other_noun)[1 - index % 2]


@pytest.mark.parametrize("pair", [p for p in agreement_pairs(400) if p.kind.endswith("attractor")][:40])
def test_the_attractor_bears_the_wrong_feature(pair):
    word = pair.right.split()[3]
    feminine, plural = word in ("alla", "alle"), word in ("ai", "alle")
    if pair.kind.startswith("gender"):
        assert (pair.right.split()[0] in ("La", "Le")) != feminine
    else:
        assert (pair.right.split()[-1] in ("sono", "erano", "saranno")) != plural


def test_every_word_is_known_to_micro_italiano():
    gold = micro_italiano.documents(2000)
    known = {doc.text[span.start : span.end].lower() for doc in gold for span in doc.words}
    used = {word.lower() for pair in agreement_pairs(1000) for word in (pair.right + " " + pair.wrong).split()}
    assert used <= known | {"ai"}


def test_the_score_is_of_whole_texts(mini):
    pairs = [MinimalPair("La penna", "La penne", "number"), MinimalPair("Un penna", "Una penna", "number")]
    found = score_choices(mini, mini.tokenizer, pairs)
    assert found.n == 2 and found.accuracy.value == 0.5  # the second pair is the wrong way round
    assert found.svg().startswith("<?xml")


def test_the_embedded_model_knows_number_and_verbs(mini):
    found = score_choices(mini, mini.tokenizer, agreement_pairs(150))
    assert found.by_kind["number"].value >= 0.9 and found.by_kind["subject-verb"].value >= 0.7


def test_number_pairs_differ_in_the_subject_alone_and_align(mini):
    pairs = number_pairs(12, mini.tokenizer)
    for index, (base, other) in enumerate(pairs):
        (article, noun, *rest), (other_article, other_noun, *other_rest) = base.split(), other.split()
        assert rest == other_rest and rest[0] == "vicino" and noun != other_noun
        assert {article, other_article} in ({"Il", "I"}, {"La", "Le"}) and (article in ("Il", "La")) == (index % 2 == 0)
        assert len(mini.tokenizer(base).input_ids) == len(mini.tokenizer(other).input_ids)
    assert number_pairs(12, mini.tokenizer) == pairs and len(set(pairs)) > 8


def test_too_few_aligned_subjects_are_refused():
    class Growing:
        """A tokenizer in which no two texts have equally many tokens."""

        calls = 0

        def __call__(self, text):
            self.calls += 1
            return type("Encoded", (), {"input_ids": [0] * self.calls})

    with pytest.raises(UsageError, match="0 of 50 subjects"):
        number_pairs(1, Growing())


def test_multiblimp_is_read_as_tsv_jsonl_and_parquet(tmp_path):
    import pyarrow.csv
    import pyarrow.parquet

    path = tmp_path / "ita.tsv"
    path.write_text(TSV, encoding="utf-8")
    pairs = read_minimal_pairs(path)
    assert pairs[0] == MinimalPair("Le chiavi sono qui.", "Le chiavi è qui.", "SV-#")
    assert pairs[1].right == 'Disse: "vado" e andò.'
    table = pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(delimiter="\t"))
    pyarrow.parquet.write_table(table, tmp_path / "ita.parquet")
    table.to_pandas().to_json(tmp_path / "ita.jsonl", orient="records", lines=True)
    assert read_minimal_pairs(tmp_path / "ita.parquet") == pairs == read_minimal_pairs(tmp_path / "ita.jsonl")
    plain = tmp_path / "plain.tsv"
    plain.write_text("sen\twrong_sen\nun libro\tuna libro\n", encoding="utf-8")
    assert read_minimal_pairs(plain) == [MinimalPair("un libro", "una libro", "agreement")]
    plain.write_bytes("\ufeffsen\twrong_sen\r\nun\u2028libro\tuna libro\r\n".encode())  # of Windows; a line of a page
    assert read_minimal_pairs(plain) == [MinimalPair("un\u2028libro", "una libro", "agreement")]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("ita.tsv", "sentence\twrong\na\tb\n", "no column sen, wrong_sen; it has sentence, wrong"),
        ("ita.tsv", "sen\twrong_sen\nuno\tdue\ntre\n", "line 3: two different sentences"),
        ("ita.tsv", "sen\twrong_sen\nuno\tuno\n", "line 2: two different sentences"),
        ("ita.tsv", "sen\twrong_sen\n", "holds no pairs"),
        ("ita.jsonl", '{"sen": "a", "wrong_sen": "b"}\nnonsense\n', "line 2 cannot be read as .jsonl"),
        ("ita.jsonl", "[1, 2]\n", "line 1 cannot be read as .jsonl"),
        ("ita.tsv", b"sen\twrong_sen\nperch\xe9\tperche\n", "cannot be read as .tsv in UTF-8"),
        ("ita.tsv", "sen\tx\nuno\tdue\ttre\n", "no column wrong_sen; it has sen, x, None"),
        ("ita.parquet", "no table", "cannot be read as .parquet"),
    ],
)
def test_a_broken_file_is_refused_naming_the_line(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=said) as error:
        read_minimal_pairs(path)
    assert "\n" not in str(error.value)


def test_another_ending_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "ita.csv").write_text("a", encoding="utf-8")
    with pytest.raises(UsageError, match=r"\.tsv, \.jsonl or \.parquet"):
        read_minimal_pairs(tmp_path / "ita.csv")
    with pytest.raises(UsageError, match="is not a file"):
        read_minimal_pairs(tmp_path / "none.tsv")


def test_no_pairs_are_no_score(mini):
    with pytest.raises(UsageError, match="ask for 1 or more"):
        score_choices(mini, mini.tokenizer, agreement_pairs(0))
