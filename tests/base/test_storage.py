import errno

import pytest

from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.storage import atomic_path, claim_folder, disk_errors, fingerprint, locked, write_text


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError), atomic_path(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_claiming(tmp_path):
    out = tmp_path / "out"
    assert claim_folder(out, "train", {"lr": 1, "sae": {"k": 4}}) is False
    assert claim_folder(out, "train", {"lr": 1, "sae": {"k": 4}}, resume=True) is True
    with pytest.raises(UsageError, match="sae.k was 4, is now 5"):
        claim_folder(out, "train", {"lr": 1, "sae": {"k": 5}}, resume=True)
    with pytest.raises(UsageError, match="not a cache run"):
        claim_folder(out, "cache", {}, resume=True)
    (out / "old.bin").write_text("x")
    assert claim_folder(out, "train", {"lr": 2}, overwrite=True) is False
    assert not (out / "old.bin").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        claim_folder(tmp_path / "file", "train", {})


def test_fingerprint_ignores_order_only():
    assert (
        fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1}) != fingerprint({"a": 1, "b": [2, 1]})
    )


def test_nearest():
    assert nearest("lern_rate", ["lr", "learn_rate"]) == "Did you mean 'learn_rate'?"
    assert nearest("zzz", ["a", "b"]) == "Valid: a, b."


def test_what_a_killed_write_left_is_cleared_and_stops_nothing(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".run.json.123.tmp").write_text("{")
    assert claim_folder(out, "train", {}) is False
    (out / "acts").mkdir()
    (out / "acts" / ".00000.safetensors.9.tmp").write_text("half")
    assert claim_folder(out, "train", {}, resume=True) is True
    assert not list(out.rglob("*.tmp"))


def test_a_locked_folder_is_claimed_as_any_other_and_the_lock_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    with locked([out]):
        assert claim_folder(out, "cache", {}) is False
        with pytest.raises(UsageError, match="another build"), locked([out]):
            pass
        assert claim_folder(out, "cache", {}, overwrite=True) is False
        with pytest.raises(UsageError, match="another build"), locked([out]):
            pass
    assert [path.name for path in out.iterdir()] == ["run.json"]


def test_a_full_disk_is_told_from_a_defect(tmp_path):
    with pytest.raises(UsageError, match="is full .*GiB free.*--resume"), disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="denied"), disk_errors(tmp_path):
        raise OSError(errno.EACCES, "denied")
