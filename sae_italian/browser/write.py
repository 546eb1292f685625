"""Write the latent browser: a folder that opens from disk in any current browser, with no server and no network.

Layout: `index.html`, `browser.json` (the marker: what this folder is), `assets/app.js` and `app.css` (page.py) and `data/`:
`run/0000.js`, `rows/0000.js`, ... (columns of 1,024 latents) and `cards/0000.js`, ... (32 latents each). See pack.py for
what a data file holds. A browser that compares has the other SAE's `rows`, `run` and `cards` in `other/`, and the matches
in `data/matches/0000.js`.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae_italian.base.errors import UsageError
from sae_italian.browser.pack import ShardDocuments, data_script, pack_card, short
from sae_italian.browser.page import page, script, style
from sae_italian.browser.schema import Record, check, check_card, check_rows

MARKER = "browser.json"
FORMAT = "sae-italian-browser"
SCHEMA_VERSION = 2
ROWS_PER_SHARD = 1024  # a card that the address names waits for one such part of the list
CARDS_PER_SHARD = 32
POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'self' file:; "
    "style-src 'self' file:; img-src data:; base-uri 'none'; form-action 'none'\">"
)
OURS = {"index.html", MARKER, "assets", "data", "other"}
DESKTOP_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}


def write_browser(
    out: Path, source: Any, *, other: tuple[str, Any, dict[str, list[Any]]] | None = None, bar: bool = True
) -> Path:
    """Write the browser of a source into the folder `out` and return the path of its `index.html`.

    A source has `run()`, `rows()` and `card(latent)`, as source.py. Cards are asked for one by one and no more than 32 of
    them are held. `other` is another SAE to compare with: its name, its source and the matches (see compare.py). `out`
    may be new, empty or a browser written earlier, which is replaced as a whole at the end: until then, and after any
    error, it stays as it was.

    Raises: UsageError if `out` holds anything that is not ours; DataError if a record does not fit its schema.
    """
    out = Path(out).resolve()
    _refuse_foreign(out)
    with _replaced_folder(out) as folder:
        run = check("run", source.run())
        (folder / "assets").mkdir()
        (folder / "assets" / "app.js").write_text(script("disk"), encoding="utf-8")
        (folder / "assets" / "app.css").write_text(style(), encoding="utf-8")
        (folder / "index.html").write_text(page(run, policy=POLICY), encoding="utf-8", errors="replace")
        facts = _write_source(folder / "data", source, run, {"compare": other[0] if other else None}, bar)
        if other:
            _, second, matches = other
            _write_source(folder / "other", second, check("run", second.run()), {"compare": None}, bar)
            _write_data(folder, "data/matches", 0, matches)
        marker = {"format": FORMAT, "schema": SCHEMA_VERSION, "title": run["title"], "created": run["created"], **facts}
        (folder / MARKER).write_text(json.dumps(marker, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return out / "index.html"


def _refuse_foreign(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file; a folder for the browser was expected. Give another path.")
    names = {child.name for child in out.iterdir()} - DESKTOP_LITTER
    if names and not _is_browser(out):
        raise UsageError(f"{out} is not empty and holds no latent browser. Give a new or an empty folder.")
    if foreign := sorted(names - OURS):
        raise UsageError(f"{out} holds {foreign[0]!r} beside the latent browser. Move it away, or give another folder.")


def _is_browser(folder: Path) -> bool:
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _replaced_folder(out: Path) -> Iterator[Path]:
    """Yield a new sibling folder; put it in the place of `out` when the block ends well, remove it otherwise."""
    fresh = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if out.exists():
            out.rename(aside)
        try:
            fresh.rename(out)
        except OSError:
            if aside.exists():
                aside.rename(out)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _write_source(folder: Path, source: Any, run: Record, more: dict[str, Any], bar: bool) -> dict[str, Any]:
    """Write one source's run, rows and cards; return what the marker says of them."""
    columns = check_rows(source.rows())
    n_rows = len(columns["latent"])
    starts = range(0, n_rows, ROWS_PER_SHARD)
    for index, start in enumerate(starts):
        end = start + ROWS_PER_SHARD
        part = {name: [short(value, 4) for value in values[start:end]] for name, values in columns.items()}
        _write_data(folder.parent, f"{folder.name}/rows", index, part)
    del columns
    sizes = {"rows_per_shard": ROWS_PER_SHARD, "cards_per_shard": CARDS_PER_SHARD}
    facts = {"rows": n_rows, "row_shards": len(starts), **sizes}
    _write_data(folder.parent, f"{folder.name}/run", 0, {"run": run, **facts, **more})
    gc.freeze()  # a card's records hold each other in no circle: what was there before need not be searched again and again
    with tqdm(total=n_rows, desc="cards", unit="latent", disable=None if bar else True) as progress:
        for index, start in enumerate(range(0, n_rows, CARDS_PER_SHARD)):
            documents = ShardDocuments()
            latents = range(start, min(n_rows, start + CARDS_PER_SHARD))
            cards = {latent: pack_card(check_card(source.card(latent)), documents) for latent in latents}
            _write_data(
                folder.parent, f"{folder.name}/cards", index, {"documents": list(documents.number), "cards": cards}
            )
            progress.update(len(latents))
    gc.unfreeze()
    return facts


def _write_data(folder: Path, kind: str, index: int, value: Any) -> None:
    name = f"{kind}/{index:04d}"
    path = folder / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data_script(name, value))
