"""The notebook runs from the first cell to the picture."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "un_latente_a_mano.ipynb"


def test_one_latent_is_explained_by_hand(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs the dev extra")
    nbclient = pytest.importorskip("nbclient", reason="needs the dev extra")
    pytest.importorskip("ipykernel", reason="needs the notebook extra")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    assert "<<" in printed[1] and "same-token" in printed[2] and "it:" in printed[4]
    always = next(line for line in printed[5].splitlines() if line.startswith("always yes"))
    assert "detection/random 0.50" in always
    assert any("image/png" in output.get("data", {}) for output in cells[-1].outputs)
