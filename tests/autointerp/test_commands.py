"""The commands `scores` and `bench autointerp` on a planted cache."""

import json

from tests.test_cli import run


def test_bench_counts_latents_a_second(capsys, planted):
    code, out, _ = run(
        capsys, "bench", "autointerp", planted.folder, "--latents", 12, "--repeats", 2, "--workers", 1, "--json"
    )
    result = json.loads(out)
    assert code == 0 and result["n_latents"] == 12 and 8 <= result["n_scored"] <= 12
    assert result["latents_per_second"] > 0 and len(result["all_latents_per_second"]) == 2
    assert run(capsys, "bench", "autointerp", planted.folder, "--workers", 0)[0] == 2


def test_scores_says_what_it_needs(capsys, planted, tmp_path):
    for arguments, expected in (
        ([planted.folder], "--encoder"),
        (["nowhere", "--subject"], "not a feature cache"),
        ([planted.folder, "--subject", "--latents", 0], "must be 1 or more"),
    ):
        code, _, err = run(capsys, "scores", *arguments)
        assert code == 2 and expected in err and len(err.strip().splitlines()) == 1
