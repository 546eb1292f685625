"""Publishing, against a stand-in of the hub that keeps what SAELens' upload call and ours send."""

import base64
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import huggingface_hub
import pytest
import yaml

from sae_italian.base.errors import UsageError
from sae_italian.cli import main
from sae_italian.evaluation import evaluate, read_card
from sae_italian.models import catalogue
from sae_italian.saes import load_sae
from sae_italian.training.publish import CURVES, PAGES, TABLES, model_card, publish
from tests import fresh
from tests.training.upload_hub import UploadHub
from tests.training.wandb_server import WandbServer


@pytest.fixture(scope="module")
def judged(trained_sae, mini, tmp_path_factory):
    """A trained SAE with its card."""
    folder = tmp_path_factory.mktemp("judged") / "L1R-2x"
    shutil.copytree(trained_sae, folder)
    evaluate(load_sae(folder), mini, "micro-italiano", n_tokens=1000, name="L1R-2x").save(folder)
    return folder


@pytest.fixture
def hub(monkeypatch):
    hub = UploadHub()
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield hub
    hub.close()


def test_what_is_published(judged, hub):
    upload = publish(judged, "me/saes", private=True)
    assert hub.private == {"me/saes": True} and hub.tokens <= {"Bearer hf_test", ""}
    sent = hub.files["me/saes"]
    assert set(sent) == set(upload.files)
    names = "cfg.json sae_weights.safetensors sparsity.safetensors runner_cfg.json card.json card.md density.svg "
    names += "metrics.jsonl run.json curves.svg README.md"
    assert set(sent) == {"README.md", *(f"L1R-2x/{name}" for name in names.split())}
    for name in ("cfg.json", "sae_weights.safetensors", "card.json"):
        assert sent[f"L1R-2x/{name}"] == (judged / name).read_bytes()
    assert {path: len(content) for path, content in sent.items() if "README" not in path} == {
        path: size for path, size in upload.files.items() if "README" not in path
    }
    assert "Upload SAE L1R-2x" in [summary for _, summary in hub.commits]  # SAELens' own call
    assert (
        "](L1R-2x/density.svg)" in sent["README.md"].decode() and "](density.svg)" in sent["L1R-2x/README.md"].decode()
    )


def test_the_model_card_says_what_the_hub_reads(judged, hub):
    publish(judged, "me/saes")
    text = hub.files["me/saes"]["README.md"].decode()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "saelens" and front["language"] == ["it"] and front["license"] == "mit"
    tags = {"sparse-autoencoder", "sae", "saelens", "sae-italian", "mechanistic-interpretability", "topk"}
    assert tags <= set(front["tags"]) and "explained_variance" in front["metrics"]
    ((_, picture),) = [(shown["text"], shown["output"]["url"]) for shown in front["widget"]]
    assert hub.files["me/saes"][picture].startswith(b"<?xml") and picture == "L1R-2x/density.svg"
    results = {row["type"]: row["value"] for row in front["model-index"][0]["results"][0]["metrics"]}
    assert results["l0"] == 8 and "dead" in results
    assert huggingface_hub.ModelCard(text).data.library_name == "saelens"  # parsed as the hub does
    assert "(topk) con 256 latenti" in text and "addestrato su 20.480 token di `micro-italiano`" in text
    assert "sparse autoencoder (topk) of 256 latents" in text
    assert "trained on 20,480 tokens of `micro-italiano`" in text
    assert "Varianza spiegata, centrata" in text and 'SAE.from_pretrained("me/saes", "L1R-2x")' in text


def test_base_model_and_datasets_are_named_when_the_hub_has_them(judged, tmp_path):
    card = read_card(judged)
    assert card is not None
    real = replace(card, model="sapienzanlp/Minerva-1B-base-v1.0", corpus="gsarti/clean_mc4_it")
    front = yaml.safe_load(model_card(judged, real, "me/saes", "x").split("---")[1])
    assert front["base_model"] == "sapienzanlp/Minerva-1B-base-v1.0" and front["datasets"] == ["gsarti/clean_mc4_it"]
    assert front["license"] == "apache-2.0"
    local = yaml.safe_load(model_card(judged, card, "me/saes", "x", "cc-by-4.0").split("---")[1])
    assert "base_model" not in local and "datasets" not in local and local["license"] == "cc-by-4.0"


