"""The notebook on the indirect object runs from the first cell to the picture."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[3] / "notebooks" / "ioi_in_italiano.ipynb"


def test_ioi_in_italian_is_walked_through(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs the dev extra")
    nbclient = pytest.importorskip("nbclient", reason="needs the dev extra")
    pytest.importorskip("ipykernel", reason="needs the notebook extra")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    assert "…" in printed[0] and "right" in printed[1] and "KL to the counterfactual" in printed[3]
    before, after = (float(part.split()[-1]) for part in printed[3].split("KL to")[1].split(" nats")[0].split("->"))
    assert after < before / 2
    assert "Spearman" in printed[4] and "| random |" in printed[5] and "| logits that fall |" in printed[6]
    assert any("image/png" in output.get("data", {}) for output in cells[-1].outputs)
