"""What goes wrong between a name and its files, in one line that says what to do."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from sae_italian.base.errors import DataError, UsageError

Failure = UsageError


def causes(error: BaseException) -> list[BaseException]:
    """Return the error and everything it came from, outermost first."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def explain(error: BaseException, name: str, revision: str | None = None, *, repo_id: str | None = None) -> Failure:
    """Return the UsageError (DataError for damaged files) that says what to do about a failed load of `name`.

    `repo_id` is the hub's repository when it is not `name` itself.
    """
    repo_id = repo_id or name
    chain = causes(error)
    for explanation in (_disk_full, _damaged, _refused):
        found = explanation(chain, name, repo_id)
        if found is not None:
            return found
    return _not_found(chain, name, repo_id, revision)


def _disk_full(chain: list[BaseException], name: str, _repo_id: str) -> Failure | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    full = next((e for e in chain if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)), None)
    if full is None and not any("no space left" in str(e).lower() for e in chain):
        return None
    place = Path(str(full.filename if full is not None and full.filename else HF_HUB_CACHE))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    return UsageError(
        f"{name} could not be stored: the disk of {place} is full ({free:.1f} GiB free). Free some space, "
        "or set HF_HOME to a folder on a larger disk, and run again: finished files are kept."
    )


def _damaged(chain: list[BaseException], name: str, repo_id: str) -> Failure | None:
    from safetensors import SafetensorError

    text = " ".join(str(e) for e in chain).lower()
    broken = any(isinstance(e, SafetensorError) and "no such file" not in str(e).lower() for e in chain)
    broken = broken or "not a valid json" in text or "consistency check failed" in text or "unexpected eof" in text
    partial = unfinished_downloads(repo_id)
    if not broken and not partial:
        return None
    if partial:
        where, what = partial[0].parent.parent, f"its download has not finished ({partial[0].name})"
    else:
        where, what = cache_folder(repo_id), "one of its files is damaged or only half there"
        if Path(name).is_dir():
            where = Path(name)
    return DataError(
        f"{name} cannot be read: {what}. Download it again with `hf download {repo_id} --force-download`, "
        f"or copy the files into {where} anew."
    )


def _refused(chain: list[BaseException], name: str, repo_id: str) -> Failure | None:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    page = f"https://huggingface.co/{repo_id}"
    text = " ".join(str(e) for e in chain)
    if any(isinstance(e, GatedRepoError) for e in chain) or "gated repo" in text:
        return UsageError(
            f"{name} is gated: accept its terms at {page}, then set HF_TOKEN to a token that may read it."
        )
    status = next(
        (e.response.status_code for e in chain if isinstance(e, HfHubHTTPError) and e.response is not None), None
    )
    if status == 401:
        return UsageError(
            f"{name}: the hub does not know who is asking (401), or {page} does not exist. Check the name; if the page "
            "opens in your browser, accept its terms there and set HF_TOKEN (https://huggingface.co/settings/tokens)."
        )
    if status == 403:
        return UsageError(
            f"{name}: the hub refuses this token (403). Accept the terms at {page}, and set HF_TOKEN to a token with "
            "read access to gated repositories (https://huggingface.co/settings/tokens)."
        )
    return None


def _not_found(chain: list[BaseException], name: str, repo_id: str, revision: str | None) -> Failure:
    from huggingface_hub.errors import (
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    text = " ".join(str(e) for e in chain).lower()
    pinned = f" --revision {revision}" if revision else ""
    if has(RevisionNotFoundError) or "not a valid git identifier" in text:
        return UsageError(f"{name} has no revision {revision!r}; see https://huggingface.co/{repo_id}/commits/main.")
    if has(RepositoryNotFoundError):
        return UsageError(f"{name} is not on the hub, or is private: check the name, or set HF_TOKEN.")
    if has(RemoteEntryNotFoundError):
        return UsageError(f"{name}: {_first_line(chain[0])} See https://huggingface.co/{repo_id}/tree/main.")
    if has(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) or "offline" in text or "connect" in text:
        return UsageError(
            f"{name} is not on this machine and the hub cannot be reached. Where there is a network, run "
            f"`hf download {repo_id}{pinned} --local-dir FOLDER`, and give FOLDER here instead of the name; "
            f"or download without --local-dir and copy {cache_folder(repo_id).name} into {cache_folder(repo_id).parent}."
        )
    return UsageError(f"{name} could not be loaded: {_first_line(chain[0])}")


def _first_line(error: BaseException) -> str:
    return f"{next(iter(str(error).splitlines()), type(error).__name__):.300}"


def cache_folder(repo_id: str) -> Path:
    """Return where the Hugging Face cache keeps a repository, whether it is there or not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"


def unfinished_downloads(repo_id: str) -> list[Path]:
    """Return the files of a repository that the cache holds only in part."""
    folder = cache_folder(repo_id) / "blobs"
    return sorted(folder.glob("*.incomplete")) if folder.is_dir() else []
