"""Every notebook in notebooks/ runs from its first cell to the picture that it ends with."""

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
