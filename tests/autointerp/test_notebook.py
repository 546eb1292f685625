"""The notebook that explains a latent by hand says what it should."""

from tests.notebooks import printed_by, run_notebook


def test_one_latent_is_explained_by_hand(tmp_path, monkeypatch):
    printed = [printed_by(cell) for cell in run_notebook("un_latente_a_mano", tmp_path, monkeypatch)]
    assert "<<" in printed[1] and "same-token" in printed[2] and "it:" in printed[4]
    always = next(line for line in printed[5].splitlines() if line.startswith("always yes"))
    assert "detection/random 0.50" in always
