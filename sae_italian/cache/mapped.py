"""Arrays of a safetensors file as views of the file itself: nothing is read before it is touched, slices cost no copy."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import numpy as np

from sae_italian.base.errors import DataError

_DTYPES = {"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4"}


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file, flat and read-only. Raises DataError naming a file that is missing or cut short."""
    try:
        with path.open("rb") as handle:
            data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        arrays = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            arrays[name] = np.frombuffer(data, dtype, (last - first) // dtype.itemsize, begin + first)
        return arrays
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Build the cache again.") from error
