import contextlib
import resource

import pytest
import torch
from safetensors.torch import save_file

from sae_italian.base.errors import DataError, UsageError
from sae_italian.training.checkpoint import Checkpoints, append_metrics, cut_metrics, read_metrics

BIG = 4_000_000


def write_small(folder):
    (folder / "state.bin").write_text("good")


@contextlib.contextmanager
def files_end_at(n_bytes):
    """Let every write beyond `n_bytes` of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "a.bin").write_bytes(bytes(BIG)),
        lambda folder: torch.save({"a": torch.zeros(BIG)}, folder / "a.pt"),
        lambda folder: torch.save({"a": torch.zeros(BIG)}, str(folder / "a.pt")),
        lambda folder: save_file({"a": torch.zeros(BIG)}, folder / "a.safetensors"),
    ],
    ids=["python", "torch", "torch by name", "safetensors"],
)
def test_a_full_disk_keeps_the_old_checkpoint_and_says_so_in_one_line(tmp_path, write):
    checkpoints = Checkpoints(tmp_path, "spec")
    checkpoints.save(1, write_small)
    with files_end_at(100_000), pytest.raises(UsageError, match="GiB free.*checkpoints/1. Make room") as error:
        checkpoints.save(2, write)
    assert "\n" not in str(error.value)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["1"]
    assert (checkpoints.folder / "1" / "state.bin").read_text() == "good"


def test_a_defect_is_not_called_a_full_disk(tmp_path):
    def broken(folder):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        Checkpoints(tmp_path, "spec").save(1, broken)


def test_only_the_last_is_kept_and_read(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"lr": 1})
    assert not checkpoints.load(lambda folder: None)
    for n in (9, 10, 100):
        checkpoints.save(n, write_small)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["100"]
    read = []
    assert checkpoints.load(read.append) and read == [tmp_path / "checkpoints" / "100"]


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    Checkpoints(tmp_path, {"lr": 1}).save(1, write_small)
    with pytest.raises(DataError, match="belongs to another config"):
        Checkpoints(tmp_path, {"lr": 2}).load(lambda folder: None)


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, "spec")
    checkpoints.save(1, write_small)
    with pytest.raises(DataError, match="checkpoints/1 cannot be read"):
        checkpoints.load(lambda folder: torch.load(folder / "state.bin"))


def test_the_random_state_is_restored(tmp_path):
    checkpoints = Checkpoints(tmp_path, "spec")
    checkpoints.save(1, write_small)
    expected = torch.rand(3)
    torch.manual_seed(12345)
    checkpoints.load(lambda folder: None)
    assert torch.equal(torch.rand(3), expected)


def test_metrics_are_cut_at_the_step_that_is_continued_and_at_a_broken_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for step in (0, 10, 20, 30):
        append_metrics(file, step, {"loss": 1.0})
    with file.open("a") as handle:
        handle.write('{"step": 1')
    assert [row["step"] for row in read_metrics(file)] == [0, 10, 20, 30]
    cut_metrics(file, 25)
    assert file.read_text() == "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in (0, 10, 20))
