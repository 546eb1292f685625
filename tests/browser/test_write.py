"""The folder on disk: its records come back, it is whole or absent, and nothing in it can be read as code."""

from __future__ import annotations

import json
import os
import re
import textwrap
import tracemalloc
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.labels import page_labels
from sae_italian.base.storage import remove
from sae_italian.browser import page, write_browser
from sae_italian.browser.page import COLUMNS, Record
from sae_italian.browser.write import characters, data_script
from tests.browser.data_files import read_data
from tests.browser.fake_browser import FakeSource, make_card, make_source

STATIC = resources.files("sae_italian.browser") / "static"


class Failing(FakeSource):
    def card(self, latent: int) -> Record:
        if latent > 0:
            raise RuntimeError("the cache went away")
        return super().card(latent)


def failing(n: int) -> Failing:
    source = make_source(n)
    return Failing(source.run_record, source.row_records, {})


def joined(segments: Any) -> str:
    return "".join(text for text, _ in segments)


def test_records_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_italian.browser.write.CARDS_PER_SHARD", 4)
    source = make_source(10)
    index = write_browser(tmp_path / "out", source)
    data = index.parent / "data"
    assert index == tmp_path / "out" / "index.html" and index.is_file()
    shards = [read_data(path) for path in sorted((data / "cards").iterdir())]
    assert [list(map(int, shard["cards"])) for shard in shards] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    rows = read_data(data / "rows" / "0000.js")
    for name, values in source.rows().items():
        assert rows[name] == [pytest.approx(v, rel=1e-3) if isinstance(v, float) else v for v in values], name
    facts = read_data(data / "run" / "0000.js")
    assert facts["run"] == json.loads(json.dumps(source.run_record)) and facts["rows"] == 10
    card, packed = make_card(source.row_records[5]), shards[1]["cards"]["5"]
    assert packed["scores"]["value"][0] == pytest.approx(card["scores"][0]["value"], rel=5e-3)
    assert packed["explanations"] == card["explanations"] and packed["rule"] == card["rule"]
    for group, stored in zip(card["groups"], packed["groups"], strict=True):
        for context, (document, largest, text, spans, _) in zip(group["contexts"], stored["contexts"], strict=True):
            assert text == joined(context["segments"]) and largest == pytest.approx(context["max"], rel=1e-3)
            assert shards[1]["documents"][document] == [context["source"], context["doc_id"]]
            active = [(piece, value) for piece, value in context["segments"] if value > 0]
            place, found = 0, []
            for since, length, level in zip(*[iter(spans)] * 3, strict=True):
                place += since + length
                found.append((text[place - length : place], level / 999 * largest))
            assert [piece for piece, _ in found] == [piece for piece, _ in active]
            assert [value for _, value in found] == pytest.approx([value for _, value in active], abs=2e-3 * largest)


def test_rows_are_sharded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_italian.browser.write.ROWS_PER_SHARD", 4)
    index = write_browser(tmp_path / "out", make_source(9))
    shards = [read_data(path) for path in sorted((index.parent / "data" / "rows").iterdir())]
    assert [shard["latent"] for shard in shards] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_memory_stays_flat_while_cards_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_italian.browser.write.CARDS_PER_SHARD", 3)

    class Heavy(FakeSource):
        def card(self, latent: int) -> Record:
            segments = [("x" * 200, 0.5) for _ in range(400)]
            context: Any = {"doc_id": "", "source": "", "max": 0.5, "cut": 0, "segments": segments}
            group: Any = {"name_it": "", "name_en": "", "lo": None, "hi": None, "contexts": [context]}
            return {**make_card(self.row_records[0]), "latent": latent, "groups": [group]}

    def peak(n: int) -> int:
        source = make_source(n)
        tracemalloc.start()
        write_browser(tmp_path / "out", Heavy(source.run_record, source.row_records, {}))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(6)
    assert peak(60) < 1.5 * peak(6)


def test_an_error_on_the_way_leaves_the_earlier_browser(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="went away"):
        write_browser(out, failing(8))
    assert list(tmp_path.iterdir()) == []
    write_browser(out, make_source(8))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RuntimeError, match="went away"):
        write_browser(out, failing(8))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def titled(n: int, title: str) -> FakeSource:
    source = make_source(n)
    source.run_record = {**source.run_record, "title": title}
    return source


