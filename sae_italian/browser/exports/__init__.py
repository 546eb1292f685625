"""A cache's latents in the formats of other tools: claim a folder, write it latent by latent, check all of it.

`fields.yaml` says what every field of every format is and what fills it; `latents.py` makes the facts, `formats.py` the
files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae_italian.autointerp.pieces import piece_texts
from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.storage import claimed, read_json
from sae_italian.browser.exports import formats
from sae_italian.browser.exports.fields import FieldCheck
from sae_italian.browser.exports.latents import Facts, Latents, facts_of, model_facts, names_of
from sae_italian.browser.source import LatentSource
from sae_italian.browser.write import write_browser
from sae_italian.cache import FeatureCache, Manifest
from sae_italian.models import load_model_config

__all__ = ["FORMATS", "Export", "export"]

FORMATS = ("neuronpedia", "neuronpedia-bulk", "circuit-tracer", "wandb")
NO_DECODER = (
    "logit histograms, neuron alignment and correlated neurons: the SAE or its model is not at hand (give --sae)"
)


@dataclass(frozen=True)
class Export:
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
    called = names_of(manifest, **(names or {}))
    here = sae is not None and model is not None
    spec = {"to": to, "manifest": manifest.identity(), "latents": [first, last], "names": called, "with_sae": here}
    with claimed(out, "export", spec, resume=resume, overwrite=overwrite):
        source = Latents(cache, piece_texts(tokenizer, len(tokenizer)), sae, model)
        facts, wanted = facts_of(manifest, called), range(first, last + 1)
        with tqdm(total=len(wanted), desc=to, unit="latent", disable=None) as bar:
            if to == "wandb":
                pages = LatentSource(cache, tokenizer, sae=sae, model=model)
                return Export(to, *_wandb(out, pages, source, wanted, project, online), [])
            task = formats.ExportTask(_folder(out, to, facts, manifest), source, facts, wanted, bar)
            if to == "neuronpedia":
                formats.write_batches(task)
                rows = formats.check_batches(task.folder)
            elif to == "neuronpedia-bulk":
                config = load_model_config(manifest.model) if model is None else model.config
                created = read_json(out / "run.json")["created"]  # a resumed export keeps its date
                facts |= {**model_facts(manifest, called, config, sae), "created": created}
                formats.write_bulk(task)
                rows = formats.check_bulk(task.folder)
            else:
                formats.write_features(task)
                rows = formats.check_features(task.folder, facts["layer"], wanted)
        lost = [NO_DECODER] if to != "circuit-tracer" and not here else []
        return Export(to, task.folder, rows, lost)


def _folder(out: Path, to: str, facts: Facts, manifest: Manifest) -> Path:
    if to == "neuronpedia":
        ending = f"_{facts['suffix']}" if facts["suffix"] else ""
        return out / f"{facts['model']}_{facts['source_set']}_{manifest.hook_name}_{manifest.d_sae}{ending}"
    if to == "neuronpedia-bulk":
        return out / facts["model"] / facts["source"]
    return out / "features" / facts["release"]


def _wandb(
    out: Path, source: LatentSource, latents: Latents, wanted: range, project: str, online: bool
) -> tuple[Path, dict[str, int]]:
    table, checked = [], FieldCheck()
    for latent in wanted:
        table.append(formats.wandb_row(latents, source.row(latent)))
        checked("wandb_latent", table[-1])
    rows = checked.finish()
    write_browser(out / "browser", source)
    where = {"project": project, "online": online, "name": source.run()["title"]}
    return formats.log_table(out, table, out / "browser", **where), rows
