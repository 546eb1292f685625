"""Submissions: rules name what the marked tokens share, words decide without an LLM, an LLM's open answers are filled."""

import json
import re

import pytest

from sae_italian.autointerp.explainita import read_split
from sae_italian.autointerp.explainita_tasks import NO_PATTERN, evaluate_sequences, mentions, predict
from sae_italian.cli import main
from tests.autointerp.explainita.test_explainita import folder_of, jsonl_of, task2_row
from tests.autointerp.llm.endpoint import FakeEndpoint, passages

FUTURES = ("partiranno", "canteranno", "vedranno", "leggeranno", "apriranno", "diranno")


def marked_row(latent, sentences):
    """A row of task 1 from sentences with <<marks>> and words as tokens, marked ones at strength 9."""
    examples = []
    for sentence in sentences:
        tokens = sentence.replace("<<", "").replace(">>", "").split()
        active = [{"token": word, "strength": 9} for word in re.findall(r"<<(.*?)>>", sentence)]
        examples.append({"text": sentence, "tokens": tokens, "activations": active})
    return {"Latent ID": f"layers.14_latent{latent}", "examples": examples, "explanation": ""}


def test_a_rule_names_the_word_the_ending_or_the_word_before(tmp_path):
    rows = [
        marked_row(1, [f"il <<gatto>> e il {other} dormono" for other in ("cane", "topo", "bue", "lupo")]),
        marked_row(2, [f"gli amici <<{verb}>> domani con noi" for verb in FUTURES]),
        marked_row(3, [f"dopo uno <<{noun}>> e il {noun}" for noun in ("zaino", "specchio", "sciopero", "studio")]),
        marked_row(4, ["niente di segnato qui"]),
    ]
    # strengths only where marked: an example without any has an empty list
    found, unanswered = predict(read_split(jsonl_of(tmp_path / "d.jsonl", rows), 1), 1)
    texts = [found[f"layers.14_latent{i}"] for i in (1, 2, 3, 4)]
    assert texts[0] == "su «gatto»"
    assert texts[1].startswith("alla fine di parole che finiscono in -") and texts[1].split("-")[1] in "ranno"
    assert texts[2] == "sulla parola dopo «uno»"
    assert texts[3] == NO_PATTERN["it"] and unanswered == 0
    english, _ = predict(read_split(tmp_path / "d.jsonl", 1), 1, language="en")
    assert english["layers.14_latent1"] == "on «gatto»" and english["layers.14_latent4"] == NO_PATTERN["en"]


@pytest.mark.parametrize(
    ("explanation", "text", "said"),
    [
        ("la parola «casa»", "La casa è grande", True),
        ("la parola «casa»", "Il casale è grande", False),
        ('le parole "la casa" o “il tetto”', "ho visto il tetto", True),
        ("avverbi in -mente", "parla lentamente", True),
        ("avverbi in -mente", "parla piano", False),
        ("nomi di animali, soprattutto felini", "un felino raro", True),
        ("l'ora dell'arrivo", "partenza alle otto", False),  # apostrophes are no quotation marks
        ("", "qualcosa", False),
        ("la virgola «,»", "casa, rossa", True),
        ("articolo elidato, «l'»", "bevo l’acqua", True),
        ("articolo elidato, «l’»", "bevo l'acqua", True),
        ("articolo elidato, «l'»", "dell'acqua", False),
        ("lo spazio « » tra parole", "Ciao a tutti.", False),
    ],
)
def test_without_an_llm_a_sequence_is_explained_by_its_words(explanation, text, said):
    assert mentions(explanation, text) is said


def task2_folder(tmp_path):
    rows = [
        task2_row(8, [True, False, True], "la parola «venderanno»", hidden=True),
        task2_row(9, [False], "x", hidden=True),
    ]
    for row in rows:
        for i, example in enumerate(row["examples"]):
            example["str_tokens"] = ["Si", ["venderanno", "comprano", "venderanno"][i], "libri"]
            example["activating"] = False  # the published default
    return folder_of(tmp_path / "test", rows)


