"""Write one export: claim its folder, write it latent by latent, check all of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae_italian.autointerp.run import STORE_FILE, token_strings
from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.storage import claim_folder, read_json
from sae_italian.browser.exports import circuit_tracer, neuronpedia_batch, neuronpedia_bulk, wandb_table
from sae_italian.browser.exports.bulk_rows import About
from sae_italian.browser.exports.latents import Latents
from sae_italian.browser.exports.names import Names, names_of, saelens_config
from sae_italian.cache import FeatureCache
from sae_italian.cache.delphi import latent_bounds
from sae_italian.models import load_model_config

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

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

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
    first, last = latent_bounds(cache.manifest, latents)
    wanted = range(first, last + 1)
    called = names_of(cache.manifest, **(names or {}))
    folder = _folder(Path(out), to, called, cache)
    spec = {
        "to": to,
        "manifest": cache.manifest.identity(),
        "latents": [first, last],
        "names": asdict(called),
        "with_sae": sae is not None and model is not None,
    }
    claim_folder(Path(out), "export", spec, resume=resume, overwrite=overwrite)
    source = Latents(cache, token_strings(tokenizer, len(tokenizer)), sae, model)
    with tqdm(total=len(wanted), desc=to, unit="latent", disable=None) as bar:
        if to == "neuronpedia":
            neuronpedia_batch.write(folder, source, called, wanted, bar)
            rows = neuronpedia_batch.check(folder)
        elif to == "neuronpedia-bulk":
            created = read_json(Path(out) / "run.json")["created"]  # a resumed export keeps its date
            config = load_model_config(cache.manifest.model) if model is None else model.config
            about = About(config, saelens_config(sae), created)
            neuronpedia_bulk.write(folder, source, called, wanted, about, _store(cache), bar)
            rows = neuronpedia_bulk.check(folder)
        elif to == "circuit-tracer":
            circuit_tracer.write(folder, source, called, wanted, bar)
            rows = circuit_tracer.check(folder, called.layer, wanted)
        else:
            folder, rows = _wandb(Path(out), cache, tokenizer, source, wanted, project, online)
    bare = to.startswith("neuronpedia") and not source.directions.here
    return Export(to, folder, rows, [NO_DECODER] if bare else [])


def _folder(out: Path, to: str, names: Names, cache: FeatureCache) -> Path:
    if to == "neuronpedia":
        return out / neuronpedia_batch.folder_name(names, cache.manifest)
    if to == "neuronpedia-bulk":
        return out / names.model / names.source
    return out / "features" / names.release if to == "circuit-tracer" else out


def _store(cache: FeatureCache) -> Path | None:
    store = cache.folder / STORE_FILE
    return store if store.is_file() else None


def _wandb(
    out: Path, cache: FeatureCache, tokenizer: Any, source: Latents, wanted: range, project: str, online: bool
) -> tuple[Path, dict[str, int]]:
    from sae_italian.browser.report import open_source
    from sae_italian.browser.write import write_browser

    records = open_source(cache, tokenizer, sae=source.directions.sae, model=source.directions.model)
    table = list(wandb_table.rows(source, records.row, wanted))
    write_browser(out / "browser", records)
    name = f"{cache.manifest.model} {cache.manifest.hook_name}"
    folder = wandb_table.write(out, table, out / "browser", project=project, online=online, name=name)
    return folder, wandb_table.check(table)
