"""Every notebook in notebooks/ runs from its first cell to the picture that it ends with."""

import json
import re

import pytest

from tests.notebooks import FOLDER, printed_by, run_notebook

SHOWN = {"quickstart": "Detection", "giro_di_un_latente": "promuove", "sae_sul_tuo_testo": "explained_variance"}


def test_every_notebook_is_tested():
    elsewhere = {"un_latente_a_mano", "ioi_in_italiano"}  # tests/autointerp, tests/analysis/causal: test_notebook.py
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == {*SHOWN, *elsewhere}


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_shows_its_result_and_the_browser(name, tmp_path, monkeypatch):
    cells = run_notebook(name, tmp_path, monkeypatch)
    assert SHOWN[name] in "".join(map(printed_by, cells))
    shown = [output.get("data", {}) for cell in cells[:-1] for output in cell.outputs]
    widget = "application/vnd.jupyter.widget-view+json"
    assert any(widget in data or "text/html" in data for data in shown)  # the browser, in one form or the other


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_speak_italian(file):
    """Of the words that both languages use all the time, the text has the Italian ones."""
    text = " ".join("".join(cell["source"]) for cell in json.loads(file.read_text("utf-8"))["cells"] if is_text(cell))
    words = re.findall(r"\w+", text.lower())
    assert sum(word in {"il", "di", "che", "la", "un", "una", "si"} for word in words) > 0.08 * len(words)
    assert not {"the", "which", "and", "of"} & set(words)


def is_text(cell) -> bool:
    return cell["cell_type"] == "markdown"
