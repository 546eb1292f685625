"""A cache as Hugging Face datasets, one row per latent, and back."""

import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest

from sae_italian.base.errors import DataError, UsageError
from sae_italian.cache import FeatureCache, Manifest, build_cache
from sae_italian.cache.rows import export_rows, import_rows
from sae_italian.cli import main


@pytest.fixture(scope="module")
def exported(small_cache, tmp_path_factory):
    return export_rows(small_cache, tmp_path_factory.mktemp("rows") / "export")


def test_one_row_a_latent(small_cache, exported):
    from datasets import load_from_disk

    cache = FeatureCache.open(small_cache)
    rows = load_from_disk(str(exported / "latents"))
    assert len(rows) == cache.manifest.d_sae and set(cache.statistics) < set(rows.column_names)
    for row in rows.with_format("numpy"):
        position, value = cache.latent(int(row["latent"]))
        assert np.array_equal(row["positions"], position) and np.array_equal(row["values"], value)
        assert row["count"] == len(position)
    windows = load_from_disk(str(exported / "windows")).with_format("numpy")
    assert np.array_equal(windows[7]["tokens"], np.asarray(cache.tokens)[7 * 128 : 8 * 128])
    documents = load_from_disk(str(exported / "documents"))
    assert documents[11]["text"] == cache.document(11).text and documents[11]["doc_id"] == cache.document(11).doc_id


def test_what_comes_back_has_the_same_bytes(small_cache, exported, tmp_path):
    back = import_rows(exported, tmp_path / "back")
    FeatureCache.open(back, check=True)
    first, second = Manifest.load(small_cache), Manifest.load(back)
    assert second.identity() == first.identity() and second.ranges == first.ranges
    assert {**second.files(), "stats.parquet": ""} == {**first.files(), "stats.parquet": ""}
    assert pyarrow.parquet.read_table(back / "stats.parquet").equals(
        pyarrow.parquet.read_table(small_cache / "stats.parquet")
    )
    assert not (back / "runs").exists()


def test_values_beyond_fp16_come_back(mini, topk_sae, tmp_path):
    import copy

    import torch

    loud = copy.deepcopy(topk_sae)
    with torch.no_grad():
        loud.W_enc.mul_(1e6)
    first = build_cache(loud, mini, "micro-italiano", tmp_path / "loud", n_tokens=2000)
    assert Manifest.load(first).n_wide > 0
    second = import_rows(export_rows(first, tmp_path / "rows"), tmp_path / "back")
    assert Manifest.load(second).ranges == Manifest.load(first).ranges


def test_some_latents_only(small_cache, tmp_path, capsys):
    from datasets import load_from_disk

    out = tmp_path / "some"
    command = ["export", str(small_cache), "--to", "datasets", "--out", str(out), "--latents", "10-19"]
    assert main(command) == 0
    assert load_from_disk(str(out / "latents"))["latent"][:] == list(range(10, 20))
    assert main(command) == 2
    assert "already holds a datasets export" in capsys.readouterr().err
    assert main([*command, "splits=3"]) == 2
    assert "datasets takes no splits=" in capsys.readouterr().err
    assert main(["cache", "import", str(out), "--from", "datasets", "--out", str(tmp_path / "x")]) == 2
    assert "10 rows, the SAE 256 latents" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_export_that_was_killed_is_finished(small_cache, exported, tmp_path):
    out = tmp_path / "killed"
    shutil.copytree(exported, out)
    shutil.rmtree(out / "latents")
    (out / ".latents.1.tmp").mkdir()
    (out / "manifest.json").unlink()
    export_rows(small_cache, out, resume=True)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in exported.iterdir())


@pytest.mark.parametrize("name", ["latents", "windows", "documents"])
def test_what_is_damaged_is_named(exported, tmp_path, name):
    from datasets import load_from_disk

    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    shutil.rmtree(folder / name)
    with pytest.raises(DataError, match=f"{name} cannot be read as a dataset"):
        import_rows(folder, tmp_path / "out")
    rows = load_from_disk(str(exported / name))
    rows.remove_columns(rows.column_names[0] if name != "latents" else "positions").save_to_disk(str(folder / name))
    with pytest.raises(DataError, match=f"{name} has no column"):
        import_rows(folder, tmp_path / "out")


def test_what_does_not_fit_its_manifest_is_refused(exported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["n_windows"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="holds 313 windows .* says 314"):
        import_rows(folder, tmp_path / "out")
    (folder / "manifest.json").unlink()
    with pytest.raises(UsageError, match="manifest.json is missing"):
        import_rows(folder, tmp_path / "out")


@pytest.mark.parametrize("step", ["write_activations", "transpose"])
def test_an_import_that_was_killed_is_resumed_to_the_same_bytes(small_cache, exported, tmp_path, monkeypatch, step):
    from sae_italian.cache import imports

    whole, calls = getattr(imports, step), []

    def killed(*arguments):
        calls.append(1)
        if len(calls) > 1 or step == "transpose":
            raise KeyboardInterrupt
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(imports, step, killed)
        with pytest.raises(KeyboardInterrupt):
            import_rows(exported, tmp_path / "back")
    with pytest.raises(UsageError, match="--resume"):
        import_rows(exported, tmp_path / "back")
    import_rows(exported, tmp_path / "back", resume=True)
    assert Manifest.load(tmp_path / "back").ranges == Manifest.load(small_cache).ranges
