"""A whole run from the command line: a stand-in model explains and judges real latents beside the rules."""

import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest

from sae_italian.autointerp import run_autointerp
from sae_italian.autointerp.llm.askers import LLMExplainer, LLMJudge
from sae_italian.autointerp.run import EXPLAINER, STORE_FILE, AutointerpConfig
from sae_italian.autointerp.store import Store
from sae_italian.autointerp.summary import side_by_side
from sae_italian.cache import FeatureCache
from sae_italian.cli import main
from sae_italian.corpora.packing import NO_DOCUMENT
from tests.autointerp.llm.endpoint import FakeEndpoint, passages
from tests.planted import planted_cache

N = 4
SCORERS = "SELECT DISTINCT scorer FROM score WHERE judge LIKE 'llm%'"


@pytest.fixture(scope="module")
def planted(small_cache, mini, tmp_path_factory):
    """Latents on one frequent word each, and one that never fires."""
    base = FeatureCache.open(small_cache)
    strings = mini.tokenizer.convert_ids_to_tokens(range(len(mini.tokenizer)))
    ids, counts = np.unique(base.tokens[base.doc != NO_DOCUMENT], return_counts=True)
    words = [i for i in ids[np.argsort(-counts)] if re.fullmatch("▁[a-z]{3,}", strings[i])][3 : 3 + N]
    latents = [np.flatnonzero(base.tokens == word) for word in words]
    folder = tmp_path_factory.mktemp("llm") / "c"
    cache = planted_cache(base, folder, [*latents, np.empty(0, dtype=np.int64)], mini)
    cache.manifest.sae = "planted"  # there is no such SAE to load
    cache.manifest.save(folder)
    return cache


def reader(body):
    """A model that explains by the word that is marked most often, and judges by looking for the quoted word."""
    question = body["messages"][-1]["content"]
    lines = re.findall(r"^\d+\. (.*)$", question, flags=re.MULTILINE)
    if "Spiegazione: " not in question:
        marked = Counter(re.findall(r"<<(.*?)>>", question))
        return json.dumps({"spiegazione": f"la parola «{marked.most_common(1)[0][0]}», in qualunque frase si trovi"})
    word = re.search(r"Spiegazione: .*?«(.*?)»", question)[1]
    if "Token (" in question:
        return json.dumps({"valori": [10 * (line.strip("«» ") == word) for line in lines]})
    shown = [re.findall(r"<<(.*?)>>", line) or re.findall(r"\w+", line) for line in lines]
    return json.dumps({"risposte": [int(word in words) for words in shown]})


def run(cache, endpoint, *more):
    command = ["autointerp", str(cache.folder), "--no-random-control", "--explainer", "llm", "--llm-model", "prova"]
    where = [] if "--endpoint" in more else ["--endpoint", endpoint.url]
    return main([*command, *where, *more])


