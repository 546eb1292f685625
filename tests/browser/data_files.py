"""The page's data files, read back as the page reads them."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sae_italian.browser.write import BITS, FIRST


def read_data(path: Path) -> Any:
    """Return the value of a data file, as the page reads it."""
    text = path.read_bytes().decode("utf-16")
    name, n_bytes, packed = text.removeprefix("saeItalian.receive(").removesuffix(");\n").split(",", 2)
    assert path.with_suffix("").as_posix().endswith(json.loads(name))
    codes = np.frombuffer(packed.strip('"').encode("utf-16-le"), dtype="<u2") - FIRST
    bits = ((codes[:, None] >> np.arange(BITS - 1, -1, -1)) & 1).astype(np.uint8)
    return json.loads(zlib.decompress(np.packbits(bits.ravel()).tobytes()[: int(n_bytes)], -15))
