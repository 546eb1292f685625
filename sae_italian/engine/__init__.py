"""Independent units of work, mapped over the processes of one machine or over a Ray cluster.

A unit is a value that can be pickled; the function that does it writes its own file under its final name in one step
(`storage.atomic_path`), so doing a unit twice is harmless and a unit that was cut short leaves nothing. That is all the
engine asks, and all it relies on: there is no scheduler of ours. Who resumes skips the units whose files are there.

Bytes do not depend on the engine or on the number of workers. They can depend on what computes them: another kind of
processor, or another number of torch threads, may round the last bit of a float32 differently.
"""

from sae_italian.engine.units import ENGINES, Engine, map_units

__all__ = ["ENGINES", "Engine", "map_units"]