def test_a_failed_last_step_puts_the_earlier_browser_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write_browser(out, titled(3, "first"))
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if Path(target) == out:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_browser(out, titled(3, "second"))
    assert read_data(out / "data" / "run" / "0000.js")["run"]["title"] == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_earlier_browser_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_italian.browser.write.CARDS_PER_SHARD", 2)
    out = tmp_path / "out"
    write_browser(out, titled(10, "first"))
    write_browser(out, titled(2, "second"))
    assert read_data(out / "data" / "run" / "0000.js")["run"]["title"] == "second"
    assert [path.name for path in (out / "data" / "cards").iterdir()] == ["0000.js"]


def test_nothing_of_an_earlier_browser_is_open_when_it_goes_and_a_killed_one_goes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, gone = tmp_path / "out [1]", []

    def removed(path: Path) -> None:
        held = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]  # noqa: PTH208
        assert not [file for file in held if file.startswith(f"{path}/")], "NFS would keep the folder"
        gone.append(path.name)
        remove(path)

    write_browser(out, make_source(2))
    (tmp_path / ".out [1].1.tmp" / "data").mkdir(parents=True)
    monkeypatch.setattr("sae_italian.browser.write.remove", removed)
    write_browser(out, make_source(2))
    assert gone == [".out [1].1.tmp", f".out [1].{os.getpid()}.old"] and [path.name for path in tmp_path.iterdir()] == [
        out.name
    ]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".DS_Store").touch()
    assert write_browser(out, make_source(1)).is_file()


def test_foreign_folders_are_refused_before_a_card_is_read(tmp_path: Path) -> None:
    class Never(FakeSource):
        def rows(self) -> Any:
            pytest.fail("the rows were asked for")

    source = make_source(2)
    never = Never(source.run_record, source.row_records, {})
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "index.html").write_text("mine")
    with pytest.raises(UsageError, match="holds no latent browser"):
        write_browser(thesis, never)
    assert (thesis / "index.html").read_text() == "mine"
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        write_browser(tmp_path / "file", never)
    other = tmp_path / "other"
    other.mkdir()
    (other / "browser.json").write_text('{"format": "something else"}')
    with pytest.raises(UsageError, match="holds no latent browser"):
        write_browser(other, never)


