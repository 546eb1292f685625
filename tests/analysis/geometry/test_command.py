"""`sae-italian geometry`: what lands in the folder, and what is refused in one line."""

import json
import shutil

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from sae_italian.autointerp.run import EXPLAINER, STORE_FILE
from sae_italian.autointerp.store import Explanation, Store
from sae_italian.autointerp.work import cache_identity
from sae_italian.cache import FeatureCache
from sae_italian.cli import main


@pytest.fixture(scope="module")
def explained(small_cache, tmp_path_factory):
    """The small cache with one latent explained, in words that HTML must not take for its own."""
    folder = shutil.copytree(small_cache, tmp_path_factory.mktemp("geometry") / "cache")
    with Store(folder / STORE_FILE, cache_identity(FeatureCache.open(folder))) as store:
        text = "su «perché» </script><b>"
        store.add_explanations([Explanation(live(folder), EXPLAINER, "ok", text, "", None)])
    return folder


def live(folder) -> int:
    return int((FeatureCache.open(folder).statistics["count"] > 0).argmax())


def test_a_run_writes_numbers_rows_pictures_and_a_map(trained_sae, topk_sae, explained, tmp_path, capsys):
    topk_sae.save_model(tmp_path / "random")
    out = tmp_path / "out"
    arguments = ["geometry", str(trained_sae), str(tmp_path / "random"), "--cache", str(explained), "--out", str(out)]
    assert main(arguments) == 0
    assert "largest random" in capsys.readouterr().out
    result = json.loads((out / "geometry.json").read_text())
    n_live = int((FeatureCache.open(explained).statistics["count"] > 0).sum())
    assert [item["n_source"] for item in result["within"]] == [n_live, 300]
    assert set(result["between"][0]["new"]) == {"value", "lo", "hi"}
    rows = pyarrow.parquet.read_table(out / "matches.parquet")
    assert rows.num_rows == 2 * (n_live + 300) and set(rows.column_names) >= {"source", "nearest", "cosine"}
    for name in ("matches.svg", "map.svg"):
        assert (out / name).read_text().rstrip().endswith("</svg>")
    page = (out / "map.html").read_text()
    data = json.JSONDecoder().raw_decode(page, page.index("const page = ") + len("const page = "))[0]
    group = data["groups"][0]
    assert group["text"][group["latent"].index(live(explained))] == "su «perché» </script><b>"
    assert page.count("</script>") == 1 and "http" not in page
    assert "![map](map.svg)" in (out / "geometry.md").read_text()


def test_what_never_fired_in_training_takes_no_part(topk_sae, tmp_path, capsys):
    """A dead latent still has the random row that it began with, which says nothing of the SAE."""
    folders = tmp_path / "a", tmp_path / "b"
    for n_live, folder in zip((300, 20), folders, strict=True):
        topk_sae.save_model(folder)
        rates = torch.where(torch.arange(300) < n_live, -2.0, -10.0)
        save_file({"sparsity": rates}, folder / "sparsity.safetensors")
    assert main(["geometry", *map(str, folders), "--out", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [item["n_source"] for item in result["within"]] == [300, 20]
    assert "began as one" in result["notes"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SAE", "SAE"], "given twice"),
        (["SAE", "--above", "2"], "--above is 2.0"),
        (["SAE", "--sample", "0"], "--sample is 0"),
        (["RANDOM", "--cache", "CACHE"], "was built with another SAE"),
    ],
)
def test_bad_input_is_one_line(options, message, trained_sae, topk_sae, small_cache, tmp_path, capsys):
    topk_sae.save_model(tmp_path / "random")
    names = {"SAE": str(trained_sae), "RANDOM": str(tmp_path / "random"), "CACHE": str(small_cache)}
    arguments = ["geometry", *(names.get(option, option) for option in options), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
