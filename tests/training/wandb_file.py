"""Read the records of an offline W&B run: a LevelDB log of protocol buffers, in blocks of 32 KiB."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32_768, 7


def payloads(data: bytes):
    assert data[:4] == b":W&B"
    place, parts = HEADER, []
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0 or place + HEADER + length > len(data):  # not written, or only half of it
            break
        parts.append(data[place + HEADER : place + HEADER + length])
        place += HEADER + length
        if kind in (1, 4):  # whole, or the last part of one
            yield b"".join(parts)
            parts = []


class OfflineRun:
    """History rows, the last summary, the config, artifacts, and the run's id of a folder's offline run."""

    def __init__(self, folder: Path):
        from wandb.proto import wandb_internal_pb2

        (self.file,) = folder.rglob("*.wandb")
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.artifacts: list[tuple[str, list[str]]] = []
        self.names: set[str] = set()  # of the artifacts
        self.id = self.group = self.project = self.exit_code = None
        deadline = time.monotonic() + 20  # wandb's own process may still be writing when `finish` returns
        while self.exit_code is None and time.monotonic() < deadline:
            self.rows.clear()
            self.artifacts.clear()
            for payload in payloads(self.file.read_bytes()):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(payload)
                self._take(record, record.WhichOneof("record_type"))
            time.sleep(0.05)

    def _take(self, record: Any, kind: str | None) -> None:
        if kind == "history":
            self.rows.append(_items(record.history.item))
        elif kind == "summary":
            self.summary |= _items(record.summary.update)
        elif kind == "config":
            self.config |= _items(record.config.update)
        elif kind == "run":
            self.id, self.group, self.project = record.run.run_id, record.run.run_group, record.run.project
            self.config |= _items(record.run.config.update)
        elif kind == "exit":
            self.exit_code = record.exit.exit_code
        elif kind in ("artifact", "request"):
            artifact = record.artifact if kind == "artifact" else record.request.log_artifact.artifact
            if artifact.name:
                self.names.add(artifact.name)
                self.artifacts.append((artifact.type, [entry.path for entry in artifact.manifest.contents]))


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
