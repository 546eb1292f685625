"""What the page's data look like on disk: a script that hands one deflated JSON value to the page.

The bytes travel as characters of 15 bits each, from U+3400 on, in a UTF-16 file: 7 % more than the bytes themselves where
base64 takes 33 %, and no character among them that a script or a page could read as anything but text.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np

from sae_italian.base.errors import DataError
from sae_italian.browser.schema import Record, fields

FIRST = 0x3400
BITS = 15
LEVEL = 6  # of deflate: 9 takes twice the time for 4 % fewer bytes
LEVELS = 999  # activations of a passage are kept as so many parts of its largest
SCORE_FIELDS = tuple(fields()["score"])
_WEIGHTS = 1 << np.arange(BITS - 1, -1, -1)


def data_script(name: str, value: Any) -> bytes:
    """Return the script `name` (`data/cards/0003`) with a value. Raises: DataError if a number is not finite."""
    deflated = deflate(value)
    head = f'saeItalian.receive("{name}",{len(deflated)},"'.encode("utf-16-le")
    return b"\xff\xfe" + head + characters(deflated) + '");\n'.encode("utf-16-le")


def deflate(value: Any) -> bytes:
    """Return a value as raw deflated JSON. Raises: DataError if a number is not finite."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise DataError(f"a record for the latent browser is not plain JSON: {error}. Use None for no value.") from None
    squeezed = zlib.compressobj(LEVEL, zlib.DEFLATED, -15)
    return squeezed.compress(text.encode("utf-8", "replace")) + squeezed.flush()


def characters(data: bytes) -> bytes:
    """Return bytes as UTF-16 characters of 15 bits each."""
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    bits = np.pad(bits, (0, -len(bits) % BITS)).reshape(-1, BITS)
    return (bits @ _WEIGHTS + FIRST).astype("<u2").tobytes()


# --- cards -----------------------------------------------------------------------------------------------------------


class ShardDocuments:
    """The sources and ids of a shard's documents, each once; passages name them by number."""

    def __init__(self) -> None:
        self.number: dict[tuple[str, str], int] = {}

    def __call__(self, context: Record) -> int:
        return self.number.setdefault((context["source"], context["doc_id"]), len(self.number))


def pack_card(card: Record, documents: ShardDocuments) -> dict[str, Any]:
    """Return a card as it lies on disk: short numbers, and passages as text with spans."""
    packed: dict[str, Any] = {**card}
    for name in ("histogram", "logits"):
        packed[name] = {"edges": [short(edge, 4) for edge in card[name]["edges"]], "counts": card[name]["counts"]}
    for name in ("promoted", "suppressed", "tokens", "decoder", "cofiring", "labels"):
        packed[name] = [{key: short(value) for key, value in item.items()} for item in card[name]]
    packed["positions"] = [short(share) for share in card["positions"]]
    packed["scores"] = {name: [short(score[name]) for score in card["scores"]] for name in SCORE_FIELDS}
    packed["groups"] = [
        {
            **group,
            "lo": short(group["lo"], 4),
            "hi": short(group["hi"], 4),
            "contexts": [_pack_context(context, documents) for context in group["contexts"]],
        }
        for group in card["groups"]
    ]
    return packed


def short(value: Any, digits: int = 3) -> Any:
    """Return a fraction with so many digits; anything else as it is."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def _pack_context(context: Record, documents: ShardDocuments) -> list[Any]:
    """Return [document, largest, text, [characters since the last span, length, activation, ...]]."""
    spans: list[int] = []
    since = 0
    for text, activation in context["segments"]:
        length = len(text.encode("utf-16-le", "surrogatepass")) // 2  # as JavaScript counts
        if activation > 0:
            level = max(1, round(LEVELS * activation / context["max"])) if context["max"] > 0 else LEVELS
            spans += [since, length, level]
            since = 0
        else:
            since += length
    text = "".join(text for text, _ in context["segments"])
    return [documents(context), short(context["max"], 4), text, spans]
