"""Import what the libraries need and let go of them again: see `tests/fresh.py`, whose processes are forked after this."""

import gc
import sys

import sae_lens.load_model  # noqa: F401
import transformer_lens.model_bridge  # noqa: F401

for _name in [
    name for name in sys.modules if name.partition(".")[0] in ("sae_italian", "sae_lens", "transformer_lens")
]:
    del sys.modules[_name]
gc.collect()
gc.freeze()
