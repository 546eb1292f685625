"""circuit-tracer's files, W&B's table and artifact, and the command."""

import json
import shutil
import time

import pytest

from sae_italian.base.errors import UsageError
from sae_italian.browser.exports import export
from sae_italian.browser.exports.latents import tables
from sae_italian.circuits.show import cantor
from sae_italian.cli import main
from sae_italian.evaluation.card import NUMBERS, EvaluationCard
from tests.browser.exports.field_check import FieldCheck, check_folder, checked


def test_circuit_tracer_finds_each_latent_by_its_cantor_pair(cache, mini, tmp_path):
    done = checked(export(cache, mini.tokenizer, tmp_path / "out", "circuit-tracer", latents=(3, 9)))
    assert sorted(int(file.stem) for file in done.folder.iterdir()) == sorted(cantor(1, i) for i in range(3, 10))
    for latent in range(3, 10):
        row = json.loads((done.folder / f"{cantor(1, latent)}.json").read_text(encoding="utf-8"))
        statistics = cache.latent(latent).statistics
        assert row["index"] == latent and row["act_max"] == pytest.approx(statistics["max"], rel=1e-5)
        assert len(row["top_logits"]) == 10
        for quantile in row["examples_quantiles"]:
            for example in quantile["examples"]:
                assert example["tokens_acts_list"][example["train_token_ind"]] > 0
    file = done.folder / f"{cantor(1, 4)}.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"index": 4', '"index": 5'), encoding="utf-8")
    with pytest.raises(AssertionError, match="twice"):
        check_folder(done.folder, "circuit-tracer", 7)
    file.unlink()
    with pytest.raises(AssertionError, match="6 of 7 latents"):
        check_folder(done.folder, "circuit-tracer", 7)


def test_wandb_gets_the_table_and_the_browser_offline(cache, mini, tmp_path):
    pytest.importorskip("wandb")
    done = export(cache, mini.tokenizer, tmp_path / "out", "wandb", latents=(0, 31))
    (table,) = done.folder.rglob("latents*.table.json")
    found = json.loads(table.read_text(encoding="utf-8"))
    assert found["columns"] == list(tables()["wandb_latent"]["fields"]) and len(found["data"]) == 32
    check = FieldCheck()
    for row in found["data"]:
        check("wandb_latent", dict(zip(found["columns"], row, strict=True)))
    assert (tmp_path / "out" / "browser" / "index.html").is_file()
    (page,) = done.folder.rglob("strongest*.html")
    assert "<table" in page.read_text() and "<script" not in page.read_text()
    file = next(done.folder.glob("*.wandb"))  # written by a process of W&B's own, in its own time
    for _ in range(100):
        if b"latent-browser" in file.read_bytes():
            break
        time.sleep(0.1)
    assert b"latent-browser" in file.read_bytes()


def test_the_command_writes_what_it_says(cache, trained_sae, tmp_path, capsys):
    arguments = ["export", str(cache.folder), "--to", "neuronpedia", "--out", str(tmp_path / "out"), "--latents", "0-7"]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["n_latents"] == 8 and printed["lost"] == []
    assert main(arguments) == 2 and "--resume" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "model_id=Mio Modello"]) == 2
    assert "model_id=" in capsys.readouterr().err


def a_card() -> EvaluationCard:
    number = {"value": 0.5, "lo": 0.4, "hi": 0.6}
    names = dict.fromkeys(("model", "sae", "hook_name", "hook_name_out", "corpus", "split", "created"), "prova")
    sizes = dict.fromkeys(("context_size", "n_tokens", "n_loss_tokens", "n_documents", "d_sae"), 7)
    density = [{"lo": -3.0, "hi": -2.0, "share": number}]
    return EvaluationCard.from_dict({**names, **sizes, **dict.fromkeys(NUMBERS, number), "density": density})


def test_the_model_card_is_that_of_publishing(trained_sae, tmp_path, capsys):
    folder = shutil.copytree(trained_sae, tmp_path / "L1R-2x", ignore=shutil.ignore_patterns("card.*"))
    arguments = ["export", str(folder), "--to", "model-card", "--out", str(tmp_path / "card")]
    assert main(arguments) == 2 and "sae-italian evaluate" in capsys.readouterr().err
    a_card().save(folder)
    assert main([*arguments, "--repository", "io/saes"]) == 0
    text = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n") and "library_name: saelens" in text and "io/saes" in text and "## Italiano" in text
    capsys.readouterr()
    assert main(arguments) == 2 and "use --overwrite." in capsys.readouterr().err  # another repository
    assert main([*arguments, "--repository", "io/saes"]) == 0, "the same one is written again: it takes no --resume"
    assert main(["export", str(tmp_path), "--to", "model-card", "--out", str(tmp_path / "x")]) == 2
    assert main([*arguments, "--overwrite"]) == 0
    (own := tmp_path / "mine" / "README.md").parent.mkdir()
    own.write_text("my thesis")
    assert main([*arguments[:-1], str(own.parent), "--overwrite"]) == 2 and own.read_text() == "my thesis"
    assert main([*arguments[:-1], str(folder)]) == 0 and main([*arguments[:-1], str(folder)]) == 2


def test_only_what_an_export_wrote_is_replaced(cache, mini, tmp_path):
    out, wanted = tmp_path / "out", {"latents": (3, 5)}
    first = export(cache, mini.tokenizer, out, "circuit-tracer", **wanted)
    thesis = first.folder / "tesi.txt"
    thesis.write_text("mia", encoding="utf-8")
    again = export(cache, mini.tokenizer, out, "circuit-tracer", latents=(3, 3), overwrite=True)
    assert thesis.read_text(encoding="utf-8") == "mia"
    assert [file.name for file in again.folder.glob("*.json")] == [f"{cantor(1, 3)}.json"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text('{"name": "not ours"}', encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="no run of ours"):
            export(cache, mini.tokenizer, other, "circuit-tracer", **wanted, overwrite=overwrite)
    assert [file.name for file in other.iterdir()] == ["run.json"]
