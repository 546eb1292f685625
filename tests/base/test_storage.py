import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sae_italian.base import storage
from sae_italian.base.errors import DataError, UsageError, nearest
from sae_italian.base.storage import (
    atomic_path,
    claimed,
    disk_errors,
    fingerprint,
    path_of,
    read_json,
    read_yaml,
    write_text,
)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError), atomic_path(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def claim(out, kind, spec, **how) -> bool:
    with claimed(out, kind, spec, **how) as continuing:
        return continuing


def test_claiming(tmp_path):
    out = tmp_path / "out"
    assert claim(out, "train", {"lr": 1, "sae": {"k": 4}}) is False
    assert claim(out, "train", {"lr": 1, "sae": {"k": 4}}, resume=True) is True
    with pytest.raises(UsageError, match="sae.k was 4, is now 5"):
        claim(out, "train", {"lr": 1, "sae": {"k": 5}}, resume=True)
    with pytest.raises(UsageError, match="not a cache run"):
        claim(out, "cache", {}, resume=True)
    (out / "old.safetensors").write_text("x")
    assert claim(out, "train", {"lr": 2}, overwrite=True) is False
    assert not (out / "old.safetensors").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        claim(tmp_path / "file", "train", {})


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
    assert claim(out, "train", {}) is False
    (out / "acts").mkdir()
    (out / "acts" / ".00000.safetensors.9.tmp").write_text("half")
    assert claim(out, "train", {}, resume=True) is True
    assert not list(out.rglob("*.tmp"))


def test_a_folder_is_held_while_it_is_written_and_the_lock_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with claimed(out, "cache", {}, **how), pytest.raises(UsageError, match="another process"):
            claim(out, "cache", {}, overwrite=True)
        assert [path.name for path in out.iterdir()] == ["run.json"]


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_disk_without_locks_says_which_file_to_remove(tmp_path, monkeypatch):
    def missing(_handle, _how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    out = tmp_path / "out"
    monkeypatch.setattr("fcntl.flock", missing)
    with (
        claimed(out, "cache", {}),
        pytest.raises(UsageError, match=f"another folder; if no process is, remove {out}/.lock."),
    ):
        claim(out, "cache", {}, resume=True)
    assert claim(out, "cache", {}, resume=True) is True  # the lock went with the run


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ],
)
def test_a_full_disk_is_told_from_a_defect(tmp_path, error):
    with pytest.raises(UsageError, match="is full .*GiB free.*--resume"), disk_errors(tmp_path):
        raise error
    with pytest.raises(OSError, match="denied"), disk_errors(tmp_path):
        raise OSError(errno.EACCES, "denied")


def test_overwriting_takes_our_own_files_of_the_same_kind_and_no_other(tmp_path):
    out = tmp_path / "out"
    ours = [
        "sae_weights.safetensors",
        "checkpoints/64/trainer.pt",
        "card.md",
        "checkpoints/.5.tmp",
        "wandb/run-1/files/config.yaml",
    ]
    others = ["thesis.txt", "notes/chapter.md", "tabella.json", "dati.jsonl", "figura.svg", "saes/tool.js"]
    others += ["model/config.json", "model/model.safetensors", "checkpoints/64-copy/trainer.pt", "checkpoints/mine.txt"]
    others += ["cache/run.json", "cache/manifest.json", "cache/autointerp.sqlite", "paid.calls.sqlite"]
    with claimed(out, "train", {"lr": 1}):
        for name in (*ours, *others):
            write_text(out / name, name)
    with (
        pytest.raises(UsageError, match="holds a train run, not a cache run"),
        claimed(out, "cache", {}, overwrite=True),
    ):
        pass
    assert all((out / name).is_file() for name in (*ours, *others))
    with claimed(out, "train", {"lr": 2}, overwrite=True) as continuing:
        assert not continuing
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert left == {"run.json", *others} and not (out / "checkpoints/64").exists()


def test_overwriting_takes_what_is_in_the_runs_that_a_run_is_made_of(tmp_path):
    out, ours = tmp_path / "out", ["sae/run.json", "sae/checkpoints/64/a.pt", "report/data/cards/0001.js"]
    with claimed(out, "quickstart", {}):
        for name in (*ours, "mine/notes.txt"):
            write_text(out / name, name)
    with claimed(out, "quickstart", {}, overwrite=True):
        assert {path.name for path in out.iterdir()} == {"run.json", ".lock", "mine"}


@pytest.mark.parametrize("error", [UsageError, RuntimeError])
def test_a_run_that_failed_before_it_wrote_anything_leaves_its_folder_free(tmp_path, error):
    with pytest.raises(error), claimed(tmp_path / "out", "train", {}):
        raise error("no")
    assert claim(tmp_path / "out", "cache", {}) is False


