"""The files of a corpus: in a local file or folder, a `save_to_disk` folder, or a listing of the hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.storage import read_json
from sae_italian.corpora import hub
from sae_italian.corpora.catalogue import Route, catalogue
from sae_italian.corpora.rows import LOCAL_ENDINGS, READERS, TextFile

MICRO_ITALIANO = "micro-italiano"
PRETOKENIZED = "progress.json"  # the file that tells a pretokenised folder of ours


def hub_shards(route: Route, name: str, source: str) -> list[TextFile]:
    """Return the shards of a route of the corpus `name`. Raises: UsageError for a file that cannot be read, as `hub`."""
    commit, sizes = hub.list_files(route, name)
    root = f"{hub.PREFIX}{route.hub}@{commit}"
    return [
        TextFile(path, f"{root}/{path}", _kind(path, READERS, path), source, [size, commit], name)
        for path, size in sizes.items()
    ]


def local_shards(path: Path) -> list[TextFile]:
    """Return the files of a local corpus, sorted by name.

    Raises: UsageError when the path is neither a file, a folder with text files, nor a `save_to_disk` folder.
    """
    endings = ", ".join(LOCAL_ENDINGS)
    if path.is_file():
        return [_local(path, path.parent)]
    if path.is_dir():
        saved = _saved_to_disk(path)
        files = sorted(file for file in path.rglob("*") if file.name.lower().endswith(LOCAL_ENDINGS) and file.is_file())
        if not saved and not files:
            raise UsageError(f"corpus folder {str(path)!r} holds no file ending in {endings}.")
        return saved or [_local(file, path) for file in files]
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    in_a_folder = siblings and path.parent != Path()
    hint = nearest(path.name, siblings) if in_a_folder else nearest(str(path), [MICRO_ITALIANO, *catalogue()])
    raise UsageError(
        f"corpus {str(path)!r} is neither {MICRO_ITALIANO!r}, a name of the catalogue, nor a local file or folder. {hint}"
    )


def _kind(name: str, endings: Iterable[str], shown: str) -> str:
    found = next((ending for ending in READERS if ending in endings and name.lower().endswith(ending)), None)
    if found is None:
        raise UsageError(f"corpus file {shown!r} has an unknown ending; expected one of {', '.join(endings)}.")
    return found


def _local(file: Path, root: Path) -> TextFile:
    kind = _kind(file.name, LOCAL_ENDINGS, str(file))
    return TextFile(file.relative_to(root).as_posix(), str(file), kind, file.name.split(".")[0], file.stat().st_size)


def _saved_to_disk(path: Path) -> list[TextFile]:
    """Return the arrow files of a `datasets.save_to_disk` folder; of a DatasetDict the training split, else its first."""
    if (path / PRETOKENIZED).is_file():  # the documents beside the tokens
        names = sorted(file.name for file in path.glob("documents-*.parquet"))
    elif (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json")["splits"]
        if not splits:
            raise UsageError(f"{path} is a saved DatasetDict without a split.")
        return _saved_to_disk(path / ("train" if "train" in splits else splits[0]))
    elif (path / "state.json").is_file():
        names = [item["filename"] for item in read_json(path / "state.json").get("_data_files") or []]
    else:
        return []
    files, source = [path / name for name in names], path.resolve().name
    return [TextFile(file.name, str(file), file.suffix, source, file.stat().st_size) for file in files]
