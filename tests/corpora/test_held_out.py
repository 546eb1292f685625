"""The list of MicroItaliano's held-out documents is what the hash of each text says: `python -m tests.corpora.test_held_out` writes it."""

from itertools import islice, pairwise
from pathlib import Path

import pytest

from sae_italian import micro_italiano
from sae_italian.corpora import is_held_out, rows
from sae_italian.corpora.stream import iter_documents

FILE = Path(rows.__file__).with_name("micro_held_out.txt")


def held_out(first: int, end: int) -> list[int]:
    """Return the slow way: every document is made."""
    return [index for index in range(first, end) if is_held_out(micro_italiano.document(index).text)]


@pytest.mark.parametrize("first", [0, 123_000, rows.KNOWN_MICRO - 1_000])
def test_the_list_is_what_the_hash_says(first):
    """It fails when the grammar or its words have changed: write the list anew."""
    known = sorted(index for index in rows._held_out_of_seed_0() if first <= index < first + 2_000)
    assert known == held_out(first, min(first + 2_000, rows.KNOWN_MICRO)) and len(known) > 30


def test_the_stream_goes_on_behind_the_list(monkeypatch):
    def first(n: int) -> list[str]:
        return [
            document.doc_id for document, _ in zip(iter_documents("micro-italiano", "heldout"), range(n), strict=False)
        ]

    listed = first(60)
    monkeypatch.setattr(rows, "KNOWN_MICRO", 400)
    assert first(60) == listed
    monkeypatch.setattr(rows, "_held_out_of_seed_0", lambda: {-1})
    shard = rows.TextFile("micro-italiano/0", "0", rows.HELD_OUT_MICRO, "micro-italiano")
    made = [number for number, text, _ in islice(rows.rows(shard, ("text",)), 450) if text is not rows.OTHER_SPLIT]
    assert made == [*range(400, 450)]  # below KNOWN_MICRO the list alone says, from there on every text is asked


if __name__ == "__main__":
    found = held_out(0, rows.KNOWN_MICRO)
    gaps = [later - earlier for earlier, later in pairwise([0, *found])]
    lines = (" ".join(map(str, gaps[at : at + 40])) for at in range(0, len(gaps), 40))
    FILE.write_text("\n".join(lines) + "\n", "ascii")
