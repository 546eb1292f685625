import contextlib
import resource
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from sae_italian.base.errors import DataError, UsageError
from sae_italian.training.logging import RunLog, read_metrics
from sae_italian.training.loop import HOPELESS_AFTER, Loop

BIG = 4_000_000


def write_small(folder):
    folder.mkdir(exist_ok=True)
    (folder / "state.bin").write_text("good")


class Part:
    """A run, or the stream, that is what `write` writes and `read` reads."""

    def __init__(self, write=write_small, read=lambda folder: None):
        self.save, self.load = write, read
        self.spec, self.n_tokens, self.log = None, 1, self

    def check(self):
        pass

    def gather(self, whole):
        pass

    def checkpoint(self, folder, n_tokens):
        assert (folder / "state.bin").is_file()


def loop_of(out, n_tokens=1, **part):
    loop = Loop({"sae": Part(**part)}, Part(write=lambda folder: None), out)
    loop.first.n_tokens = n_tokens
    return loop


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
    loop_of(tmp_path).save()

    def write_big(folder):
        folder.mkdir()
        write(folder)

    with files_end_at(100_000), pytest.raises(UsageError, match="GiB free.*checkpoints/1. Make room") as error:
        loop_of(tmp_path, 2, write=write_big).save()
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert (tmp_path / "checkpoints/1/sae/state.bin").read_text() == "good"


def test_a_defect_is_not_called_a_full_disk(tmp_path):
    def broken(folder):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        loop_of(tmp_path, write=broken).save()


def test_a_start_that_does_not_fit_is_said_once_and_with_what_helps(tmp_path):
    told = []
    bar = SimpleNamespace(write=lambda text, file: told.append(text))

    def after(*looks, steps=HOPELESS_AFTER + 1, warm_up=5, **sae):
        """What is said at the last look; a look is the explained variance and how many of 300 latents are dead."""
        loop = loop_of(tmp_path)
        loop.first.spec = SimpleNamespace(sae={"d_sae": 300, **sae}, lr_warm_up_steps=warm_up)
        loop.first.n_steps = steps
        for explained, dead in looks:
            told.clear()
            loop._warn_of_the_start(bar, "sae", explained, dead)
        return told[0] if told else ""

    assert not after((0.5, 200)) and not after((0.5, 250), (0.5, 249)) and not after((0.0, 0))
    assert not after((-0.5, 0), steps=HOPELESS_AFTER) and not after((-0.5, 0), warm_up=HOPELESS_AFTER + 1)
    dying = after((0.5, 190), (0.5, 201))
    assert "explained variance 0.50, 201 of 300 latents dead and more with every step" in dying and "Lower lr" in dying
    assert "0 of 300 latents dead. It does not fit" in after((-0.5, 0))
    assert "Set sae.start=mean." in after((-0.5, 0), start="zero") and not after((-0.5, 0), (-0.5, 0))


def test_only_the_last_is_kept_and_read(tmp_path):
    (tmp_path / "checkpoints" / "²").mkdir(parents=True)  # somebody's
    loop_of(tmp_path, read=pytest.fail).resume()
    for n in (9, 10, 100):
        loop = loop_of(tmp_path, n)
        loop.save()
        assert 0 <= time.monotonic() - loop.saved_at < 60  # from when the minutes to the next are counted
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"100", "²"}
    (tmp_path / "checkpoints" / "99").mkdir()  # of before, left by a kill
    read = []
    loop_of(tmp_path, read=read.append).resume()
    assert read == [tmp_path / "checkpoints" / "100" / "sae"]


def test_a_signal_before_the_first_step_and_a_second_one_stop_at_once(tmp_path):
    loop = loop_of(tmp_path)
    loop.first.n_steps = 0
    with pytest.raises(KeyboardInterrupt, match="no step was done yet; --resume starts"):
        loop._ask_to_stop(2, None)
    loop.first.n_steps = 1
    loop._ask_to_stop(2, None)  # saves after the step
    with pytest.raises(KeyboardInterrupt, match="at once; --resume continues from the last checkpoint"):
        loop._ask_to_stop(2, None)


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    loop_of(tmp_path).save()
    with pytest.raises(DataError, match="checkpoints/1 cannot be read"):
        loop_of(tmp_path, read=lambda folder: torch.load(folder / "state.bin")).resume()


def test_the_random_state_is_restored(tmp_path):
    loop_of(tmp_path).save()
    expected = torch.rand(3)
    torch.manual_seed(12345)
    loop_of(tmp_path).resume()
    assert torch.equal(torch.rand(3), expected)


def test_metrics_are_cut_at_the_step_that_is_continued_and_at_a_broken_line(small_spec, tmp_path):
    file, log = tmp_path / "metrics.jsonl", RunLog(small_spec, tmp_path)
    for step in (0, 10, 20, 30):
        log({"loss": 1.0}, step)
    with file.open("a") as handle:
        handle.write('{"step": 1')
    assert [row["step"] for row in read_metrics(file)] == [0, 10, 20, 30]
    log.cut(25)
    assert file.read_text() == "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in (0, 10, 20))
