"""Run a notebook of notebooks/ as CI does: on the embedded model, in an empty folder.

`python -m tests.notebooks NAME...` runs notebooks (all without a name) and stores what they show in their files.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests import fresh

WIDGET = "application/vnd.jupyter.widget-view+json"
FOLDER = Path(__file__).parents[1] / "notebooks"


def execute(name: str, folder: Path) -> Any:
    """Return a notebook, executed in a folder; its bars (widgets without their state) and warnings are left out."""
    nbformat = pytest.importorskip("nbformat", reason="needs the dev extra")
    nbclient = pytest.importorskip("nbclient", reason="needs the dev extra")
    pytest.importorskip("ipykernel", reason="needs the notebook extra")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    place = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=600, resources=place, store_widget_state=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FOLDER.parent))
        patch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", _launched)
        client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and WIDGET not in output.get("data", {})
            ]
    return notebook


def _launched(command: list[str], *, env: dict[str, str], cwd: str | None = None, **_: Any) -> fresh.Fresh:
    return fresh.Fresh(command[command.index("-m") :], env, cwd)


def run_notebook(name: str, folder: Path) -> list[Any]:
    """Return the executed code cells of a notebook behind Colab's, the last of which must end with a picture."""
    cells = [cell for cell in execute(name, folder).cells if cell.cell_type == "code"][1:]
    assert any("image/png" in output.get("data", {}) for output in cells[-1].outputs)
    return cells


def printed_by(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def store(name: str) -> None:
    """Run a notebook and keep what it shows in its file."""
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        text = nbformat.writes(execute(name, Path(folder)))
    (FOLDER / f"{name}.ipynb").write_text(re.sub(rf"{tempfile.gettempdir()}/tmp\w+", "…", text) + "\n", "utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for chosen in sys.argv[1:] or sorted(file.stem for file in FOLDER.glob("*.ipynb")):
        store(chosen)
