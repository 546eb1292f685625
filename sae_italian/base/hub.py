"""What goes wrong between a name and its files on the Hugging Face hub, in one line that says what to do."""

from __future__ import annotations

from pathlib import Path

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import disk_full, free_space

TOKENS_PAGE = "https://huggingface.co/settings/tokens"


def explain(error: BaseException, name: str, revision: str | None = None, *, repo_id: str | None = None) -> UsageError:
    """Return the UsageError (DataError for damaged files) that says what to do about a failed load of `name`.

    `repo_id` is the hub's repository when it is not `name` itself.
    """
    repo_id = repo_id or name
    chain: list[BaseException] = []  # the error and everything it came from, outermost first
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    full = next((each for each in chain if disk_full(each)), None)
    if full is not None:
        from huggingface_hub.constants import HF_HUB_CACHE

        place = Path(str(getattr(full, "filename", None) or HF_HUB_CACHE))
        return UsageError(
            f"{name} could not be stored: the disk of {place} is full ({free_space(place)} free). Free some space, "
            "or set HF_HOME to a folder on a larger disk, and run again: finished files are kept."
        )
    return _damaged(chain, name, repo_id) or _refused(chain, name, repo_id) or _missing(chain, name, repo_id, revision)


def _damaged(chain: list[BaseException], name: str, repo_id: str) -> UsageError | None:
    from safetensors import SafetensorError

    text = " ".join(str(each) for each in chain).lower()
    signs = ("not a valid json", "consistency check failed", "unexpected eof")
    broken = any(isinstance(each, SafetensorError) and "no such file" not in str(each).lower() for each in chain)
    where = cache_folder(repo_id)
    partial = sorted((where / "blobs").glob("*.incomplete"))
    if partial:
        what = f"its download has not finished ({partial[0].name})"
    elif broken or any(sign in text for sign in signs):
        what = "one of its files is damaged or only half there"
        where = Path(name) if Path(name).is_dir() else where
    else:
        return None
    return DataError(
        f"{name} cannot be read: {what}. Download it again with `hf download {repo_id} --force-download`, "
        f"or copy the files into {where} anew."
    )


def _refused(chain: list[BaseException], name: str, repo_id: str) -> UsageError | None:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    page = f"https://huggingface.co/{repo_id}"
    answers = [each.response for each in chain if isinstance(each, HfHubHTTPError) and each.response is not None]
    status = answers[0].status_code if answers else None
    if any(isinstance(each, GatedRepoError) or "access a gated repo" in str(each) for each in chain):
        what = f" is gated: accept its terms at {page}, then set HF_TOKEN to a token that may read it"
    elif status == 401:
        what = (
            f": the hub does not know who is asking (401), or {page} does not exist. Check the name; if the page "
            f"opens in your browser, accept its terms there and set HF_TOKEN ({TOKENS_PAGE})"
        )
    elif status == 403:
        what = (
            f": the hub refuses this token (403). Accept the terms at {page}, and set HF_TOKEN to a token with "
            f"read access to gated repositories ({TOKENS_PAGE})"
        )
    else:
        return None
    return UsageError(f"{name}{what}.")


def _missing(chain: list[BaseException], name: str, repo_id: str, revision: str | None) -> UsageError:
    from huggingface_hub import errors

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    text = " ".join(str(each) for each in chain).lower()
    first = f"{next(iter(str(chain[0]).splitlines()), type(chain[0]).__name__):.300}"
    page = f"https://huggingface.co/{repo_id}"
    if has(errors.RevisionNotFoundError) or "not a valid git identifier" in text:
        return UsageError(f"{name} has no revision {revision!r}; see {page}/commits/main.")
    if has(errors.RepositoryNotFoundError):
        return UsageError(f"{name} is not on the hub, or is private: check the name, or set HF_TOKEN.")
    if has(errors.RemoteEntryNotFoundError):
        return UsageError(f"{name}: {first} See {page}/tree/main.")
    unreachable = has(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError)
    if unreachable or "offline" in text or "connect" in text:
        pinned, cached = f" --revision {revision}" if revision else "", cache_folder(repo_id)
        return UsageError(
            f"{name} is not on this machine and the hub cannot be reached. Where there is a network, run "
            f"`hf download {repo_id}{pinned} --local-dir FOLDER`, and give FOLDER here instead of the name; "
            f"or download without --local-dir and copy {cached.name} into {cached.parent}."
        )
    return UsageError(f"{name} could not be loaded: {first}")


def cache_folder(repo_id: str) -> Path:
    """Return where the Hugging Face cache keeps a model's repository, whether it is there or not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