def test_who_is_killed_while_a_run_is_removed_leaves_what_can_be_overwritten_and_not_resumed(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with claimed(out, "cache", {"n": 1}):
        for name in ("manifest.json", "stats.parquet", "tokens/00000.safetensors", "notes.txt"):
            write_text(out / name, name)
    remove = storage.remove

    def killed(path):
        if path.name == "manifest.json":  # what is removed last
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(storage, "remove", killed)
        claim(out, "cache", {"n": 1}, overwrite=True)
    assert not (out / "tokens").exists()
    with pytest.raises(UsageError, match="use --overwrite"):
        claim(out, "cache", {"n": 1}, resume=True)
    assert claim(out, "cache", {"n": 1}, overwrite=True) is False
    assert {path.name for path in out.iterdir()} == {"run.json", "notes.txt"}


@pytest.mark.parametrize("content", ['{"name": "my own"}', "[]", '{"kind": "train"}', "{", "9" * 6000, "[" * 100_000])
def test_a_foreign_run_json_is_one_line_and_is_kept(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match="holds no run of ours|cannot be read as JSON") as error:
            claim(tmp_path, "train", {}, **how)
        assert "\n" not in str(error.value)
    assert (tmp_path / "run.json").read_text() == content


def test_two_writers_of_one_folder_are_refused_and_a_changeable_setting_may_change(tmp_path):
    out = tmp_path / "out"
    with claimed(out, "train", {"lr": 1, "device": "cpu"}) as continuing:
        assert not continuing
        with pytest.raises(UsageError, match=f"{out} is being written by another process"), claimed(out, "train", {}):
            pass
    with claimed(out, "train", {"lr": 1, "device": "cuda"}, resume=True, changeable=("device",)) as continuing:
        assert continuing and read_json(out / "run.json")["spec"] == {"lr": 1, "device": "cuda"}
    with (
        pytest.raises(UsageError, match="device was .cuda., is now None"),
        claimed(out, "train", {"lr": 1}, resume=True),
    ):
        pass


def test_what_is_written_is_on_the_disk_with_its_name_and_has_the_umasks_rights(tmp_path, monkeypatch):
    from safetensors.numpy import save_file

    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(Path(f"/proc/self/fd/{handle}").readlink()))
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            save_file({}, temporary / "a.safetensors")
        assert [path.name for path in synced] == [temporary.name, "a.safetensors", tmp_path.name]
        assert (tmp_path / "folder" / "a.safetensors").stat().st_mode & 0o777 == 0o640
        with claimed(tmp_path / "out", "train", {}):
            save_file({}, tmp_path / "out" / "b.safetensors")
        assert (tmp_path / "out" / "b.safetensors").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: 1\nb: 2\na: 3\n", "'a' is there twice"), ("s: {k: 1, k: 2}", "'k' is there twice"), ("a: [", "YAML")],
)
def test_yaml_that_repeats_a_key_or_is_damaged_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["[" * 5000 + "]" * 5000, "a: " + "9" * 6000, "\x00"])
def test_deep_yaml_and_endless_numbers_are_one_line(text):
    with pytest.raises(DataError, match="lr= cannot be read as YAML") as error:
        read_yaml(text, "lr=")
    assert "\n" not in str(error.value)
    assert read_yaml("a: {b: [1]}", "lr=") == {"a": {"b": [1]}}


@pytest.mark.parametrize("name", ["9" * 6000, "è" * 200, "~nobody-at-all/x", None, 3])
def test_a_name_that_is_no_path_is_one_short_line(name):
    with pytest.raises(UsageError, match="cannot be looked for") as caught:
        path_of(name)
    assert len(str(caught.value)) < 400 and path_of("~") == Path.home()


def test_what_is_refused_before_anything_is_done_leaves_no_folder(tmp_path):
    with pytest.raises(UsageError, match="no such text"), claimed(tmp_path / "out", "shift", {}):
        raise UsageError("no such text")
    with pytest.raises(UsageError, match="half"), claimed(tmp_path / "half", "shift", {}):
        (tmp_path / "half" / "shift.json").touch()
        raise UsageError("half")
    assert not (tmp_path / "out").exists() and (tmp_path / "half" / "run.json").is_file()
    with pytest.raises(UsageError, match="half"), claimed(tmp_path / "half", "shift", {}, overwrite=True):
        raise UsageError("half")  # the earlier run is gone, nothing is there instead
    assert not [*(tmp_path / "half").iterdir()]