def test_a_submission_by_words_can_be_evaluated_and_hidden_labels_cannot(tmp_path, capsys):
    data, out = task2_folder(tmp_path), tmp_path / "run.jsonl"
    assert main(["explainita", "predict", str(data), str(out), "--task", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["latents"], result["by"]) == (2, "words of the explanation")
    gold_rows = [task2_row(8, [True, False, False]), task2_row(9, [False])]
    for row, told in zip(gold_rows, read_split(data, 2), strict=True):
        for example, passage in zip(row["examples"], told.sequences, strict=True):
            example["str_tokens"] = list(passage.tokens)
    gold = jsonl_of(tmp_path / "gold.jsonl", gold_rows)
    evaluate = ["explainita", "evaluate", str(out), str(gold), "--task", "2", "--json"]
    assert main(evaluate) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tpr"]["value"] == 1.0 and found["tnr"]["value"] == pytest.approx(2 / 3)
    # the published test split is no gold file, and a submission's sequences stay in their order
    assert main([*evaluate[:3], str(data), "--task", "2"]) == 2
    assert "labels hidden" in capsys.readouterr().err
    turned = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    turned[0]["examples"].reverse()
    turned[0]["examples"][0]["str_tokens"] = ["altro"]
    turned[0]["examples"][0]["activations"] = [-1.0]
    assert main(["explainita", "evaluate", str(jsonl_of(tmp_path / "t.jsonl", turned)), *evaluate[3:]]) == 2
    assert "sequence 0 of layers.14_latent8 is another one" in capsys.readouterr().err


def reader(body):
    question = body["messages"][-1]["content"]
    if "Spiegazione: x" in question:
        return "non so dire"
    if "Spiegazione: " in question:
        lines = re.findall(r"^\d+\. (.*)$", question, flags=re.MULTILINE)
        return json.dumps({"risposte": [int("venderanno" in line) for line in lines]})
    return json.dumps({"spiegazione": "verbi al futuro, terza persona plurale"}) if "canteranno" in question else "[]"


def test_an_llm_answers_both_tasks_and_what_it_leaves_open_is_filled_and_counted(tmp_path, capsys, prices):
    rows = [
        marked_row(1, [f"gli amici <<{verb}>> domani" for verb in FUTURES]),
        marked_row(2, ["il <<gatto>> dorme", "un <<gatto>> nero", "ogni <<gatto>> mangia"]),
    ]
    one, two = jsonl_of(tmp_path / "one.jsonl", rows), task2_folder(tmp_path)
    with FakeEndpoint(reader) as endpoint:
        llm = ["--llm-model", "prova", "--endpoint", endpoint.url, "--json"]
        rare = f"prices={prices}"
        command = [
            "explainita",
            "predict",
            str(one),
            str(tmp_path / "o1.jsonl"),
            rare,
            "--task",
            "1",
            "--explainer",
            "llm",
        ]
        assert main([*command, *llm, "--estimate"]) == 0
        estimate = json.loads(capsys.readouterr().out)
        assert (estimate["calls"], estimate["latents"], endpoint.requests) == (2, 2, []) and estimate["usd"] > 0
        assert not (tmp_path / "o1.jsonl").exists()
        assert main([*command, *llm]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["unanswered"] == 1 and result["calls"]["asked"] == 3  # one repair
        said = [latent.explanation for latent in read_split(tmp_path / "o1.jsonl", 1)]
        assert said == ["verbi al futuro, terza persona plurale", "su «gatto»"]
        asked = len(endpoint.requests)
        assert main([*command, *llm]) == 0 and len(endpoint.requests) == asked  # the ledger answers
        capsys.readouterr()
        command = [
            "explainita",
            "predict",
            str(two),
            str(tmp_path / "o2.parquet"),
            rare,
            "--task",
            "2",
            "--judge",
            "llm",
        ]
        assert main([*command, *llm]) == 0
        assert json.loads(capsys.readouterr().out)["unanswered"] == 1
    answers = read_split(tmp_path / "o2.parquet", 2)
    assert [[s.activating for s in latent.sequences] for latent in answers] == [[True, False, True], [False]]
    assert all("activating" not in str(passages(str(body))) for body in endpoint.requests)
    gold = read_split(jsonl_of(tmp_path / "g.jsonl", [task2_row(8, [1, 0, 1]), task2_row(9, [0])]), 2)
    with pytest.raises(Exception, match="is another one"):
        evaluate_sequences(answers, gold)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["t1.jsonl", "out.csv", "--task", "1"], "a .jsonl or a .parquet file"),
        (["nowhere.jsonl", "out.jsonl", "--task", "1"], "does not exist"),
        (["t1.jsonl", "out.jsonl", "--task", "2"], "row 0 is not as task 2"),
        (["t1.jsonl", "out.jsonl", "--task", "1", "--explainer", "llm"], "an LLM needs --endpoint"),
        (["empty.jsonl", "out.jsonl", "--task", "1"], "holds no rows"),
        (["twice.jsonl", "out.jsonl", "--task", "1"], "is there twice"),
        (["t1.jsonl", "t1.jsonl", "--task", "1"], "a file of its own"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(tmp_path, capsys, arguments, words):
    row = marked_row(1, ["il <<gatto>>"])
    jsonl_of(tmp_path / "t1.jsonl", [row])
    jsonl_of(tmp_path / "empty.jsonl", [])
    jsonl_of(tmp_path / "twice.jsonl", [row, row])
    assert main(["explainita", "predict", *(str(tmp_path / a) if "." in a else a for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out.jsonl").exists()
