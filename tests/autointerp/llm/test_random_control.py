"""The untrained control with an LLM: the same explainer and judge, one ledger, one budget, counted beforehand."""

import json
import shutil

import pytest

from sae_italian.autointerp.run import STORE_FILE, TWIN_FOLDER
from sae_italian.autointerp.store import Store
from sae_italian.cli import main
from tests.autointerp.llm.endpoint import FakeEndpoint
from tests.autointerp.llm.test_run import reader

N = 3
NAME = "llm:prova:it1"


def rows(path, table):
    with Store(path, {}) as store:
        return store.connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()


def test_the_random_twin_is_explained_and_judged_like_the_trained_sae(small_cache, prices, tmp_path, capsys):
    cache = shutil.copytree(small_cache, tmp_path / "cache", ignore=shutil.ignore_patterns("autointerp*", TWIN_FOLDER))
    store, twin = cache / STORE_FILE, cache / TWIN_FOLDER / STORE_FILE

    with FakeEndpoint(reader) as endpoint:

        def run(*more):
            command = [
                "autointerp",
                str(cache),
                f"prices={prices}",
                "--n-latents",
                str(N),
                "--explainer",
                "llm",
                "--llm-model",
                "prova",
            ]
            code = main([*command, "--endpoint", endpoint.url, *more])
            return code, *capsys.readouterr()

        # before there is a twin it is taken to be as much again; nothing is sent, nothing built
        estimate = json.loads(run("--estimate", "--json")[1])
        alone = json.loads(run("--estimate", "--json", "--no-random-control")[1])
        assert (estimate["latents"], estimate["of_random"], estimate["calls"]) == (2 * N, N, 2 * alone["calls"])
        assert estimate["usd"] == pytest.approx(2 * alone["usd"]) and alone["of_random"] == 0
        assert f"of_random {N}" in " ".join(run("--estimate")[1].split())
        assert endpoint.requests == [] and not twin.exists() and not store.exists()

        assert run("--no-random-control")[0] == 0
        for_main = len(endpoint.requests)
        assert not twin.exists()
        scores = rows(store, "score")

        # the budget holds for the control too; what the trained SAE has stays
        code, _, error = run("--max-usd", "2")
        assert code == 2 and "of --max-usd are gone" in error and error.count("\n") == 1
        assert rows(store, "score") == scores and len(rows(twin, "explanation")) >= 2 * N

        code, out, _ = run("--json")
        assert code == 0
        result = json.loads(out)["llm"]
        asked = len(endpoint.requests)
        code, text, _ = run()
        assert code == 0 and len(endpoint.requests) == asked  # a rerun asks nothing
        estimate = json.loads(run("--estimate", "--json")[1])
        assert estimate["calls"] == pytest.approx(asked, rel=0.1) and len(endpoint.requests) == asked

    rule, llm = result["random"]
    assert (rule["explainer"], llm["explainer"], llm["judge"]) == ("rules", NAME, NAME)
    assert llm["n_latents"] == N and llm["n_explained"] >= 1 and llm["shuffled_detection"]["value"] is not None
    table = " ".join(text.split())
    assert f"{NAME}, random SAE {NAME} " in table and f"{NAME} {NAME} " in table
    assert len(rows(store, "call")) == asked > for_main and rows(twin, "call") == []  # one account
    assert result["spending"]["prova"]["calls"] == asked
