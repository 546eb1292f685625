"""The pieces of a tokenizer, each by its id: the bytes a piece stands for, and its text."""

from __future__ import annotations

import json
import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def piece_bytes(tokenizer: Any, n: int) -> list[bytes]:
    """Return the bytes that each of the first n ids stands for, a leading space included."""
    backend = tokenizer.backend_tokenizer
    pieces = [backend.id_to_token(i) or f"<{i}>" for i in range(n)]
    if not _metaspace(backend):
        letters = byte_letters()
        return [
            bytes(letters[letter] for letter in piece) if set(piece) <= letters.keys() else piece.encode()
            for piece in pieces
        ]
    return [
        bytes([int(match[1], 16)]) if (match := _BYTE.fullmatch(piece)) else piece.replace("▁", " ").encode()
        for piece in pieces
    ]


def piece_texts(tokenizer: Any, n: int) -> list[str]:
    """Return the text of each of the first n ids, a leading space kept; bytes that are no text show as <0x..>."""
    backend = tokenizer.backend_tokenizer
    if _metaspace(backend):
        return [(backend.id_to_token(i) or f"<{i}>").replace("▁", " ") for i in range(n)]
    # byte-level: half a letter shows as a dot
    return [piece.decode("utf-8", "replace").replace("\ufffd", "·") for piece in piece_bytes(tokenizer, n)]


def _metaspace(backend: Any) -> bool:
    state = json.loads(backend.to_str())
    told = str(state.get("pre_tokenizer")) + str(state.get("normalizer"))
    return bool(state["model"].get("byte_fallback", False)) or "▁" in told


def byte_letters() -> dict[str, int]:
    """Return the byte behind each letter of byte-level BPE (GPT-2's table: printable bytes are themselves)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
