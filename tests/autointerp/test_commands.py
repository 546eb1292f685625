"""The command `autointerp` where it scores with models, and the bench of explanations by rule, on a planted cache."""

import shutil

from tests.bench.autointerp import measure, table_of
from tests.test_cli import run


def test_bench_counts_latents_a_second(planted):
    result = measure(planted.folder, latents=12, repeats=2, workers=1)
    assert result["n_latents"] == 12 and 8 <= result["n_scored"] <= 12
    assert result["latents_per_second"] > 0 and len(result["all_latents_per_second"]) == 2
    assert "| latents a second, 1 processes |" in table_of(result)


def test_what_a_model_cannot_score_is_one_line(capsys, planted, tmp_path):
    bare = shutil.copytree(planted.folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.sqlite*"))
    for arguments, expected in (
        (["nowhere", "--subject"], "not a feature cache"),
        ([bare, "--subject"], "has no explanations yet; run `sae-italian autointerp"),
        ([bare, "--encoder", tmp_path], "no explanations yet"),
        ([planted.folder, "n_scored=0", "--subject"], "n_scored is 0; it should be greater than or equal to 1"),
        ([planted.folder, "--n-latents", 3, "--encoder", "n-grams"], "--overwrite and --n-latents are of explanations"),
        ([planted.folder, "--overwrite", "--subject"], "With --encoder, --subject: n_scored=N"),
        ([planted.folder, "--n-latents", 0], "--n-latents is 0; it must be >= 1"),
        ([planted.folder, "--latents", 3], "--latents is now --n-latents"),
    ):
        code, _, err = run(capsys, "autointerp", *arguments)
        assert code == 2 and expected in err and len(err.strip().splitlines()) == 1, err
