"""The notebook that explains a latent by hand says what it should."""

from tests.notebooks import printed_by, run_notebook


def test_one_latent_is_explained_by_hand(tmp_path):
    printed = [printed_by(cell) for cell in run_notebook("un_latente_a_mano", tmp_path)]
    assert "«" in printed[1] and "regola a mano" in printed[2] and "in italiano:" in printed[3]
    assert "spiegazione    detection  random" in printed[4] and "solo il token" in printed[4]
    shuffled = float(printed[4].split()[-1])
    assert abs(shuffled - 0.5) < 0.06  # another latent's explanation says nothing
