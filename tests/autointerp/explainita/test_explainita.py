"""ExplainITA: both layouts are read, submissions are written, scores have known answers, a replay finds its SAE."""

import json
import shutil
import sys
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from sae_italian.autointerp.explainita import as_example, as_examples, read_split, write_submission
from sae_italian.autointerp.explainita_tasks import evaluate_explanations, evaluate_sequences, replay
from sae_italian.base.errors import DataError, UsageError
from sae_italian.cli import main
from sae_italian.micro_italiano import documents
from sae_italian.models.activations import read_activations


def task1_row(latent, explanation="verbi al futuro", every=False):
    active = [{"token": "venderanno", "strength": 9}, {"token": "libri", "strength": 2}]
    tokens = ["Si", "venderanno", "dei", "libri", "."]
    listed = {item["token"]: item["strength"] for item in active}
    full = [{"token": token, "strength": listed.get(token, 0)} for token in tokens]
    example = {"text": "Si <<venderanno>> dei libri.", "tokens": tokens, "activations": full if every else active}
    return {"Latent ID": f"layers.14_latent{latent}", "examples": [example], "explanation": explanation}


def task2_row(latent, labels, explanation="verbi", hidden=False):
    examples = [
        {
            "str_tokens": ["Si", "venderanno", "libri"],
            "activations": [-1.0] * 3 if hidden else [0.0, 2.5 if label else 0.0, 0.0],
            "activating": None if hidden else label,
        }
        for label in labels
    ]
    return {"Latent ID": f"layers.14_latent{latent}", "explanation": explanation, "examples": examples}


def folder_of(path, rows, split="test"):
    (path / "data").mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate((rows[:1], rows[1:])):
        if part:
            name = f"{split}-{shard:05}-of-00002.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), path / "data" / name)
    return path


