"""What can go wrong between a name and its files: each is one line that says what to do."""

import errno
import shutil

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.hub import explain
from sae_italian.models import load_model, load_model_config
from tests.models.conftest import use_cache

NAME = "sapienzanlp/Minerva-350M-base-v1.0"


def response(status: int) -> httpx.Response:
    return httpx.Response(
        status, request=httpx.Request("GET", f"https://huggingface.co/{NAME}/resolve/main/config.json")
    )


@pytest.mark.parametrize(
    ("cause", "messages"),
    [
        (GatedRepoError("gated", response=response(403)), ["gated", f"https://huggingface.co/{NAME}", "HF_TOKEN"]),
        (GatedRepoError("gated", response=response(401)), ["gated", f"https://huggingface.co/{NAME}", "HF_TOKEN"]),
        (HfHubHTTPError("no", response=response(401)), ["401", f"https://huggingface.co/{NAME}", "HF_TOKEN"]),
        (HfHubHTTPError("no", response=response(403)), ["403", f"https://huggingface.co/{NAME}", "HF_TOKEN"]),
        (RepositoryNotFoundError("no", response=response(404)), ["not on the hub", "HF_TOKEN"]),
        (RevisionNotFoundError("no", response=response(404)), ["no revision 'abc'", "commits"]),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp"), ["full", "GiB free", "HF_HOME"]),
        (ConnectionError("offline"), ["hf download", "--revision abc", "--local-dir"]),
    ],
)
def test_what_is_said(cause, messages, monkeypatch):
    """As transformers raises it: an OSError with the hub's error as its cause."""
    import transformers

    def fail(*_args, **_kwargs):
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            raise cause
        raise OSError("We couldn't load this model") from cause

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(UsageError) as error:
        load_model_config(f"{NAME}@abc")
    text = str(error.value)
    assert all(message in text for message in messages), text
    assert "\n" not in text


def test_an_error_without_a_known_cause_keeps_its_first_line():
    assert "odd things" in str(explain(ValueError("odd things\nmore"), NAME))


def test_offline_with_nothing_cached(empty_hub):
    with pytest.raises(UsageError) as error:
        load_model(NAME)
    text = str(error.value)
    assert f"hf download {NAME}" in text and str(empty_hub) in text and "\n" not in text


def test_a_download_that_has_not_finished(empty_hub):
    blobs = empty_hub / f"models--{NAME.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "0123.incomplete").write_bytes(b"half")
    with pytest.raises(DataError, match="has not finished.*--force-download"):
        load_model(NAME)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_file_that_is_only_half_there(file, hub_cache, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    repo = f"models--{NAME.replace('/', '--')}"
    shutil.copytree(hub_cache / repo, cache / repo)  # links become files
    use_cache(monkeypatch, cache)
    path = next((cache / repo / "snapshots").glob(f"*/{file}"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UsageError, match="damaged or cut short.*--force-download") as error:
        load_model(NAME)
    assert "\n" not in str(error.value)


def test_a_folder_without_weights(tmp_path, mini):
    mini.config.save_pretrained(tmp_path)
    mini.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="safetensors"):
        load_model(str(tmp_path))
