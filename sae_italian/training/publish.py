"""Publish an SAE: weights and config by SAELens' own upload call, with the evaluation card, the curves and a model card."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.base.hub import explain
from sae_italian.base.storage import read_json
from sae_italian.evaluation.card import CARD_JSON, CARD_MARKDOWN, DENSITY_PICTURE, read_card
from sae_italian.training.model_card import model_card
from sae_italian.training.run import read_run

WEIGHTS = ("cfg.json", "sae_weights.safetensors")
SAELENS_FILES = (*WEIGHTS, "sparsity.safetensors", "runner_cfg.json")  # what SAELens' call uploads
MODEL_CARD = "README.md"


@dataclass(frozen=True)
class Upload:
    """What is, or would be, uploaded: path in the repository and size in bytes."""

    repo_id: str
    sae_id: str
    private: bool
    files: dict[str, int]
    warnings: tuple[str, ...]
    done: bool

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "url": self.url}

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repo_id}/tree/main/{self.sae_id}"

    def text(self) -> str:
        lines = [f"{size:>14,}  {path}" for path, size in self.files.items()]
        total = f"{sum(self.files.values()):>14,}  bytes in {len(self.files)} files"
        head = f"{'uploaded to' if self.done else 'dry run, nothing sent: would go to'} {self.repo_id}"
        notes = [f"note: {warning}" for warning in self.warnings]
        use = f'load it with: sae-italian evaluate "{self.repo_id}:{self.sae_id}"' if self.done else ""
        return "\n".join([head + (" (private)" if self.private else ""), *lines, total, *notes, use]).rstrip()


def publish(
    folder: Path,
    repo_id: str,
    *,
    sae_id: str | None = None,
    licence: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> Upload:
    """Upload the SAE in `folder` to the hub repository `repo_id`, below `sae_id` (default: the folder's name).

    A new repository is made, private if asked. Its README.md becomes the SAE's model card; one that is there already is
    left as it is, and every SAE has its own beside its weights. `licence` is the hub's word for that of the weights
    (default: the model's, where the catalogue knows it). With `dry_run` nothing is sent.
    Raises: UsageError for a folder without SAELens' files or without an evaluation card, for a repository that is not
    `owner/name`, without a token, and for what the hub refuses.
    """
    sae_id = sae_id or folder.resolve().name
    _check(folder, repo_id)
    card = read_card(folder)
    if card is None:
        raise UsageError(
            f"{folder} has no evaluation card, and nothing is published without one. "
            f"Make it: sae-italian evaluate {folder} --tokens 1000000 --loss-tokens 100000"
        )
    with tempfile.TemporaryDirectory() as staging:
        extras = _stage(folder, Path(staging), model_card(folder, card, repo_id, sae_id, licence))
        ours = [folder / name for name in SAELENS_FILES if (folder / name).is_file()]
        files = {f"{sae_id}/{file.name}": file.stat().st_size for file in (*ours, *extras)}
        if not dry_run:
            try:
                root = _send(folder, Path(staging), repo_id, sae_id, private)
            except UsageError:
                raise
            except Exception as error:  # the hub's errors are of many kinds; each becomes one line
                raise _refused(error, repo_id) from error
        else:
            root = True
        if root:
            files[MODEL_CARD] = (Path(staging) / MODEL_CARD).stat().st_size
    return Upload(repo_id, sae_id, private, files, _warnings(folder), not dry_run)


def _check(folder: Path, repo_id: str) -> None:
    missing = [name for name in WEIGHTS if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{folder} holds no {' and no '.join(missing)}: give the folder of a finished training.")
    if repo_id.count("/") != 1 or repo_id.startswith(("/", ".", "~")) or repo_id.endswith("/"):
        raise UsageError(f"repository {repo_id!r} is not of the form owner/name, e.g. unipi/minerva-1b-saes.")


def _stage(folder: Path, staging: Path, readme: str) -> list[Path]:
    """Write the model card, and copy card, picture and curves where they are; return the files."""
    from sae_italian.training.curves import compare, plain_svg, read_curve

    (staging / MODEL_CARD).write_text(readme, encoding="utf-8")
    for name in (CARD_JSON, CARD_MARKDOWN, DENSITY_PICTURE, "metrics.jsonl", "run.json"):
        if (folder / name).is_file():
            (staging / name).write_bytes((folder / name).read_bytes())
    if (folder / "metrics.jsonl").is_file():
        try:
            picture = compare(folder).svg()
        except UsageError:  # no recipe to stand beside: the curves alone
            picture = plain_svg(read_curve(folder), folder.resolve().name)
        (staging / "curves.svg").write_text(picture, encoding="utf-8")
    return sorted(staging.iterdir())


def _send(folder: Path, staging: Path, repo_id: str, sae_id: str, private: bool) -> bool:
    """Upload everything; return whether the repository's own README.md was written. Raises: what the hub raises."""
    from huggingface_hub import HfApi, get_token
    from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface

    if get_token() is None:
        raise UsageError(
            "the hub needs to know who you are: run `hf auth login`, or set HF_TOKEN to a token that may write "
            "(https://huggingface.co/settings/tokens)."
        )
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)  # SAELens' call would make it public
    upload_saes_to_huggingface({sae_id: folder}, repo_id, show_progress=False, add_default_readme=False)
    api.upload_folder(
        folder_path=staging,
        path_in_repo=sae_id,
        repo_id=repo_id,
        commit_message=f"Evaluation card and curves of {sae_id}",
    )
    if api.file_exists(repo_id, MODEL_CARD):
        return False
    text = (
        (staging / MODEL_CARD)
        .read_text(encoding="utf-8")
        .replace(f"]({DENSITY_PICTURE})", f"]({sae_id}/{DENSITY_PICTURE})")
    )
    api.upload_file(
        path_or_fileobj=text.encode(),
        path_in_repo=MODEL_CARD,
        repo_id=repo_id,
        commit_message="Model card",
    )
    return True


def _refused(error: Exception, repo_id: str) -> UsageError:
    """Return the hub's refusal in one line, with what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return UsageError(
            f"the hub does not let this token write to {repo_id} ({status}): run `hf auth login` with a token that has "
            "write access to it (https://huggingface.co/settings/tokens)."
        )
    known = explain(error, repo_id, None, repo_id=repo_id)
    return known if isinstance(known, UsageError) else UsageError(f"{repo_id}: {error}")


def _warnings(folder: Path) -> tuple[str, ...]:
    """Return what others would stumble over: local paths where names that everyone has are expected."""
    metadata = read_json(folder / "cfg.json").get("metadata") or {}
    spec = read_run(folder).get("spec") or {}
    named = {
        "model_name": metadata.get("model_name"),
        "dataset_path": metadata.get("dataset_path") or spec.get("corpus"),
    }
    return tuple(
        f"cfg.json's metadata.{key} is the local path {value}; others cannot find it there"
        for key, value in named.items()
        if value and Path(str(value)).is_absolute()
    )
