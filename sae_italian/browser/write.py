"""Write the latent browser: a folder that opens from disk in any current browser, with no server and no network.

Layout: `index.html`, `browser.json` (the marker: what this folder is), `assets/app.js` and `app.css` (page.py) and `data/`:
`run/0000.js`, `rows/0000.js`, ... (columns of 1,024 latents) and `cards/0000.js`, ... (32 latents each). A browser that
compares has the other SAE's `rows`, `run` and `cards` in `other/`, and the matches in `data/matches/0000.js`.

A data file is a script that hands one deflated JSON value to the page. The bytes travel as characters of 15 bits each, from
U+3400 on, in a UTF-16 file: 7 % more than the bytes themselves where base64 takes 33 %, and no character among them that a
script or a page could read as anything but text.
"""

import gc
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.pace import progress
from sae_italian.base.storage import LOCK_FILE, atomic_path, locked, path_of, read_json, remove, write_json, write_text
from sae_italian.browser.directions import rounded
from sae_italian.browser.page import Record, page, script, style
from sae_italian.browser.source import SCORE_FIELDS

MARKER, SPACE_CARD = "browser.json", "README.md"
FORMAT = "sae-italian-browser"
SCHEMA_VERSION = 2
ROWS_PER_SHARD = 1024  # a card that the address names waits for one such part of the list
CARDS_PER_SHARD = 32
POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'self' file:; "
    "style-src 'self' file:; img-src data:; base-uri 'none'; form-action 'none'\">"
)
OURS = r"index\.html|browser\.json|assets/app\.(js|css)|(data|other)/(run|rows|cards|matches)/\d+\.js"
FIRST, BITS = 0x3400, 15
LEVEL = 6  # of deflate: 9 takes twice the time for 4 % fewer bytes
LEVELS = 999  # activations of a passage are kept as so many parts of its largest


def write_browser(
    out: Path, source: Any, *, other: tuple[str, Any, dict[str, list[Any]]] | None = None, space: bool = False
) -> Path:
    """Write the browser of a source into the folder `out` and return the path of its `index.html`.

    A source has `run()`, `rows()` and `card(latent)`, as source.py. Cards are asked for one by one and no more than 32 of
    them are held. `other` is another SAE to compare with: its name, its source and the matches (see opening.py). `out`
    may be new, empty or a browser written earlier, which is replaced as a whole at the end: until then, and after any
    error, it stays as it was. As a `space` it has the README.md that makes the folder a static Space of Hugging Face.

    Raises: UsageError if `out` holds anything that is not ours, or another process writes it; DataError if a number
    is not finite.
    """
    out = path_of(out).resolve()
    with _replaced_folder(out) as folder:
        run, facts = _write_source(folder, "data", source, other[0] if other else None)
        (folder / "assets").mkdir()
        (folder / "assets" / "app.js").write_text(script("disk"), encoding="utf-8")
        (folder / "assets" / "app.css").write_text(style(), encoding="utf-8")
        (folder / "index.html").write_text(page(run, policy=POLICY), encoding="utf-8", errors="replace")
        if other:
            _write_source(folder, "other", other[1])
            _write_data(folder, "data/matches", 0, other[2])
        marker = {"format": FORMAT, "schema": SCHEMA_VERSION, "title": run["title"], "created": run["created"], **facts}
        write_json(folder / MARKER, marker)
        if space:
            write_text(folder / SPACE_CARD, space_card(run))
    return out / "index.html"


