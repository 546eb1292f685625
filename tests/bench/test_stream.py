"""The tables of whole runs: made of both sides' own objects, with the numbers a reader needs."""

from tests.bench.stream import compare_runs, group_table, measure_group, table_of

SMALL = {"d_sae": 128, "k": 4, "batch_size": 256, "buffer_tokens": 1024, "repeats": 1}


def test_a_run_is_compared_with_the_stock_runner():
    result = compare_runs(**SMALL)
    speeds = result["tokens_per_second"]
    assert result["ratio"] == speeds["ours"]["runs"][0] / speeds["saelens"]["runs"][0] > 0
    assert "ours" in table_of(result) and "saelens" in table_of(result)


def test_a_group_is_compared_with_its_parts():
    result = measure_group(hook_names=("blocks.0.hook_resid_post", "blocks.2.hook_resid_post"), **SMALL)
    assert result["ratios"] == [result["ratio"]] and result["ratio"] > 0
    assert "2 SAEs of 128 latents" in group_table(result)
