"""Independent units of work, mapped over the processes of one machine or over a Ray cluster.

A unit is a value that can be pickled; the function that does it writes its own file under its final name in one step
(`storage.atomic_path`), so doing a unit twice is harmless and a unit that was cut short leaves nothing. That is all the
engine asks, and all it relies on: there is no scheduler of ours. Who resumes skips the units whose files are there.

Bytes do not depend on the engine or on the number of workers. They can depend on what computes them: another kind of
processor, or another number of torch threads, may round the last bit of a float32 differently.

On paper: a cache of 65,536 latents over 1 B tokens (1e9), k = 64, contexts of 256, so 64e9 non-zeros in 7,630 shards.

    files       bytes                                                         all
    tokens/     16 a token (2 id, 4 document, 4 + 4 span, 2 run), text ~5     21 GB
    acts/       4 a non-zero (2 latent, 2 value), 4 a token                   260 GB
    runs/       6 a non-zero (4 row, 2 value), 0.5 MB a shard; temporary      388 GB
    latents/    6 a non-zero (4 position, 2 value)                            384 GB
    peak 1.05 TB, 0.67 TB when finished (Delphi's format: 14 a non-zero, 8 a token and split: 0.9 TB and 8 GB a split)

Passes: the text is tokenised once, by the process that starts the build (at 0.5 M tokens a second, 33 minutes); the
model and all SAEs see every token once (7,630 units of 131,072 tokens: read 0.3 MB, write 85 MB); the runs are read once
(3,815 units of 2^24 non-zeros, each a slice of every run: 29 M reads of 13 kB; eight times larger shards,
`--windows-per-shard 4096`, make that 3.6 M of 105 kB); the latent-major files are read once, for the statistics.
Machines: a model of 1 B parameters with d_in 2,048 costs 2e18 FLOP for the forward pass and 2.7e17 for encoding: 16 hours
on one GPU that sustains 40 TFLOP/s in float32, 2 hours on eight. The 1.7 TB that the passes read and write take half an
hour at 1 GB/s, so one storage server keeps up with eight GPUs. A worker holds one shard or one range: under 2 GB
beside model and SAE.
"""

from sae_italian.engine.units import ENGINES, Engine, map_units

__all__ = ["ENGINES", "Engine", "map_units"]