@pytest.mark.parametrize("is_there", [False, True])
def test_two_writers_of_one_browser_are_refused_by_name(tmp_path: Path, is_there: bool) -> None:
    out = tmp_path / "out"
    if is_there:
        write_browser(out, make_source(2))

    class Second(FakeSource):
        """While the first writes its cards, a second one begins."""

        def card(self, latent: int) -> Record:
            with pytest.raises(UsageError, match=f"{out} is being written by another process"):
                write_browser(out, make_source(2))
            return super().card(latent)

    source = make_source(3)
    write_browser(out, Second(source.run_record, source.row_records, {}))
    assert read_data(out / "data" / "run" / "0000.js")["rows"] == 3
    assert {path.name for path in out.iterdir()} == {"index.html", "browser.json", "assets", "data"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_note_left_in_a_browser_is_not_deleted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_browser(out, make_source(2))
    (out / "notes.txt").write_text("latent 3 is the subjunctive")
    with pytest.raises(UsageError, match=r"holds 'notes\.txt' beside"):
        write_browser(out, make_source(2))
    assert (out / "notes.txt").is_file()
    (out / "notes.txt").rename(out / "data" / "notes.txt")  # nor one among the files that are ours
    with pytest.raises(UsageError, match=r"holds 'data/notes\.txt' beside"):
        write_browser(out, make_source(2))
    assert (out / "data" / "notes.txt").is_file()


def test_text_cannot_leave_its_string(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- \u2028\u2029 & \"'"
    source = titled(1, evil[:-8])
    source.run_record = {**source.run_record, "corpus": "<b>$title"}
    source.row_records[0]["explanation_it"] = evil + "\ud83d"  # half of a surrogate pair, as a broken corpus has
    index = write_browser(tmp_path / "out", source)
    for path in (index.parent / "data").rglob("*.js"):
        text = path.read_bytes().decode("utf-16")
        name, size, packed = re.fullmatch(r'saeItalian\.receive\("([\w/]+)",(\d+),"(.*)"\);\n', text).groups()  # type: ignore[union-attr]
        assert all("\u3400" <= letter <= "\ub3ff" for letter in packed) and int(size) > 0 and name.startswith("data/")
    stored = read_data(index.parent / "data" / "rows" / "0000.js")
    assert stored["explanation_it"][0] == evil + "?"
    text = index.read_text(encoding="utf-8")
    assert "alert(1)</script>" not in text and "<b>" not in text
    assert "&lt;script&gt;alert(1)" in text and "&lt;b&gt;$title" in text


@given(st.binary(max_size=300))
def test_bytes_become_letters_of_fifteen_bits(data: bytes) -> None:
    codes = np.frombuffer(characters(data), dtype="<u2").astype(int) - 0x3400
    bits = "".join(f"{code:015b}" for code in codes)[: 8 * len(data)]
    assert bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)) == data
    assert len(codes) == -(-8 * len(data) // 15)


def test_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(DataError, match="not plain JSON"):
        data_script("data/run/0000", [float("inf")])


def test_a_card_with_such_a_number_leaves_nothing(tmp_path: Path) -> None:
    source = make_source(2)
    source.cards[1] = {**make_card(source.row_records[1]), "rule": {"weight": float("nan")}}
    with pytest.raises(DataError, match="not plain JSON"):
        write_browser(tmp_path / "out", source)
    assert list(tmp_path.iterdir()) == []


# --- the modules and the script made of them ---------------------------------------------------------------------------


def sources() -> dict[str, str]:
    files = (path for path in STATIC.iterdir() if path.is_file() and path.stem != "graph")  # a page of its own
    return {path.name: path.read_text(encoding="utf-8") for path in files}


def test_the_page_needs_no_network_and_makes_no_markup_from_data() -> None:
    for name, text in sources().items():
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|@import", text
        )
        assert set(re.findall(r"https?://[^\"' )]*", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert len(text.splitlines()) < 400, name
    assert not re.search(r"\bfetch\(|^\s*(import|export)\b", page.script("disk"), re.MULTILINE)


def test_every_style_rule_is_under_the_browsers_own_class() -> None:
    """So the sheet can be given to a notebook. Rules at the left margin are the only ones that are not nested."""
    inside_at_rules = re.sub(
        r"^@container[^{\n]*\{\n(.*?)^\}", lambda m: textwrap.dedent(m[1]), page.style(), flags=re.M | re.S
    )
    top = re.findall(r"^(\S[^{\n]*)\{", inside_at_rules, re.MULTILINE)
    assert len(top) > 3 and all(".sae-italian" in selector for selector in top)


def test_the_scripts_share_one_scope_and_declare_each_name_once() -> None:
    """They are joined as they are: a name declared twice would end the page, and so would an import."""
    for host, own in page.HOSTS.items():
        names = [*page.SCRIPTS, *own]
        texts = [sources()[f"{name}.js"] for name in names]
        declared = re.findall(r"^(?:async )?(?:function|class|const|let) (\w+)", "\n".join(texts), re.MULTILINE)
        assert len(declared) == len(set(declared)), host
        assert all(text in page.script(host) for text in texts)
    used = {name for own in page.HOSTS.values() for name in (*page.SCRIPTS, *own)}
    assert {f"{name}.js" for name in used} == {name for name in sources() if name.endswith(".js")}


def test_every_word_on_the_page_has_both_languages() -> None:
    words = {key.removeprefix("page."): pair for key, pair in page_labels().items()}
    assert all(len(pair) == 2 and all(pair) for pair in words.values())
    used = {key for text in sources().values() for key in re.findall(r'\bctx\.t\("([^"]+)"', text)}
    assert len(used) > 60 and used - set(words) == {"filter.", "theme.", "width.", "cloud.", "column.", "list."}
    assert all(f"column.{name}" in words for name, column in COLUMNS.items() if column.show)
