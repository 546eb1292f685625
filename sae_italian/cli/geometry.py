"""The command `geometry`: decoder directions within SAEs and between them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.cli.base import Commands, Result, positive


def add_commands(root: Commands) -> None:
    text = "nearest decoder directions within and between SAEs, what is new, what splits, and a map of the latents"
    sub = root.add("geometry", _geometry, text)
    sub.add_argument("sae", nargs="+", help="SAEs' folders, or release:sae_id; all of one model's width")
    sub.add_argument("--out", type=Path, required=True, help="folder for geometry.json, its pictures and the map")
    sub.add_argument(
        "--cache",
        type=Path,
        action="append",
        default=[],
        help="a cache of one of the SAEs: dead latents are left out, explanations shown in the map; may be repeated",
    )
    sub.add_argument("--map", default="pca", choices=("pca", "umap"), help="umap needs umap-learn")
    sub.add_argument("--sample", type=int, help="look at so many latents of each SAE (default: all)")
    sub.add_argument("--above", type=float, help="cosine that makes a neighbour (default: sqrt(12 ln F / D))")
    sub.add_argument("--seed", type=int, default=0)


def _geometry(options: argparse.Namespace) -> Result:
    from sae_italian.analysis.geometry import geometry
    from sae_italian.saes import load_sae

    positive("--sample", options.sample)
    if options.above is not None and not 0 < options.above <= 1:
        raise UsageError(f"--above is {options.above}; a cosine above 0 and at most 1 was expected.")
    saes = {name: load_sae(given) for name, given in zip(short_names(options.sae), options.sae, strict=True)}
    alive, texts = _known(saes, options.cache)
    result = geometry(
        saes,
        alive=alive,
        texts=texts,
        sample=options.sample,
        above=options.above,
        method=options.map,
        seed=options.seed,
    )
    result.save(options.out)
    notes = "".join(f"\nNote: {note}." for note in result.notes)
    return result.as_dict(), "\n".join(result.table()) + notes + f"\nmap: {options.out / 'map.html'}"


def short_names(given: list[str]) -> list[str]:
    """Return the last part of each name, where these differ, else the whole names. Raises: UsageError for a repetition."""
    for name in given:
        if given.count(name) > 1:
            raise UsageError(f"{name} was given twice; an SAE is compared with itself anyway.")
    short = [Path(name).name for name in given]
    return short if len(set(short)) == len(short) else given


def _known(saes: dict[str, Any], caches: list[Path]) -> tuple[dict[str, Any], dict[str, dict[int, str]]]:
    """Return by SAE which latents are alive and their explanations, as far as caches know them."""
    from sae_italian.autointerp.run import EXPLAINER, STORE_FILE
    from sae_italian.autointerp.store import Store
    from sae_italian.cache import FeatureCache
    from sae_italian.saes import weights_hash

    alive, texts = {}, {}
    hashes = {weights_hash(sae): name for name, sae in saes.items()}
    for folder in caches:
        cache = FeatureCache.open(folder)
        name = hashes.get(cache.manifest.sae_hash)
        if name is None:
            raise UsageError(f"{folder} was built with another SAE ({cache.manifest.sae}) than those given.")
        alive[name] = cache.statistics["count"] > 0
        if (cache.folder / STORE_FILE).is_file():
            with Store(cache.folder / STORE_FILE, {}) as store:
                found = store.explanations(EXPLAINER)
            texts[name] = {latent: e.text("it") for latent, (_, e) in found.items() if e.status == "ok"}
    return alive, texts
