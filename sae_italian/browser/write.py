"""Write the latent browser: a folder that opens from disk in any current browser, with no server and no network.

Layout: `index.html`, `browser.json` (the marker: what this folder is), `assets/` (style and scripts, as they are in
`static/`) and `data/`: `run/0000.js`, `rows/0000.js`, ... and `cards/0000.js`, .... A data file is a classic script
that hands one JSON value to `saeItalian.receive(kind, index, value)`: pages on `file://` may load scripts, but neither
modules nor `fetch`.
"""

from __future__ import annotations

import html
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any

from sae_italian.browser.schema import CardRecord, RowRecord, RunRecord, check_card, check_row, check_run
from sae_italian.errors import DataError, UsageError

MARKER = "browser.json"
FORMAT = "sae-italian-browser"
SCHEMA_VERSION = 1
ROWS_PER_SHARD = 4096
OURS = {"index.html", MARKER, "assets", "data"}
DESKTOP_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}


def write_browser(
    out: Path, run: RunRecord, rows: Sequence[RowRecord], cards: Iterable[CardRecord], *, cards_per_shard: int = 64
) -> Path:
    """Write the browser into the folder `out` and return the path of its `index.html`.

    `cards` is read once, and never more than `cards_per_shard` of them are held; they may come in any order and need
    not cover every row. `out` may be new, empty or a browser written earlier, which is replaced as a whole at the end:
    until then, and after any error, it stays as it was.

    Raises: UsageError if `out` holds anything that is not ours; DataError if a record does not fit its schema.
    """
    if cards_per_shard < 1:
        raise UsageError(f"cards_per_shard is {cards_per_shard}; give 1 or more.")
    out = Path(out).resolve()
    _refuse_foreign(out)
    run, latents = check_run(run), _latents(rows)
    with _replaced_folder(out) as folder:
        _copy_assets(folder, run)
        shard_of = _write_cards(folder, latents, cards, cards_per_shard)
        n_row_shards = _write_rows(folder, rows, shard_of)
        facts = {"rows": len(rows), "row_shards": n_row_shards, "cards": len(shard_of)}
        _write_data(folder, "run", 0, {"run": run, **facts})
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


def _latents(rows: Sequence[RowRecord]) -> set[int]:
    """Return the latents of the rows, checked before the first card is asked for."""
    latents: set[int] = set()
    for row in map(check_row, rows):
        if row["latent"] in latents:
            raise DataError(f"row of latent {row['latent']}: given twice. Give each row once.")
        latents.add(row["latent"])
    return latents


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


def _copy_assets(folder: Path, run: RunRecord) -> None:
    static = resources.files("sae_italian.browser") / "static"
    (folder / "assets").mkdir()
    for asset in static.iterdir():
        text = asset.read_text(encoding="utf-8") if asset.name.endswith((".js", ".css", ".html")) else ""
        if asset.name == "index.html":
            facts = {key: html.escape(str(run[key])) for key in ("title", "model", "sae", "corpus")}
            (folder / "index.html").write_text(Template(text).substitute(facts), encoding="utf-8")
        elif text:
            (folder / "assets" / asset.name).write_text(text, encoding="utf-8")


def _write_cards(folder: Path, known: set[int], cards: Iterable[CardRecord], per_shard: int) -> dict[int, int]:
    """Write the shards of cards and return the shard of each latent."""
    shard_of: dict[int, int] = {}
    stream = iter(cards)
    index = 0
    while batch := [check_card(card) for card in islice(stream, per_shard)]:
        for card in batch:
            latent = card["latent"]
            if latent not in known:
                raise DataError(f"card of latent {latent}: no row has this latent. Give a row for every card.")
            if latent in shard_of:
                raise DataError(f"card of latent {latent}: given twice. Give each card once.")
            shard_of[latent] = index
        _write_data(folder, "cards", index, batch)
        index += 1
    return shard_of


def _write_rows(folder: Path, rows: Sequence[RowRecord], shard_of: dict[int, int]) -> int:
    """Write the shards of rows, each row with the shard of its card, and return how many there are."""
    starts = range(0, len(rows), ROWS_PER_SHARD)
    for index, start in enumerate(starts):
        batch = map(check_row, rows[start : start + ROWS_PER_SHARD])
        _write_data(folder, "rows", index, [{**row, "shard": shard_of.get(row["latent"])} for row in batch])
    return len(starts)


def _write_data(folder: Path, kind: str, index: int, value: Any) -> None:
    path = folder / "data" / kind / f"{index:04d}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f'saeItalian.receive("{kind}", {index}, '.encode() + script_json(value) + b");\n")


def script_json(value: Any) -> bytes:
    """Return `value` as UTF-8 JSON that is also safe inside a script element.

    No `<` is left (so neither `</script>` nor `<!--`), no line separator U+2028 or U+2029, and no lone surrogate.
    Raises: DataError if a number is not finite.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise DataError(f"a record for the latent browser is not plain JSON: {error}. Use None for no value.") from None
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return text.encode("utf-8", "backslashreplace")
