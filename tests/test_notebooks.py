"""Every notebook in notebooks/ runs from its first cell to the picture that it ends with."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SHOWN = {"quickstart": "Detection", "giro_di_un_latente": "promuove", "sae_sul_tuo_testo": "explained_variance"}


def test_every_notebook_is_tested():
    elsewhere = {"un_latente_a_mano", "ioi_in_italiano"}  # tests/autointerp, tests/analysis/causal: test_notebook.py
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == {*SHOWN, *elsewhere}


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_runs_and_ends_with_a_picture(name, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs the dev extra")
    nbclient = pytest.importorskip("nbclient", reason="needs the dev extra")
    pytest.importorskip("ipykernel", reason="needs the notebook extra")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert SHOWN[name] in printed
    assert any("image/png" in output.get("data", {}) for output in cells[-1].outputs)
    shown = [output.get("data", {}) for cell in cells[:-1] for output in cell.outputs]
    widget = "application/vnd.jupyter.widget-view+json"
    assert any(widget in data or "text/html" in data for data in shown)  # the browser, in one form or the other
