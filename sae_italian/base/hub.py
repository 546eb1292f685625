"""What others' services know us by: what goes wrong between a name and its files on the Hugging Face hub, in one line that
says what to do, and which run and project of W&B an SAE is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import disk_full, read_json, room_on

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
WANDB_FILE = "wandb.json"  # in the folder of a trained SAE
DAMAGED = ("not a valid json", "consistency check failed", "unexpected eof")


def explain(error: BaseException, name: str, revision: str | None = None, *, repo_id: str | None = None) -> UsageError:
    """Return the UsageError (DataError for damaged files) that says what to do about a failed load of `name`.

    `repo_id` is the hub's repository when it is not `name` itself.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from safetensors import SafetensorError

    repo_id, chain = repo_id or name, _chain_of(error)
    if full := next((each for each in chain if disk_full(each)), None):
        place = Path(str(getattr(full, "filename", None) or HF_HUB_CACHE))
        return UsageError(
            f"{name} could not be stored: the disk of {place} is full ({room_on(place) / 2**30:,.1f} GiB free). Free some "
            "space, or set HF_HOME to a folder on a larger disk, and run again: finished files are kept."
        )
    text, cached = " ".join(map(str, chain)).lower(), cache_folder(repo_id)
    broken = any(isinstance(each, SafetensorError) and "no such file" not in str(each).lower() for each in chain)
    partial = sorted((cached / "blobs").glob("*.incomplete"))
    if partial or broken or any(sign in text for sign in DAMAGED):
        unfinished = partial and f"its download has not finished ({partial[0].name})"
        where = Path(name) if Path(name).is_dir() and not partial else cached
        again = f"Download it again with `hf download {repo_id} --force-download`, or copy the files into {where} anew."
        return DataError(f"{name} cannot be read: {unfinished or 'one of its files is damaged or cut short'}. {again}")
    return UsageError(name + _refusal(chain, repo_id, revision))


def _refusal(chain: list[BaseException], repo_id: str, revision: str | None) -> str:
    """Return what the hub, or the way to it, says no to, and what to do about it."""
    from huggingface_hub import errors

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    text, cached = " ".join(map(str, chain)).lower(), cache_folder(repo_id)
    answers = [each.response for each in chain if isinstance(each, errors.HfHubHTTPError) and each.response is not None]
    status, page = answers[0].status_code if answers else None, f"https://huggingface.co/{repo_id}"
    first = f"{next(iter(str(chain[0]).splitlines()), type(chain[0]).__name__):.300}"
    unreachable = has(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError)
    pinned = f" --revision {revision}" if revision else ""
    if has(errors.GatedRepoError) or "access a gated repo" in text:
        return f" is gated: accept its terms at {page}, then set HF_TOKEN to a token that may read it."
    if status == 401:
        return (
            f": the hub does not know who is asking (401), or {page} does not exist. Check the name; if the page "
            f"opens in your browser, accept its terms there and set HF_TOKEN ({TOKENS_PAGE})."
        )
    if status == 403:
        return (
            f": the hub refuses this token (403). Accept the terms at {page}, and set HF_TOKEN to a "
            f"token with read access to gated repositories ({TOKENS_PAGE})."
        )
    if has(errors.RevisionNotFoundError) or "not a valid git identifier" in text:
        return f" has no revision {revision!r}; see {page}/commits/main."
    if has(errors.RepositoryNotFoundError):
        return " is not on the hub, or is private: check the name, or set HF_TOKEN."
    if has(errors.RemoteEntryNotFoundError):
        return f": {first} See {page}/tree/main."
    if unreachable or "offline" in text or "connect" in text:
        return (
            " is not on this machine and the hub cannot be reached. Where there is a network, run "
            f"`hf download {repo_id}{pinned} --local-dir FOLDER`, and give FOLDER here instead of the name; "
            f"or download without --local-dir and copy {cached.name} into {cached.parent}."
        )
    return f" could not be loaded: {first}"


def _chain_of(error: BaseException | None) -> list[BaseException]:
    """Return the error and everything it came from, outermost first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def cache_folder(repo_id: str) -> Path:
    """Return where the Hugging Face cache keeps a model's repository, whether it is there or not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"


class WandbRun(NamedTuple):
    """The W&B run that trained an SAE: its id, which is its group's name too, and its project, `name` or `entity/name`."""

    id: str | None = None
    project: str = "sae-italian"

    @classmethod
    def of(cls, sae: str | Path) -> WandbRun:
        """Return that of a trained SAE's folder; without an id where there was none."""
        file = Path(sae) / WANDB_FILE
        return cls(**read_json(file)) if file.is_file() else cls()

    def joined(self, out: Path) -> dict[str, Any]:
        """Return what `wandb.init` is told for another run of the same project and group, kept below the folder `out`."""
        entity, _, project = self.project.rpartition("/")
        where = {"project": project, "entity": entity or None, "group": self.id}
        return {**where, "config": {"training_run": self.id}, "dir": str(out.resolve())}