def test_an_llm_explains_and_judges_beside_the_rules(planted, prices, capsys):
    with FakeEndpoint(reader) as endpoint:
        assert run(planted, endpoint, "--estimate", "--json", f"prices={prices}") == 0
        estimate = json.loads(capsys.readouterr().out)
        assert endpoint.requests == [] and not (planted.folder / STORE_FILE).exists()

        # a budget that ends amid the run: one line, and what was paid stays
        assert run(planted, endpoint, "--max-usd", "2", f"prices={prices}") == 2
        error = capsys.readouterr().err
        assert "of --max-usd are gone" in error and error.count("\n") == 1
        assert endpoint.requests  # some latent's question could be paid

        assert run(planted, endpoint, "--json") == 0
        result = json.loads(capsys.readouterr().out)["llm"]
        asked = len(endpoint.requests)
        assert len({json.dumps(body) for body in endpoint.requests}) == asked  # nothing was paid for twice
        assert estimate["calls"] == pytest.approx(asked, rel=0.1) and estimate["usd"] is not None

        assert run(planted, endpoint) == 0  # a rerun asks nothing
        text = capsys.readouterr().out
        assert run(planted, endpoint, "--estimate", "--overwrite", "--json") == 0  # and forgets nothing: see below
        assert len(endpoint.requests) == asked
    rule, llm = result["summaries"]
    assert (rule["explainer"], rule["judge"], llm["explainer"]) == (EXPLAINER, "rule", "llm:prova:it1")
    assert llm["judge"] == "llm:prova:it1" and llm["n_explained"] == N
    assert llm["detection"]["value"] > 0.95 and llm["by_negatives"]["fuzzing"]["silent-token"]["value"] > 0.95
    assert llm["simulation"]["value"] > 0.95 and llm["shuffled_detection"]["value"] < 0.7
    table = " ".join(text.split())
    assert f"{EXPLAINER} rule 4 " in table and "llm:prova:it1 llm:prova:it1 4 " in table
    assert result["endpoint_without"] == {"logprobs": "the answers carry none"}
    with Store(planted.folder / STORE_FILE, {}) as store:
        explanations = store.explanations("llm:prova:it1")
        assert [explanation.status for explanation in explanations.values()] == ["ok"] * N + ["dead"]
        assert N not in store.scored("llm:prova:it1", "llm:prova:it1") and "endpoint without logprobs" in store.notes()
        judgements = store.connection.execute(
            "SELECT latent, negatives, count(*), count(DISTINCT example), count(DISTINCT first), sum(said < 0) FROM judgement "
            "WHERE scorer = 'detection' AND control = '' AND negatives IN ('', 'random') GROUP BY latent, negatives"
        ).fetchall()
        scores = store.connection.execute(
            "SELECT latent, n_positive, n_negative, n_failed FROM score WHERE judge LIKE 'llm%' AND scorer = 'detection' "
            "AND metric = 'balanced_accuracy' AND negatives = 'random' AND control = '' ORDER BY latent"
        ).fetchall()
    # each example shown once, judged once and counted once: every positive of these latents has its random negative
    judged = {(latent, negatives): counts for latent, negatives, *counts in judgements}
    assert [latent for latent, *_ in scores] == list(range(N))
    for latent, n_positive, n_negative, n_failed in scores:
        assert judged[latent, ""] == [n_positive] * 3 + [0] and judged[latent, "random"] == [n_negative] * 3 + [0]
        assert 10 < n_positive == n_negative <= AutointerpConfig().n_examples and n_failed == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--judge", "rule"], "cannot read a text"),
        (["--max-usd", "0"], "--max-usd is 0"),
        (["--max-usd", "nan"], "--max-usd is nan"),
        (["timeout=0"], "timeout is 0"),
        (["timeout=-3"], "timeout is -3"),
        (["--endpoint", "localhost:1"], "a URL such as"),
        (["--max-usd", "1"], "no price for 'prova'"),
        (["concurrency=0"], "concurrency is 0"),
        (["key_env=NON_CE_LA"], "no NON_CE_LA"),
    ],
)
def test_options_that_cannot_be_are_one_line(planted, capsys, monkeypatch, more, words):
    """... and are told before any work is done."""
    monkeypatch.setattr(
        "sae_italian.quickstart.analyse", lambda *_, **__: pytest.fail("the rules were worked out first")
    )
    with FakeEndpoint(reader) as endpoint:
        assert run(planted, endpoint, *more) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert main(["autointerp", str(planted.folder), "--endpoint", "http://x"]) == 2
    assert main(["autointerp", str(planted.folder), "--explainer", "llm", "--endpoint", "http://x"]) == 2


def test_a_try_that_came_to_nothing_does_not_bind_the_next_one(planted, capsys, tmp_path):
    """A context in which no prompt fits ends in one line; with the right one the run goes on in the same store."""
    cache = FeatureCache.open(shutil.copytree(planted.folder, tmp_path / "c", ignore=shutil.ignore_patterns("auto*")))
    with FakeEndpoint(reader) as endpoint:
        assert run(cache, endpoint, "context_tokens=200") == 2
        error = capsys.readouterr().err
        assert "do not fit into the context" in error and error.count("\n") == 1 and endpoint.requests == []
        assert run(cache, endpoint, "context_tokens=1500") == 0
    with Store(cache.folder / STORE_FILE, {}) as store:
        explanation = store.explanations("llm:prova:it1")[0]
    assert explanation.status == "ok" and explanation.notes["examples"] < 20
    assert explanation.notes["examples"] + explanation.notes["examples_dropped"] == 20


def test_work_under_other_settings_is_refused_and_exports_come_from_the_command(planted, capsys, tmp_path):
    with FakeEndpoint(reader) as endpoint:
        assert run(planted, endpoint) == 0
        assert run(planted, endpoint, "shown=top") == 2
        assert "with other settings (shown)" in capsys.readouterr().err
    assert main(["export", str(planted.folder), "--to", "jsonl", "--out", str(tmp_path / "e")]) == 0
    assert "parola" in (tmp_path / "e" / "explanation.jsonl").read_text("utf-8")
    assert main(["export", str(planted.folder)]) == 2
    assert passages((tmp_path / "e" / "call.jsonl").read_text("utf-8")) == 0


