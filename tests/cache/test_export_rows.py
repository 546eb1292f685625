"""A cache as Hugging Face datasets, one row per latent, and back."""

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest

from sae_italian.base.storage import remove
from sae_italian.cache import FeatureCache
from sae_italian.cache.exchange import export_rows
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


def test_an_export_that_was_killed_is_finished(small_cache, exported, tmp_path):
    out = tmp_path / "killed"
    shutil.copytree(exported, out)
    shutil.rmtree(out / "latents")
    (out / ".latents.1.tmp").mkdir()
    (out / "manifest.json").unlink()
    export_rows(small_cache, out, resume=True)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in exported.iterdir())


def test_no_folder_goes_while_a_file_in_it_is_mapped(small_cache, tmp_path, monkeypatch):
    """NFS keeps such a file, and so its folder: to remove that fails, until what maps it is gone."""
    rmtree = shutil.rmtree

    def removed(path, *how, **more):
        if f"{path}/" not in Path("/proc/self/maps").read_text():
            rmtree(path, *how, **more)
        elif not more.get("ignore_errors"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr("shutil.rmtree", removed)
    export_rows(small_cache, tmp_path / "rows", latents=(0, 3))
    copy = shutil.copytree(small_cache, tmp_path / "copy")
    FeatureCache.open(copy).latent(0)
    remove(copy)
    assert not copy.exists()