def jsonl_of(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("every", [True, False])
def test_task_1_is_read_from_a_folder_as_on_the_hub(tmp_path, every):
    folder = folder_of(tmp_path / "d", [task1_row(8, every=every), task1_row(65535, None, every=every)], "train_gold")
    one, two = read_split(folder, 1, "train_gold")
    assert (one.id, one.index, one.explanation) == ("layers.14_latent8", 8, "verbi al futuro")
    assert (two.index, two.explanation) == (65535, None)
    passage = one.sequences[0]
    assert passage.text == "Si venderanno dei libri." and passage.strengths.tolist() == [0, 9, 0, 2, 0]
    with pytest.raises(UsageError, match="no split 'test'"):
        read_split(folder, 1, "test")
    examples = as_examples(one)
    assert examples.train[0].marked_text() == "Si <<venderanno>> dei libri." and examples.maximum == 9


def test_task_2_is_read_and_its_test_split_is_hidden(tmp_path):
    path = jsonl_of(tmp_path / "a.jsonl", [task2_row(8, [True, False]), task2_row(9, [True], hidden=True)])
    open_, hidden = read_split(path, 2)
    assert [p.activating for p in open_.sequences] == [True, False]
    assert open_.sequences[0].strengths.tolist() == [0, 2.5, 0]
    assert hidden.sequences[0].strengths is None and hidden.sequences[0].activating is None
    example = as_example(open_.sequences[0])
    assert example.text == "Si venderanno libri" and example.positive and example.spans.tolist()[1] == [3, 13]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"Latent ID": "x"}, "row 0 .* no field 'examples'"),
        (
            {**task2_row(1, [True]), "examples": [{"str_tokens": ["a"], "activations": []}]},
            "1 tokens and 0 activations",
        ),
    ],
)
def test_rows_that_are_not_as_described_are_named(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        read_split(jsonl_of(tmp_path / "bad.jsonl", [row]), 2)
    for identifier in ("x", "layers.14_latent" + "9" * 6_000):
        with pytest.raises(DataError, match="not of the form"):
            _ = read_split(jsonl_of(tmp_path / "id.jsonl", [{**task2_row(1, []), "Latent ID": identifier}]), 2)[0].index
    (tmp_path / "broken.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="cannot be read"):
        read_split(tmp_path / "broken.parquet", 2)
    with pytest.raises(UsageError, match="cannot be fetched from the hub"):
        read_split("colinglab/EXPLAINITA-task2", 2)
    with pytest.raises(UsageError, match="does not exist"):
        read_split("runs/run1.jsonl", 2)


def test_ids_may_be_numbers(tmp_path):
    rows = [{**task2_row(0, [True, False], hidden=True), "Latent ID": number} for number in (0, 7)]
    data = jsonl_of(tmp_path / "d.jsonl", rows)
    assert [(latent.id, latent.index) for latent in read_split(data, 2)] == [("0", 0), ("7", 7)]
    assert main(["explainita", "predict", str(data), str(tmp_path / "o.jsonl"), "--task", "2"]) == 0
    assert [json.loads(line)["Latent ID"] for line in (tmp_path / "o.jsonl").read_text().splitlines()] == [0, 7]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_submission_is_the_test_split_with_the_answers_in(tmp_path, ending):
    rows = [task2_row(8, [True, False], hidden=True), task2_row(9, [True], hidden=True)]
    folder = folder_of(tmp_path / "d", rows)
    out = tmp_path / f"run1.{ending}"
    write_submission(folder, out, 2, {"layers.14_latent8": [1, 0], "layers.14_latent9": [True]})
    again = pyarrow.parquet.read_table(out).to_pylist() if ending == "parquet" else [json.loads(r) for r in out.open()]
    expected = json.loads(json.dumps(rows))
    for row, said in zip(expected, ([True, False], [True]), strict=True):
        for example, answer in zip(row["examples"], said, strict=True):
            example["activating"] = answer
    assert again == expected  # and nothing else has changed
    first = folder_of(tmp_path / "one", [task1_row(8, None)])
    write_submission(first, tmp_path / f"t1.{ending}", 1, {"layers.14_latent8": "è così"})
    assert read_split(tmp_path / f"t1.{ending}", 1)[0].explanation == "è così"
    for answers, words in (
        ({}, "no answer for"),
        ({"layers.14_latent8": [1], "layers.14_latent9": [1]}, "2 examples and 1"),
    ):
        with pytest.raises(UsageError, match=words):
            write_submission(folder, out, 2, answers)


def test_detection_metrics_by_hand(tmp_path):
    gold = read_split(jsonl_of(tmp_path / "g.jsonl", [task2_row(1, [1, 1, 0, 0]), task2_row(2, [1, 0, 0, 0])]), 2)
    run = read_split(jsonl_of(tmp_path / "r.jsonl", [task2_row(2, [1, 1, 0, 0]), task2_row(1, [1, 0, 0, 0])]), 2)
    result = evaluate_sequences(run, gold)
    # hits 2 of 3, false alarms 1 of 5
    value = {name: metric["value"] for name, metric in result.items() if isinstance(metric, dict)}
    assert value["tpr"] == pytest.approx(2 / 3) and value["tnr"] == pytest.approx(0.8)
    assert value["balanced_accuracy"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert value["f1"] == pytest.approx(2 / 3) and value["f1_macro"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert value["balanced_accuracy_by_latent"] == pytest.approx((0.75 + 5 / 6) / 2)
    assert (result["latents"], result["sequences"], result["positive"]) == (2, 8, 3)
    for labels, expected in (([1, 1, 1, 1], 0.5), ([0, 0, 0, 0], 0.5)):
        everything = read_split(jsonl_of(tmp_path / "c.jsonl", [task2_row(i, labels) for i in (1, 2)]), 2)
        assert evaluate_sequences(everything, gold)["balanced_accuracy"]["value"] == expected
    assert evaluate_sequences(gold, gold)["balanced_accuracy"]["value"] == 1.0
    with pytest.raises(UsageError, match="the submission lacks 1 latents, layers.14_latent2"):
        evaluate_sequences(run[1:], gold)
    hidden = read_split(jsonl_of(tmp_path / "h.jsonl", [task2_row(i, [1, 1, 0, 0], hidden=True) for i in (1, 2)]), 2)
    with pytest.raises(UsageError, match="no label for sequence 0"):
        evaluate_sequences(hidden, gold)


def tiny_bert(folder):
    """A BERT of two layers over a dozen words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "verbi",
        "al",
        "futuro",
        "nomi",
        "femminili",
        "plurali",
        "la",
        "parola",
        "dopo",
        "uno",
    ]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return str(folder)


def explained(tmp_path, name, *texts):
    return read_split(jsonl_of(tmp_path / name, [task1_row(i, text) for i, text in enumerate(texts)]), 1)


def test_bertscore_with_a_local_model(tmp_path):
    pytest.importorskip("bert_score", reason="the extra `bertscore` is not installed")
    gold = explained(tmp_path, "g.jsonl", "verbi al futuro", "la parola dopo uno")
    result = evaluate_explanations(gold, gold, model=tiny_bert(tmp_path / "bert"), layer=2)
    assert result["bertscore_f1"]["value"] == pytest.approx(1.0, abs=1e-5) and result["identical"] == 1.0
    worse = explained(tmp_path, "w.jsonl", "nomi femminili", "verbi")
    assert evaluate_explanations(worse, gold, model=str(tmp_path / "bert"), layer=2)["bertscore_f1"]["value"] < 0.99


def test_bertscore_is_asked_for_the_right_pairs(tmp_path, monkeypatch, capsys):
    """With a stand-in for the package: candidates and references in the gold file's order, by latent."""
    asked = {}

    def score(candidates, references, **settings):
        asked.update(settings, pairs=list(zip(candidates, references, strict=True)))
        return tuple(torch.tensor([0.5, 0.7]) for _ in range(3))

    monkeypatch.setitem(sys.modules, "bert_score", types.SimpleNamespace(score=score))
    explained(tmp_path, "g.jsonl", "uno", "due")
    jsonl_of(tmp_path / "r.jsonl", [task1_row(1, "DUE"), task1_row(0, "tre")])
    command = ["explainita", "evaluate", str(tmp_path / "r.jsonl"), str(tmp_path / "g.jsonl"), "--task", "1", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert asked["pairs"] == [("tre", "uno"), ("DUE", "due")]
    assert (asked["model_type"], asked["num_layers"]) == ("bert-base-multilingual-cased", 9)
    assert result["bertscore_f1"]["value"] == pytest.approx(0.6) and result["identical"] == 0.5
    monkeypatch.setitem(sys.modules, "bert_score", None)
    assert main(command) == 2 and "pip install 'sae-italian[bertscore]'" in capsys.readouterr().err


# --- the replay ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_in(mini, topk_sae):
    """Rows of task 2 as Delphi writes them, by the embedded model and a TopK SAE: strings without their spaces."""
    hook = topk_sae.cfg.metadata.hook_name
    texts = [document.text for document in documents(12)]
    windows = [mini.tokenizer(text, add_special_tokens=False)["input_ids"][:32] for text in texts]
    acts = []
    for ids in windows:
        with torch.no_grad():
            acts.append(
                topk_sae.encode(read_activations(mini, torch.tensor([[mini.tokenizer.bos_token_id, *ids]]), hook))[
                    0, 1:
                ]
            )
    busiest = torch.cat(acts).gt(0).sum(0).argsort(descending=True)[:4].tolist()
    return [
        {
            "Latent ID": f"layers.2_latent{latent}",
            "explanation": "x",
            "examples": [
                {
                    "str_tokens": mini.tokenizer.convert_ids_to_tokens(ids),
                    "activations": act[:, latent].tolist(),
                    "activating": bool(act[:, latent].gt(0).any()),
                }
                for ids, act in zip(windows, acts, strict=True)
            ],
        }
        for latent in busiest
    ]


def test_a_replay_finds_the_sae_that_made_the_data(stand_in, mini, topk_sae, tmp_path):
    latents = read_split(jsonl_of(tmp_path / "d.jsonl", stand_in), 2)
    result = replay(latents, topk_sae, mini)
    assert result["latents"] == 4 and result["tokenised_again"] / result["sequences"] > 0.9
    assert result["with BOS"]["replayed"] == 1.0 and result["with BOS"]["correlation"] == pytest.approx(1, abs=1e-4)
    assert result["with BOS"]["relative_error"] < 1e-4 and result["with BOS"]["on_and_off_agree"] > 0.999
    wrong = [types.SimpleNamespace(**{**vars(latent), "index": (latent.index + 1) % 300}) for latent in latents]
    other = replay(wrong, topk_sae, mini)
    assert other["with BOS"]["replayed"] == 0.0
    with pytest.raises(UsageError, match="not a latent of this SAE, which has 300"):
        replay([types.SimpleNamespace(index=300, id="x")], topk_sae, mini)


def test_marked_text_of_task_1_is_replayed_too(stand_in, mini, topk_sae, tmp_path):
    """Whole numbers 0 to 10 and the text with marks, as Delphi rounds them."""
    rows = []
    for row in stand_in:
        top = max(max(example["activations"]) for example in row["examples"])
        examples = []
        for example in row["examples"]:
            tokens = example["str_tokens"]
            strengths = np.ceil(np.array(example["activations"]) * 10 / top).clip(0, 10).astype(int).tolist()
            text = "".join(tokens).replace("▁", " ").strip()
            listed = [{"token": t, "strength": s} for t, s in zip(tokens, strengths, strict=True)]
            examples.append({"text": f"<<{text}>>", "tokens": tokens, "activations": listed})
        rows.append({"Latent ID": row["Latent ID"], "examples": examples, "explanation": "x"})
    latents = read_split(jsonl_of(tmp_path / "d.jsonl", rows), 1)
    result = replay(latents, topk_sae, mini)
    assert 0.97 < result["with BOS"]["correlation"] < 1 and result["with BOS"]["on_and_off_agree"] > 0.99


def test_a_folder_is_read_once_though_copies_lie_beside_its_split(tmp_path):
    """An editor's copy, or the ledger of a submission written there, doubled every latent or could not be read."""
    file = jsonl_of(tmp_path / "test.jsonl", [task2_row(1, [])])
    for name in ("test.jsonl~", "test.jsonl.bak", "test.run1.calls.sqlite"):
        shutil.copy(file, tmp_path / name)
    assert len(read_split(tmp_path, 2)) == 1
