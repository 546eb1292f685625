"""The files of a corpus: in a local file or folder, a `save_to_disk` folder, or a listing of the hub."""

from __future__ import annotations

import json
from pathlib import Path

from sae_italian.base.errors import UsageError, nearest
from sae_italian.corpora.hub import RemoteFile
from sae_italian.corpora.shards import LOCAL_ENDINGS, READERS, Shard, kind_of

PRETOKENIZED = "progress.json"  # the file that tells a pretokenised folder


def remote_shards(files: list[RemoteFile], source: str) -> list[Shard]:
    shards = [Shard(file.path, file, kind_of(file.path) or "", source) for file in files]
    unknown = next((shard for shard in shards if not shard.kind), None)
    if unknown:
        raise UsageError(f"{unknown} has an unknown ending; expected one of {', '.join(READERS)}.")
    return shards


def local_shards(path: Path, known: list[str]) -> list[Shard]:
    """Return the files of a local corpus, sorted by name; `known` are the names to suggest when there is none.

    Raises: UsageError when the path is neither a file, a folder with text files, nor a `save_to_disk` folder.
    """
    endings = ", ".join(LOCAL_ENDINGS)
    if path.is_file():
        if kind_of(path.name, LOCAL_ENDINGS) is None:
            raise UsageError(f"corpus file {str(path)!r} has an unknown ending; expected one of {endings}.")
        return [_local(path, path.parent)]
    if path.is_dir():
        saved = _saved_to_disk(path)
        if saved:
            return saved
        files = sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file.name, LOCAL_ENDINGS))
        if files:
            return [_local(file, path) for file in files]
        raise UsageError(f"corpus folder {str(path)!r} holds no file ending in {endings}.")
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, siblings) if siblings and path.parent != Path() else nearest(str(path), known)
    raise UsageError(
        f"corpus {str(path)!r} is neither {known[0]!r}, a name of the catalogue, nor a local file or folder. {hint}"
    )


def _local(file: Path, root: Path) -> Shard:
    kind = kind_of(file.name, LOCAL_ENDINGS)
    assert kind is not None
    return Shard(file.relative_to(root).as_posix(), file, kind, file.name.split(".")[0])


def _saved_to_disk(path: Path) -> list[Shard]:
    """Return the arrow files of a `datasets.save_to_disk` folder; of a DatasetDict the training split, else its first."""
    if (path / PRETOKENIZED).is_file():  # ours: the documents beside the tokens
        return [
            Shard(file.name, file, ".parquet", path.resolve().name) for file in sorted(path.glob("documents-*.parquet"))
        ]
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if not splits:
            raise UsageError(f"{path} is a saved DatasetDict without a split.")
        return _saved_to_disk(path / ("train" if "train" in splits else splits[0]))
    if not (path / "state.json").is_file():
        return []
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    names = [item["filename"] for item in state.get("_data_files") or []]
    return [Shard(name, path / name, ".arrow", path.resolve().name) for name in names]
