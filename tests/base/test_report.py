"""Results as tables and plain values: what JSON gets, what is left out, how an estimate is shown."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest

from sae_italian.base.report import page, plain, save_result, shown, table
from sae_italian.base.statistics import NOTHING, Estimate
from sae_italian.cli import readable


@dataclass(frozen=True)
class Record:
    share: Estimate
    counts: np.ndarray
    worst: float = float("-inf")
    working: list[object] = field(default_factory=list, repr=False)


def test_records_become_what_json_wants():
    found = plain({"a": (Record(Estimate(0.5, 0.4, float("nan")), np.array([1, 2]), working=[object()]),)})
    assert found == {"a": [{"share": {"value": 0.5, "lo": 0.4, "hi": None}, "counts": [1, 2], "worst": None}]}
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("estimate", "form", "text"),
    [
        (Estimate(0.814, 0.78, 0.84), ".2f", "0.81 (0.78 to 0.84)"),
        (Estimate(0.5, 0.25, 0.75), ".0%", "50% (25% to 75%)"),
        (Estimate(1.5, float("nan"), float("nan")), "+.1f", "+1.5"),
        (NOTHING, ".2f", "-"),
    ],
)
def test_an_estimate_is_shown_as_far_as_it_is_known(estimate, form, text):
    assert shown(estimate, form) == text


def test_a_folder_holds_the_result_its_text_and_its_pictures(tmp_path):
    text = table("name | n", [("a", 1), ("b", 20)])
    assert text.splitlines() == ["| name | n |", "|---|---|", "| a | 1 |", "| b | 20 |"]
    save_result(tmp_path, "shift", {"n": 1}, ["# Title", text], shift="<svg/>")
    assert {"n", "created"} == set(json.loads((tmp_path / "shift.json").read_text()))
    written = (tmp_path / "shift.md").read_text(encoding="utf-8")
    assert written.startswith("# Title\n\n| name") and "![shift](shift.svg)\n\nMeans per token" in written
    assert (tmp_path / "shift.svg").read_text() == "<svg/>"
    save_result(tmp_path / "bare", "other", {"sd": float("nan")})
    assert [path.name for path in (tmp_path / "bare").iterdir()] == ["other.json"]
    assert json.loads((tmp_path / "bare" / "other.json").read_text())["sd"] is None


def test_a_bar_or_a_new_line_in_a_cell_does_not_end_it():
    """Tokens are cells too: what an ablation raises may well be a new line."""
    text = table("token | what rises", [("«|»", "«\n» +1.00"), ("a", "b")])
    assert text.splitlines()[2:] == ["| «\\|» | « » +1.00 |", "| a | b |"]
    assert page("t", [text]).count("<td>") == 4 and "<td>«|»</td>" in page("t", [text])
    assert readable(text).splitlines()[2:] == ["«|»    « » +1.00", "a      b"]
