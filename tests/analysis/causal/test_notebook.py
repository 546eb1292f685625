"""The notebook on the indirect object says what it should."""

from tests.notebooks import printed_by, run_notebook


def test_ioi_in_italiano_is_walked_through(tmp_path):
    printed = [printed_by(cell) for cell in run_notebook("ioi_in_italiano", tmp_path)]
    assert "…" in printed[0] and "giuste" in printed[1]
    before, after = (float(part.split()[-1]) for part in printed[3].split(" nat")[0].split("->"))
    assert after < before / 2
    assert "Spearman" in printed[3] and "casuale" in printed[4] and "meno probabili" in printed[5]
