"""Every notebook in notebooks/ runs from its first cell to the picture that it ends with, and its file shows that."""

import json
import re
import sys
from importlib import import_module

import pytest

from tests.notebooks import FOLDER, printed_by, run_notebook

SHOWN = {"quickstart": "Detection", "giro_di_un_latente": "promuove", "sae_sul_tuo_testo": "explained_variance"}
WITH_GRAPH = "un_grafo_a_mano"  # ends with a picture, shows no browser
FILES = sorted(FOLDER.glob("*.ipynb"))


def cells_of(file, kind: str) -> list[dict]:
    return [cell for cell in json.loads(file.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def test_every_notebook_is_tested():
    elsewhere = {"un_latente_a_mano", "ioi_in_italiano"}  # tests/autointerp, tests/analysis/causal: test_notebook.py
    assert {file.stem for file in FILES} == {*SHOWN, *elsewhere, WITH_GRAPH}


def test_the_notebook_of_a_graph_adds_up_and_confirms_an_edge(tmp_path):
    said = "".join(map(printed_by, run_notebook(WITH_GRAPH, tmp_path)))
    assert float(re.search(r"errore massimo di una somma: (\S+)", said)[1]) < 1e-3
    foretold, real = re.search(r"l'arco prevede (\S+); .* cambia di (\S+)", said).groups()
    assert float(re.search(r"dei suoi archi: errore (\S+)", said)[1]) < 1e-4
    assert float(foretold) * float(real) > 0 and "transcoder casuali" in said


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_shows_its_result_and_the_browser(name, tmp_path):
    cells = run_notebook(name, tmp_path)
    assert SHOWN[name] in "".join(map(printed_by, cells))
    shown = [output.get("data", {}) for cell in cells[:-1] for output in cell.outputs]
    assert any("text/html" in data for data in shown)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_notebooks_speak_italian(file):
    """Of the words that both languages use all the time, the text and what is printed have the Italian ones."""
    text = " ".join("".join(cell["source"]) for cell in cells_of(file, "markdown"))
    words = re.findall(r"\w+", text.lower())
    assert sum(word in {"il", "di", "che", "la", "un", "una", "si"} for word in words) > 0.08 * len(words)
    assert not {"the", "which", "and", "of"} & set(words)
    printing = " ".join(line for cell in cells_of(file, "code") for line in cell["source"] if "print(" in line)
    said = " ".join(re.findall(r'"([^"]*)"', re.sub(r"\{[^}]*\}", "", printing)))
    assert not {"the", "latent", "latents", "tokens", "fires", "none"} & set(re.findall(r"\w+", said.lower()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_outputs_are_stored_and_were_made_in_order(file):
    cells = cells_of(file, "code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert all(cell["outputs"] for cell in cells if re.search(r"(?m)^ *(print|show)\(", "".join(cell["source"])))
    pictures = [output["data"]["image/png"] for output in cells[-1]["outputs"] if "image/png" in output["data"]]
    assert pictures and len(pictures[-1]) < 100_000  # base64
    assert file.stat().st_size < 300_000
    assert not re.search("/(tmp|home|root|work)/", json.dumps(outputs))  # no path of whoever ran it


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_colab_a_notebook_installs_the_wheel_that_was_put_beside_it(file, tmp_path, monkeypatch):
    assert "(https://colab.research.google.com/#upload=true)" in "".join(cells_of(file, "markdown")[1]["source"])
    first, asked = "".join(cells_of(file, "code")[0]["source"]), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.run", lambda command, **_: asked.append(command[-1]))
    exec(first, {})  # elsewhere it does nothing
    monkeypatch.setitem(sys.modules, "google.colab", None)
    with pytest.raises(AssertionError, match=r"dist/sae_italian-\*\.whl"):
        exec(first, {})
    (tmp_path / "sae_italian-0.1.0-py3-none-any.whl").touch()
    exec(first, {})
    assert asked == ["sae_italian-0.1.0-py3-none-any.whl"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_notebooks_import_public_names_alone(file):
    code = "\n".join("".join(cell["source"]) for cell in cells_of(file, "code"))
    found = re.findall(r"(?m)^from (sae_italian\S*) import (.+)$", code)
    assert found
    for module, names in found:
        public = getattr(import_module(module), "__all__", None)
        assert module.count(".") <= 1 and (public is None or {*names.split(", ")} <= {*public}), (module, names)
