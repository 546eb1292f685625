"""A cache's latents in the formats of other tools: claim a folder, write it latent by latent, check all of it.

`fields.yaml` says what every field of every format is and what fills it; `latents.py` makes the facts, `formats.py` the
files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.storage import claimed, read_json
from sae_italian.browser.exports import formats
from sae_italian.browser.exports.fields import FieldCheck
from sae_italian.browser.exports.latents import Facts, Latents, facts_of, names_of
from sae_italian.browser.source import LatentSource
from sae_italian.browser.write import write_browser
from sae_italian.cache import FeatureCache, Manifest
from sae_italian.models import load_model_config

__all__ = ["FORMATS", "Export", "export"]

WRITERS = {
    "neuronpedia": formats.write_batches,
    "neuronpedia-bulk": formats.write_bulk,
    "circuit-tracer": formats.write_features,
}
FORMATS = (*WRITERS, "wandb")
NO_DECODER = (
    "logit histograms, neuron alignment and correlated neurons: the SAE or its model is not at hand (give --sae)"
)


class Export(NamedTuple):
    """What was written: the folder, how many rows of each table fit, and what could not be filled."""

    to: str
    folder: Path
    rows: dict[str, int]
    lost: list[str]

    def text(self) -> str:
        counts = ", ".join(f"{n:,} {name}" for name, n in self.rows.items())
        lines = [f"written: {self.folder}", f"checked against the table of fields: {counts}"]
        return "\n".join([*lines, *(f"left empty: {what}" for what in self.lost)])


def export(
    cache: FeatureCache,
    tokenizer: Any,
    out: str | Path,
    to: str,
    *,
    sae: Any = None,
    model: Any = None,
    latents: tuple[int, int] | None = None,
    names: dict[str, Any] | None = None,
    project: str = "sae-italian",
    online: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> Export:
    """Write a cache's latents (first, last, inclusive; default all) into `out` in another tool's format, and check it.

    `to` is one of FORMATS. `names` are `model`, `source_set`, `suffix`, `creator` and `creator_name` for Neuronpedia.
    `sae` and `model` fill what is read off the weights; without them these fields are empty and named in `lost`.
    Raises: UsageError for another format, names that Neuronpedia refuses, latents that are not there, and a folder that
    holds something else; DataError when what was written does not fit the table of fields.
    """
    if to not in FORMATS:
        raise UsageError(f"{to!r} is no format for an export. {nearest(to, FORMATS)}")
    out, manifest = Path(out), cache.manifest
    first, last = manifest.latent_bounds(latents)
    called, wanted = names_of(manifest, **(names or {})), range(first, last + 1)
    here = sae is not None and model is not None
    spec = {"to": to, "manifest": manifest.identity(), "latents": [first, last], "names": called, "with_sae": here}
    with claimed(out, "export", spec, resume=resume, overwrite=overwrite):
        source = Latents(LatentSource(cache, tokenizer, sae=sae, model=model), model)
        with tqdm(total=len(wanted), desc=to, unit="latent", disable=None) as bar:
            if to == "wandb":
                return Export(to, *_wandb(out, source, wanted, project, online), [])
            config = None if to != "neuronpedia-bulk" else model.config if model else load_model_config(manifest.model)
            facts = facts_of(manifest, called, config, sae)
            facts["created"] = read_json(out / "run.json")["created"]  # a resumed export keeps its date
            folder = _folder(out, to, facts, manifest)
            WRITERS[to](formats.ExportTask(folder, source, facts, wanted, bar))
        rows = formats.check_folder(folder, to, len(wanted))
        return Export(to, folder, rows, [] if here or to == "circuit-tracer" else [NO_DECODER])


def _folder(out: Path, to: str, facts: Facts, manifest: Manifest) -> Path:
    ending = f"_{facts['suffix']}" if facts["suffix"] else ""
    folders = {
        "neuronpedia": f"{facts['model']}_{facts['source_set']}_{manifest.hook_name}_{manifest.d_sae}{ending}",
        "neuronpedia-bulk": f"{facts['model']}/{facts['source']}",
        "circuit-tracer": f"features/{facts['release']}",
    }
    return out / folders[to]


def _wandb(out: Path, latents: Latents, wanted: range, project: str, online: bool) -> tuple[Path, dict[str, int]]:
    table, checked = [formats.wandb_row(latents, latent) for latent in wanted], FieldCheck()
    for row in table:
        checked("wandb_latent", row)
    write_browser(out / "browser", latents.source)
    where = {"project": project, "online": online, "name": latents.source.run()["title"]}
    return formats.log_table(out, table, out / "browser", **where), dict(checked.n_rows)