def test_only_the_scores_that_are_wanted_are_asked_for(planted, capsys, tmp_path):
    cache = FeatureCache.open(shutil.copytree(planted.folder, tmp_path / "c", ignore=shutil.ignore_patterns("auto*")))
    with FakeEndpoint(reader) as endpoint:
        assert run(cache, endpoint, "scores=[detection]", "--json") == 0
        few = len(endpoint.requests)
        questions = {body["messages"][-1]["content"] for body in endpoint.requests}
        judged = [question for question in questions if "Spiegazione: " in question]
        assert judged and not any("<<" in question or "Token (" in question for question in judged)
        with Store(cache.folder / STORE_FILE, {}) as store:
            assert {row[0] for row in store.connection.execute(SCORERS)} == {"detection"}
        assert run(cache, endpoint) == 2 and "with other settings (scores)" in capsys.readouterr().err
        assert run(cache, endpoint, "--overwrite") == 0
        assert len(endpoint.requests) > few + len(judged)  # and what was paid is not asked again
        again = {body["messages"][-1]["content"] for body in endpoint.requests[few:]}
        assert not again & {*judged}
    with Store(cache.folder / STORE_FILE, {}) as store:
        assert {row[0] for row in store.connection.execute(SCORERS)} == {"detection", "fuzzing", "simulation"}
    assert run(cache, endpoint, "scores=[detecton]") == 2


def test_judgements_that_are_all_unusable_leave_the_figures_empty(planted, capsys, tmp_path):
    """A model that explains and cannot judge: said in the table, not an error after all its calls."""
    cache = FeatureCache.open(shutil.copytree(planted.folder, tmp_path / "c", ignore=shutil.ignore_patterns("auto*")))

    few = "n_examples=15"  # a question that stays unusable is asked in all its parts, and each of them twice

    def unable(body):
        return "non saprei" if "Spiegazione: " in str(body["messages"]) else reader(body)

    with FakeEndpoint(unable) as endpoint:
        assert run(cache, endpoint, few) == 0
        text = capsys.readouterr().out
        assert run(cache, endpoint, few, "--json") == 0
    rule, llm = json.loads(capsys.readouterr().out)["llm"]["summaries"]
    assert llm["n_explained"] == N and llm["detection"]["value"] is None and rule["detection"]["value"] is not None
    assert "llm:prova:it1 llm:prova:it1 0 -" in " ".join(text.split())
    # what became of the questions, and why
    told = re.search(r"^calls: (.*)$", text, flags=re.MULTILINE)[1]
    assert re.match(r"(\d+) asked, \1 answered, 0 refused, 0 failed, \d+ from ledger, [1-9]\d* unreadable, 0 cut", told)
    assert re.search(r"^[1-9]\d* x unreadable: the form asked for cannot be found in it$", text, flags=re.MULTILINE)


def test_a_latent_judged_on_too_few_examples_for_a_score_is_not_judged_again(small_cache, mini, client_of, tmp_path):
    """One that is nearly always on has no silent segments; what was judged of it could not be stored a second time."""
    base = FeatureCache.open(small_cache)
    dense = planted_cache(base, tmp_path / "c", [np.flatnonzero(base.doc != NO_DOCUMENT)[::2]], mini)
    for _ in range(2):
        with FakeEndpoint() as endpoint, client_of(endpoint, scores=("detection",)) as client:
            run_autointerp(dense, mini.tokenizer, explainers=[LLMExplainer(client)], judges=[LLMJudge(client)])
    assert endpoint.requests == [] and client.counts["from ledger"] == 0
    with Store(dense.folder / STORE_FILE, {}) as store:
        judged = store.connection.execute("SELECT DISTINCT judge FROM judgement").fetchall()
        assert judged == [(LLMJudge(client).name,)] and "llm" not in str(store.judged()[0])


def test_a_simulation_that_the_endpoint_failed_on_is_asked_again_and_stands_in_the_table(
    planted, mini, client_of, tmp_path
):
    """It was taken for done, with the failed example left out of its score for good."""
    store, config = tmp_path / "store", AutointerpConfig(n_examples=10, latents=2)
    how = {"concurrency": 1, "attempts": 1, "scores": ("simulation",)}
    failed = "SELECT max(n_failed) FROM score WHERE judge LIKE 'llm:%' AND metric = 'correlation'"

    def busy(n, body):
        return "500" if n in (4, 5) else None  # a question, and once more without its schema

    for fault, asked, n_failed in ((busy, None, 1), (lambda n, body: None, 1, 0), (busy, 0, 0)):
        with FakeEndpoint(reader, fault) as endpoint, client_of(endpoint, **how) as client:
            judge = LLMJudge(client)
            run_autointerp(
                planted, mini.tokenizer, config, store=store, explainers=[LLMExplainer(client)], judges=[judge]
            )
        assert asked is None or len(endpoint.requests) == asked
        with Store(store, {}) as opened:
            assert opened.connection.execute(failed).fetchone() == (n_failed,)
    assert [summary.judge for summary in side_by_side(store)] == ["rule", judge.name]
