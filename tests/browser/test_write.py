"""The folder on disk: its records come back, it is whole or absent, and nothing in it can be read as code."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from sae_italian.browser import CardRecord, write_browser
from sae_italian.browser.write import script_json
from sae_italian.errors import DataError, UsageError
from tests.browser.fake_browser import make_card, make_data, make_row, make_run

STATIC = resources.files("sae_italian.browser") / "static"


def read_data(path: Path) -> Any:
    """Return the value that a data file hands to the page."""
    match = re.fullmatch(r'saeItalian\.receive\("(\w+)", (\d+), (.*)\);\n', path.read_text(encoding="utf-8"), re.DOTALL)
    assert match and match[1] == path.parent.name and int(match[2]) == int(path.stem)
    return json.loads(match[3])


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    run, rows, cards = make_data(10)
    index = write_browser(tmp_path / "out", run, rows, cards(), cards_per_shard=4)
    data = index.parent / "data"
    assert index == tmp_path / "out" / "index.html" and index.is_file()
    shards = [read_data(path) for path in sorted((data / "cards").iterdir())]
    assert [len(shard) for shard in shards] == [4, 4, 2]
    assert [card for shard in shards for card in shard] == plain(list(cards()))
    stored = read_data(data / "rows" / "0000.js")
    assert [row.pop("shard") for row in stored] == [0] * 4 + [1] * 4 + [2] * 2
    assert stored == plain(rows)
    facts = read_data(data / "run" / "0000.js")
    assert facts == {"run": plain(run), "rows": 10, "row_shards": 1, "cards": 10}


def test_cards_come_in_any_order_and_may_be_missing(tmp_path: Path) -> None:
    run, rows, _ = make_data(6)
    index = write_browser(tmp_path / "out", run, rows, [make_card(rows[4]), make_card(rows[1])], cards_per_shard=1)
    shards = {row["latent"]: row["shard"] for row in read_data(index.parent / "data" / "rows" / "0000.js")}
    assert shards == {0: None, 1: 1, 2: None, 3: None, 4: 0, 5: None}


def test_rows_are_sharded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_italian.browser.write.ROWS_PER_SHARD", 4)
    index = write_browser(tmp_path / "out", make_run(9), [make_row(latent) for latent in range(9)], [])
    shards = [read_data(path) for path in sorted((index.parent / "data" / "rows").iterdir())]
    assert [len(shard) for shard in shards] == [4, 4, 1]
    assert not (index.parent / "data" / "cards").exists()


def test_memory_stays_flat_while_cards_stream(tmp_path: Path) -> None:
    rows: list[Any] = [make_row(0) | {"latent": latent} for latent in range(120)]

    def heavy() -> Iterator[CardRecord]:
        small = make_card(make_row(0))
        for latent in range(120):
            segments = [("x" * 200, 0.5) for _ in range(1000)]
            context = {"doc_id": "", "source": "", "max": 0.5, "segments": segments}
            group = {"name_it": "", "name_en": "", "lo": None, "hi": None, "contexts": [context]}
            yield small | {"latent": latent, "groups": [group]}  # type: ignore[misc]

    def peak(n: int) -> int:
        tracemalloc.start()
        write_browser(
            tmp_path / "out",
            make_run(),
            rows,
            (card for card, _ in zip(heavy(), range(n), strict=False)),
            cards_per_shard=3,
        )  # type: ignore[arg-type]
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(120) < 1.5 * peak(12)


def test_an_error_on_the_way_leaves_the_earlier_browser(tmp_path: Path) -> None:
    run, rows, cards = make_data(8)
    out = tmp_path / "out"

    def failing() -> Iterator[CardRecord]:
        yield make_card(rows[0])
        raise RuntimeError("the cache went away")

    with pytest.raises(RuntimeError, match="went away"):
        write_browser(out, run, rows, failing(), cards_per_shard=1)
    assert list(tmp_path.iterdir()) == []
    write_browser(out, run, rows, cards())
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RuntimeError, match="went away"):
        write_browser(out, run, rows, failing(), cards_per_shard=1)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_last_step_puts_the_earlier_browser_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rows, cards = make_data(3)
    out = tmp_path / "out"
    write_browser(out, run, rows, cards())
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_browser(out, {**run, "title": "second"}, rows, cards())
    assert read_data(out / "data" / "run" / "0000.js")["run"]["title"] == run["title"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_browser_is_replaced_whole(tmp_path: Path) -> None:
    run, rows, cards = make_data(10)
    out = tmp_path / "out"
    write_browser(out, run, rows, cards(), cards_per_shard=2)
    write_browser(out, {**run, "title": "second"}, rows[:2], [])
    assert read_data(out / "data" / "run" / "0000.js")["run"]["title"] == "second"
    assert not (out / "data" / "cards").exists()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".DS_Store").touch()
    assert write_browser(out, *make_data(1)[:2], []).is_file()


def test_foreign_folders_are_refused_before_a_card_is_read(tmp_path: Path) -> None:
    run, rows, _ = make_data(2)

    def never() -> Iterator[CardRecord]:
        pytest.fail("a card was asked for")
        yield make_card(rows[0])

    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "index.html").write_text("mine")
    with pytest.raises(UsageError, match="holds no latent browser"):
        write_browser(thesis, run, rows, never())
    assert (thesis / "index.html").read_text() == "mine"
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        write_browser(tmp_path / "file", run, rows, never())
    other = tmp_path / "other"
    other.mkdir()
    (other / "browser.json").write_text('{"format": "something else"}')
    with pytest.raises(UsageError, match="holds no latent browser"):
        write_browser(other, run, rows, never())


def test_a_note_left_in_a_browser_is_not_deleted(tmp_path: Path) -> None:
    run, rows, cards = make_data(2)
    out = tmp_path / "out"
    write_browser(out, run, rows, cards())
    (out / "notes.txt").write_text("latent 3 is the subjunctive")
    with pytest.raises(UsageError, match=r"holds 'notes\.txt' beside"):
        write_browser(out, run, rows, cards())
    assert (out / "notes.txt").is_file()


def test_text_cannot_leave_its_string(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- \u2028\u2029 \ud83d & \"'"
    run, rows, _ = make_data(1)
    rows[0]["explanation_it"] = evil
    card = make_card(rows[0])
    card["groups"][0]["contexts"][0]["segments"] = [(evil, 1.0)]
    index = write_browser(tmp_path / "out", {**run, "title": evil[:-8], "corpus": "<b>$title"}, rows, [card])
    for path in (index.parent / "data").rglob("*.js"):
        raw = path.read_bytes().decode("utf-8")
        assert not set(raw) & {"<", "\u2028", "\u2029"}
    assert read_data(index.parent / "data" / "rows" / "0000.js")[0]["explanation_it"] == evil
    page = index.read_text(encoding="utf-8")
    assert "alert(1)</script>" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)" in page and "&lt;b&gt;$title" in page


def test_script_json_is_json() -> None:
    value = {"a</b>": ["\u2028", "\ud83d", 1.5, None, "città"]}
    assert json.loads(script_json(value)) == value
    assert "città".encode() in script_json(value)
    with pytest.raises(DataError, match="not plain JSON"):
        script_json([float("inf")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": float("nan")}, r"row of latent 0, field 'density': .*finite"),
        ({"detecton": 0.5}, r"row of latent 0, field 'detecton': Extra"),
        ({"gold": "gender=f"}, r"row of latent 0, field 'gold': .*list"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_browser(tmp_path / "out", make_run(), [{**make_row(0), **change}], [])  # type: ignore[typeddict-item]
    assert list(tmp_path.iterdir()) == []


def test_a_card_that_does_not_fit_is_named(tmp_path: Path) -> None:
    run, rows, _ = make_data(2)
    card = make_card(rows[1])
    missing: Any = {key: value for key, value in card.items() if key != "scores"}
    cases: list[tuple[list[Any], str]] = [
        ([missing], "card of latent 1, field 'scores': Field required"),
        ([{**card, "histogram": {"edges": [0.0, 1.0], "counts": [1, 2]}}], "2 edges for 2 counts"),
        ([{**card, "rule": {"weight": float("nan")}}], "not plain JSON"),
        ([card, card], "card of latent 1: given twice"),
        ([{**card, "latent": 7}], "card of latent 7: no row"),
    ]
    for cards, message in cases:
        with pytest.raises(DataError, match=message):
            write_browser(tmp_path / "out", run, rows, cards)
    with pytest.raises(DataError, match="row of latent 0: given twice"):
        write_browser(tmp_path / "out", run, [rows[0], rows[0]], [])
    with pytest.raises(UsageError, match="cards_per_shard is 0"):
        write_browser(tmp_path / "out", run, rows, [], cards_per_shard=0)


def test_numpy_numbers_are_taken(tmp_path: Path) -> None:
    import numpy as np

    row: Any = {**make_row(0), "density": np.float32(0.25), "n_active": np.int64(3)}
    index = write_browser(tmp_path / "out", make_run(), [row], [])
    stored = read_data(index.parent / "data" / "rows" / "0000.js")[0]
    assert (stored["density"], stored["n_active"]) == (0.25, 3)


def sources() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in STATIC.iterdir() if path.is_file()}


def test_the_page_needs_no_network_and_makes_no_markup_from_data() -> None:
    for name, text in sources().items():
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|\bfetch\(", text
        )
        assert not re.search(r"^\s*(import|export)\b|@import", text, re.MULTILINE)
        assert set(re.findall(r"https?://[^\"' )]*", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert len(text.splitlines()) < 400, name


def test_every_word_on_the_page_has_both_languages() -> None:
    words = dict(re.findall(r'^    "([^"]+)": (\[.*\]),$', sources()["strings.js"], re.MULTILINE))
    assert all(len(pair) == 2 and all(pair) for pair in map(json.loads, words.values()))
    used = {key for text in sources().values() for key in re.findall(r'\bctx\.t\("([^"]+)"', text)}
    assert len(used) > 60 and used - set(words) == {"filter.", "theme."}
