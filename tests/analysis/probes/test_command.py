"""`sae-italian language`: on a cache its labels go into the store; bad input is one line."""

import json
import re
import shutil

import pytest

from sae_italian.analysis import treebank as treebank_module
from sae_italian.autointerp.run import STORE_FILE
from sae_italian.autointerp.store import Store
from sae_italian.cache import FeatureCache
from sae_italian.cli import main


def test_labels_and_languages_of_a_cache_go_into_its_store(
    small_cache, trained_sae, jsonl, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(treebank_module, "MICRO_DOCUMENTS", 40)
    folder = shutil.copytree(small_cache, tmp_path / "cache")
    out = tmp_path / "out"
    arguments = ["language", str(folder), "--ud", "micro-italiano", "--tokens", "500", "--out", str(out)]
    assert main([*arguments, "--languages", f"a={jsonl}", f"b={jsonl}"]) == 0
    text = capsys.readouterr().out
    assert "\nUPOS=NOUN  " in text and "shuffled labels" in text and "random twin" in text and "\na  " in text
    result = json.loads((out / "language.json").read_text())
    assert result["words"]["MicroItaliano"]["train"] > 300
    with Store(folder / STORE_FILE, {}) as store:
        labels = store.labels()
    assert labels and f"{len(labels)} labels written" in text
    assert re.search(r"latent and what it detects: \d+ \w+=", text)
    assert {label.source for label in labels} == {"MicroItaliano"}
    n_latents = FeatureCache.open(folder).manifest.d_sae
    assert all(0 <= label.latent < n_latents and label.lo <= label.f1 <= label.hi for label in labels)
    assert json.loads((out / "languages.json").read_text())["a"]["n_latents"] == 0
    assert not (trained_sae / STORE_FILE).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to look for: give --ud"),
        (["--languages", "it=x.jsonl"], "--languages NAME=CORPUS is needed, 2 or more; 1 given"),
        (["--against", "SAE", "--languages", "a=x", "b=y"], "give --ud too"),
        (["--sae", "x", "--ud", "micro-italiano"], "is no cache. Leave it out"),
        (["--ud", "no-such.conllu"], "treebank no-such.conllu does not exist"),
        (["--ud", "BROKEN"], "rotto.conllu, line 2: 3 columns"),
        (["--ud", "micro-italiano", "micro-italiano"], "two treebanks are called MicroItaliano"),
        (["--ud", "micro-italiano", "--against", "OTHER"], "has hook_name 'blocks.2.hook_resid_post', the SAE"),
        (["context_size=4096", "--ud", "micro-italiano"], "the model has 512 positions"),
    ],
)
def test_bad_input_is_one_line(options, message, trained_sae, topk_sae, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(treebank_module, "MICRO_DOCUMENTS", 2)
    (tmp_path / "rotto.conllu").write_text("# text = a\n1\ta\tb\n")
    topk_sae.save_model(tmp_path / "other")
    names = {"SAE": str(trained_sae), "OTHER": str(tmp_path / "other"), "BROKEN": str(tmp_path / "rotto.conllu")}
    arguments = ["language", str(trained_sae), *(names.get(option, option) for option in options)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