@contextmanager
def _replaced_folder(out: Path) -> Iterator[Path]:
    """Hold `out`; yield a new folder beside it, put it in the place of `out` when the block ends well, else remove it."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    with locked(out):
        _refuse_foreign(out)
        for left in out.parent.glob(f".{escape(out.name)}.*.tmp"):  # a killed process'
            remove(left)
        try:
            with atomic_path(out) as fresh:
                fresh.mkdir()
                yield fresh
                out.rename(aside)
        finally:
            if not out.exists():
                aside.rename(out)
    remove(aside)  # not before: NFS keeps the lock's open file, and so its folder


def space_card(run: Record) -> str:
    """Return the README.md of the Space that shows a browser."""
    from huggingface_hub import SpaceCard, SpaceCardData

    front = SpaceCardData(
        title=run["title"][:80],
        sdk="static",
        app_file="index.html",
        tags=["sparse-autoencoder", "saelens", "sae-italian"],
    )
    said = (
        f"Latenti di / latents of {run['model']}, `{run['hook_name']}`: {run['d_sae']:,}, {run['n_tokens']:,} token "
        f"di / of {run['corpus']}.\n\nPagina fatta da / page made by `sae-italian browse CACHE --to-space OWNER/NAME`."
    )
    return SpaceCard(f"---\n{front}\n---\n\n# {run['title']}\n\n{said}\n").content


def _refuse_foreign(out: Path) -> None:
    litter = {".DS_Store", "Thumbs.db", "desktop.ini", LOCK_FILE}
    files = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.name not in litter]
    try:
        ours = not files or read_json(out / MARKER)["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UsageError(f"{out} is not empty and holds no latent browser. Give a new or an empty folder.")
    for name in files:
        if (out / name).is_dir() or re.fullmatch(OURS, name):
            continue
        # a README.md is ours where it says so
        if name != SPACE_CARD or "--to-space" not in (out / name).read_text(encoding="utf-8", errors="replace"):
            raise UsageError(f"{out} holds {name!r} beside the latent browser. Move it away, or give another folder.")


def _write_source(folder: Path, part: str, source: Any, compare: str | None = None) -> tuple[Record, Record]:
    """Write one source's run, rows and cards into a part of the folder; return the run, and what the marker says."""
    run, columns = source.run(), source.rows()
    n_rows = len(columns["latent"])
    starts = range(0, n_rows, ROWS_PER_SHARD)
    for index, start in enumerate(starts):
        rows = {name: values[start : start + ROWS_PER_SHARD] for name, values in columns.items()}
        _write_data(folder, f"{part}/rows", index, rounded(rows, 4))
    del columns
    sizes = {"rows_per_shard": ROWS_PER_SHARD, "cards_per_shard": CARDS_PER_SHARD}
    facts = {"rows": n_rows, "row_shards": len(starts), **sizes}
    _write_data(folder, f"{part}/run", 0, {"run": run, **facts, "compare": compare})
    # A card's records hold each other in no circle: what was there before need not be searched again.
    gc.freeze()
    with progress("cards", total=n_rows, unit="latent") as bar:
        for index, start in enumerate(range(0, n_rows, CARDS_PER_SHARD)):
            documents: dict[tuple[str, str], int] = {}
            latents = range(start, min(n_rows, start + CARDS_PER_SHARD))
            cards = {latent: pack_card(source.card(latent), documents) for latent in latents}
            _write_data(folder, f"{part}/cards", index, {"documents": list(documents), "cards": cards})
            bar.update(len(latents))
    gc.unfreeze()
    return run, facts


def _write_data(folder: Path, kind: str, index: int, value: Any) -> None:
    name = f"{kind}/{index:04d}"
    path = folder / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data_script(name, value))


def data_script(name: str, value: Any) -> bytes:
    """Return the script `name` (`data/cards/0003`) with a value. Raises: DataError if a number is not finite."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise DataError(f"a record for the latent browser is not plain JSON: {error}. Use None for no value.") from None
    deflated = zlib.compress(text.encode("utf-8", "replace"), LEVEL, wbits=-15)
    head = f'saeItalian.receive("{name}",{len(deflated)},"'.encode("utf-16-le")
    return b"\xff\xfe" + head + characters(deflated) + '");\n'.encode("utf-16-le")


def characters(data: bytes) -> bytes:
    """Return bytes as UTF-16 characters of 15 bits each."""
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    bits = np.pad(bits, (0, -len(bits) % BITS)).reshape(-1, BITS)
    return (bits @ (1 << np.arange(BITS - 1, -1, -1)) + FIRST).astype("<u2").tobytes()


# --- cards -----------------------------------------------------------------------------------------------------------


def pack_card(card: Record, documents: dict[tuple[str, str], int]) -> dict[str, Any]:
    """Return a card as it lies on disk: short numbers, and passages as text with spans.

    `documents` are the sources and ids of a shard's documents, each once; passages name them by number.
    """
    lists = ("promoted", "suppressed", "tokens", "decoder", "cofiring", "labels", "positions")
    groups = []
    for group in card["groups"]:
        contexts = [_pack_context(context, documents) for context in group["contexts"]]
        groups.append({**group, "lo": rounded(group["lo"], 4), "hi": rounded(group["hi"], 4), "contexts": contexts})
    return {
        **card,
        **{name: rounded(card[name], 3) for name in lists},
        **{name: rounded(card[name], 4) for name in ("histogram", "logits")},
        "scores": {name: [rounded(score[name], 3) for score in card["scores"]] for name in SCORE_FIELDS},
        "groups": groups,
    }


def _pack_context(context: Record, documents: dict[tuple[str, str], int]) -> list[Any]:
    """Return [document, largest, text, [characters since the last span, length, activation, ...], cut]."""
    spans: list[int] = []
    since = 0
    for text, activation in context["segments"]:
        length = len(text.encode("utf-16-le", "surrogatepass")) // 2  # as JavaScript counts
        if activation > 0:
            spans += [since, length, max(1, round(LEVELS * activation / context["max"]))]
            since = 0
        else:
            since += length
    text = "".join(text for text, _ in context["segments"])
    document = documents.setdefault((context["source"], context["doc_id"]), len(documents))
    return [document, rounded(context["max"], 4), text, spans, context["cut"]]
