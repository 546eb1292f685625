"""The notebook on the indirect object says what it should."""

from tests.notebooks import printed_by, run_notebook


def test_ioi_in_italian_is_walked_through(tmp_path, monkeypatch):
    printed = [printed_by(cell) for cell in run_notebook("ioi_in_italiano", tmp_path, monkeypatch)]
    assert "…" in printed[0] and "right" in printed[1] and "KL to the counterfactual" in printed[3]
    before, after = (float(part.split()[-1]) for part in printed[3].split("KL to")[1].split(" nats")[0].split("->"))
    assert after < before / 2
    assert "Spearman" in printed[4] and "| random |" in printed[5] and "| logits that fall |" in printed[6]