def test_the_licence_of_every_model_is_one_of_the_hubs_words(judged):
    """It refuses others, after the weights were sent. Its list: https://huggingface.co/docs/hub/repositories-licenses"""
    card = read_card(judged)
    assert card is not None
    texts = [model_card(judged, replace(card, model=name), "me/saes", "x") for name in catalogue()]
    found = {yaml.safe_load(text.split("---")[1])["license"] for text in texts}
    assert found == {"apache-2.0", "mit", "other"}


def test_a_second_sae_leaves_the_readme_alone(judged, hub):
    publish(judged, "me/saes")
    before = hub.files["me/saes"]["README.md"]
    upload = publish(judged, "me/saes", sae_id="again")
    assert hub.files["me/saes"]["README.md"] == before and "README.md" not in upload.files
    assert "again/sae_weights.safetensors" in hub.files["me/saes"]


def test_a_dry_run_sends_nothing(judged, hub, capsys):
    assert main(["saes", "publish", str(judged), "me/saes", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "nothing sent" in out and f"{(judged / 'sae_weights.safetensors').stat().st_size:,}" in out
    assert not hub.files and not hub.tokens


def test_a_card_is_shown_as_one_line_and_its_density(judged):
    from sae_italian.evaluation import read_card
    from sae_italian.evaluation.card import density_svg

    card = read_card(judged)
    assert card is not None
    assert repr(card).startswith("card of L1R-2x: ") and "L0 8.0" in repr(card) and len(repr(card)) < 250
    (data,) = re.findall(r'src="data:image/svg[+]xml;base64,([^"]*)"', card._repr_html_())
    assert base64.b64decode(data).decode() == density_svg(card)


# --- a report at W&B ----------------------------------------------------------------------------------------------------


def reported(run, server) -> subprocess.CompletedProcess:
    """Ask for a report in a process of its own: W&B's service, and what it was told of its server, outlive a test."""
    given = {
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": "a" * 40,
        "WANDB_MODE": "online",
        "NETRC": str(run / "no-netrc"),
    }
    return fresh.run(["-m", "sae_italian.cli", "report", "wandb", str(run), "--json"], {**os.environ, **given})


@pytest.fixture
def wandb_server():
    pytest.importorskip("wandb_workspaces", reason="needs the sweeps extra")
    server = WandbServer()
    yield server
    server.close()


def test_a_report_is_made_from_our_template(judged, wandb_server, tmp_path):
    """What W&B's API is asked for: one report in the run's project, of the runs of its group, with card, curves and latents."""
    run = shutil.copytree(judged, tmp_path / "L1R-2x")
    (run / "wandb.json").write_text(json.dumps({"id": "ab12cd34", "project": "noi/latenti"}))
    done = reported(run, wandb_server)
    assert done.returncode == 0, done.stderr
    assert "/noi/latenti/reports/SAE-L1R-2x--" in json.loads(done.stdout)["address"]
    asked = dict(wandb_server.calls)["upsertView"]
    assert (asked["entityName"], asked["projectName"], asked["type"]) == ("noi", "latenti", "runs")
    spec = json.loads(asked["spec"])
    grids = [block for block in spec["blocks"] if block["type"] == "panel-grid"]
    assert len(grids) == 2
    for grid in grids:
        (shown,) = grid["metadata"]["runSets"]
        assert shown["project"]["entityName"] == "noi" and "ab12cd34" in json.dumps(shown["filters"])
    whole = json.dumps(spec)
    assert (
        all(json.dumps(key) in whole for key in (*CURVES, *PAGES, *TABLES, "latents", "strongest"))
        and "Evaluation card: L1R-2x" in whole
    )


def test_a_report_without_a_named_entity_is_ones_own_and_a_refusal_is_one_line(judged, wandb_server, tmp_path, capsys):
    run = shutil.copytree(judged, tmp_path / "L1R-2x")
    assert main(["report", "wandb", str(run)]) == 2 and "train with wandb=online" in capsys.readouterr().err
    (run / "wandb.json").write_text(json.dumps({"id": "ab12cd34"}))
    wandb_server.refuse = "the project is locked"
    done = reported(run, wandb_server)
    assert done.returncode == 2 and "W&B made no report in sae-italian" in done.stderr.rstrip().splitlines()[-1]
    assert dict(wandb_server.calls)["upsertView"]["entityName"] == "io"


# --- a browser as a Space ---------------------------------------------------------------------------------------------


def test_a_browser_becomes_a_static_space(small_cache, hub, tmp_path, capsys):
    out = tmp_path / "space"
    arguments = ["browse", str(small_cache), "--out", str(out), "--to-space", "me/latenti"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["space"] == f"{hub.url}/spaces/me/latenti" and hub.made["me/latenti"] == ("space", "static")
    files = {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert hub.files["me/latenti"] == files and {"README.md", "index.html", "assets/app.js"} <= set(files)
    front = huggingface_hub.SpaceCard(files["README.md"].decode()).data
    assert front.sdk == "static" and front.app_file == "index.html" and front.title
    hub.files["me/latenti"]["data/cards/9999.js"] = b"of a larger browser"
    assert main(arguments) == 0  # our own folder, and what is there no more goes from the Space too
    assert hub.files["me/latenti"].keys() == files.keys()
    (out / "README.md").write_text("my notes", encoding="utf-8")
    assert main(arguments) == 2 and "holds 'README.md'" in capsys.readouterr().err


def test_a_space_that_cannot_be_sent_is_written(small_cache, hub, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    out = tmp_path / "space"
    arguments = ["browse", str(small_cache), "--out", str(out), "--to-space", "me/latenti"]
    assert main([*arguments[:-1], "latenti"]) == 2 and "owner/name" in capsys.readouterr().err and not out.exists()
    monkeypatch.delenv("HF_TOKEN")
    assert main(arguments) == 2 and (out / "index.html").is_file() and (out / "README.md").is_file()
    said = capsys.readouterr().err
    assert "hf auth login" in said and f"hf upload me/latenti {out} . --repo-type space" in said
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(arguments) == 2 and "is written and not sent" in capsys.readouterr().err
    assert not hub.files


def test_no_card_no_publication(trained_sae, hub, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(trained_sae, bare, ignore=shutil.ignore_patterns("card*"))
    assert main(["saes", "publish", str(bare), "me/saes", "--dry-run"]) == 2
    assert f"sae-italian evaluate {bare}" in capsys.readouterr().err


def test_no_token_is_one_line(judged, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="hf auth login"):
        publish(judged, "me/saes")
    assert not hub.files


def test_a_token_that_may_not_write(judged, hub):
    hub.refuse = 403
    with pytest.raises(UsageError, match=r"does not let this token write to me/saes \(403\)"):
        publish(judged, "me/saes")


def test_bad_input(judged, tmp_path):
    with pytest.raises(UsageError, match="owner/name"):
        publish(judged, "saes", dry_run=True)
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(UsageError, match="no cfg.json and no sae_weights.safetensors"):
        publish(tmp_path, "me/saes", dry_run=True)


def test_local_paths_in_the_metadata_are_told(judged, tmp_path):
    local = tmp_path / "local"
    shutil.copytree(judged, local)
    cfg = json.loads((local / "cfg.json").read_text())
    cfg["metadata"]["model_name"] = "/home/anna/minerva"
    (local / "cfg.json").write_text(json.dumps(cfg))
    cfg["metadata"]["dataset_path"] = "0.7*/home/anna/leggi.jsonl,0.3*micro-italiano"
    (local / "cfg.json").write_text(json.dumps(cfg))
    told = publish(local, "me/saes", dry_run=True).warnings
    assert any("/home/anna/minerva" in warning for warning in told) and any("leggi.jsonl" in each for each in told)
