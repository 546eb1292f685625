"""The benchmark on the embedded model: known answers, resume, comparison, bad input, and what is written."""

import copy
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from sae_italian.base.errors import DataError, UsageError
from sae_italian.benchmark import all_tasks, benchmark, compare, material, probes, read_entries, run, saebench
from sae_italian.benchmark.board import (
    CONTROLS,
    SORT,
    Difference,
    Entry,
    leaderboard,
    means,
    numbers,
    problems,
    ranks,
    send_to_wandb,
    training_noise,
    write,
)
from sae_italian.benchmark.probes import Activations, Pooling
from sae_italian.benchmark.run import contamination
from sae_italian.benchmark.tasks import LAST_OF, MEAN_OF, Problem, chosen, plan
from sae_italian.cli import main
from tests.benchmark.schema import SCHEMA

TASKS = "M23,M1-negation,P2-number"


@pytest.fixture(scope="module")
def some():
    """The grammar's texts alone, fewer of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, n in {"FORMS": 200}.items():
            patch.setattr(material, name, n)
        passages = {"micro": material.micro_passages(150), "pairs": material.pair_passages(360)}
    return material.Material(passages, {"micro": ["micro-italiano"]})


@pytest.fixture(scope="module")
def tasks():
    return chosen(all_tasks(), "full", TASKS)


@pytest.fixture(scope="module")
def scored(mini, identity_sae, topk_sae, some, tasks, tmp_path_factory):
    """The neurons, which know all that the activations do, and random directions."""
    out = tmp_path_factory.mktemp("benchmark") / "out"
    saes = {"neurons": identity_sae, "random": topk_sae}
    return out, benchmark(saes, mini, some, tasks, out, quick=True, n_seeds=2)


def test_neurons_do_what_the_dense_probe_does_and_form_does_not(scored):
    entries = {entry.name: entry for entry in read_entries(scored[0])}
    assert set(entries) == {"neurons", "random"}
    neurons = entries["neurons"]
    assert set(neurons.problems.index) == {"M23-word", "M1-negation-mean", "M1-negation-last", "P2-number-last"}
    negation = neurons.problems.loc["M1-negation-mean"]
    assert means(negation.own, "auc")["16"] > 0.8 and negation.control["dense"]["auc"] > 0.9
    # a minimal pair differs in its last word, whose characters say nothing of the determiner before
    assert neurons.problems.loc["P2-number-last"].control["form"]["auc"] < 0.75
    assert any(len(set(own["auc"]["16"])) == 2 for own in neurons.problems.own)  # each seed draws its own
    assert neurons.problems.permuted.tolist() == [max(own["permuted"]) for own in neurons.problems.own]
    for own in neurons.problems.own:
        assert abs(np.mean(own["permuted"]) - 0.5) < 0.15
        assert len(own["permuted"]) == 20, "of five, another would exceed the largest once in six times"
        assert own["interval"]["16"][0] <= np.mean(own["auc"]["16"]) <= own["interval"]["16"][1]
        assert sum(own["influence"]["16"].values()) == pytest.approx(0, abs=1e-4)


def test_the_interval_of_a_task_is_that_of_its_mean_over_the_seeds(monkeypatch):
    """Of two draws one ranks all right and one all wrong: the mean 0.5 stands in the table, and 1 is not its interval."""
    answer = np.arange(40) % 2 == 0
    items = pd.DataFrame({"document": [f"d{i // 2}" for i in range(40)], "answer": answer})
    tests = [np.arange(20), np.arange(20, 40)]
    both = [probes.judge(sign * answer[test], answer[test]) for sign, test in zip((1, -1), tests, strict=True)]
    turn = iter((0, 0, 1, 1))  # of each draw the SAE and its twin
    monkeypatch.setattr(probes, "sparse_probes", lambda *_: dict.fromkeys((1, 16), both[next(turn)]))
    monkeypatch.setattr(probes, "matched", lambda *_: 0.0)
    monkeypatch.setattr(probes, "permuted", lambda *_: [0.5])
    problem = Problem(SimpleNamespace(), "word", items, [(test, test) for test in tests], 0.5)  # pyright: ignore
    bench = SimpleNamespace(examples=lambda *_: None, n_permuted=1)
    lo, hi = run.Bench._score(bench, problem, None, None)["interval"]["16"]  # pyright: ignore
    assert 0 < lo < 0.5 < hi < 1


def test_a_random_sae_gains_nothing_over_its_twin(scored):
    random = next(entry for entry in read_entries(scored[0]) if entry.name == "random")
    assert abs(random.estimate("gain_16").value) < 0.1
    score = random.problems.loc["M1-negation-mean"]
    mine, twins = np.mean(score.own["match"], axis=0)
    assert abs(random.estimate("match").value) < 0.2 and 0 < mine < 1
    assert score["match"] == pytest.approx((mine - twins) / (1 - twins))
    older = {key: value for key, value in score.own.items() if key != "match"}
    assert np.isnan(numbers(score.control, older)["match"])


def test_differences_are_paired_and_an_sae_is_not_distinguishable_from_itself(scored):
    a, b = read_entries(scored[0])
    found, back, self = compare(a, b), compare(b, a), compare(a, a)
    assert found.value == pytest.approx(-back.value) and found.least == pytest.approx(back.least)
    assert self.value == 0 and not self.distinguishable and ranks([a, a]) == [1, 1]
    one, other = (entry.by_task("auc_16").to_numpy() for entry in (a, b))
    assert len(one) == 3 and found.least >= 2.8 * np.sqrt(np.var(one - other, ddof=1) / 3)  # documents may add to it


def entry_of(aucs, influence, **control):
    """An SAE by hand: by task its AUC for each seed, and by task the influence of its documents."""
    controls = {name: {"auc": control.get(name, 0.5)} for name in CONTROLS} | {"majority": 0.5}
    rows = {}
    for number, (values, parts) in enumerate(zip(aucs, influence, strict=True)):
        of_k = {"auc": {"16": values}, "twin": {"16": [0.5] * len(values)}, "influence": {"16": parts}}
        own = {**of_k, "interval": {"16": [None, None]}, "permuted": [0.5]}
        task = {"task": f"T{number}", "family": "f", "marked": number == control.get("form_task")}
        rows[f"T{number}-word"] = {**task, **numbers(controls, own), "control": controls, "own": own}
    return Entry("x", {}, pd.DataFrame.from_dict(rows, orient="index"))


@pytest.mark.parametrize(
    ("size", "variance"),
    [
        (0.01, 0.01 + 0.000625 - 0.000475),  # V_tasks + V_documents - V_cells
        (0.1, 0.0625),  # at least V_documents: 0.01 + 0.0625 - 0.0475 is less
    ],
)
def test_the_variance_of_a_difference_by_hand(size, variance):
    """Differences 0.1 and 0.3; cells 3, 1 and -3 halves, of two documents, of which one is in both tasks."""
    a = entry_of([[0.8], [0.9]], [{"d": 2 * size, "e": -3 * size}, {"d": size}])
    b = entry_of([[0.7], [0.6]], [{"d": -size}, {}])
    found = compare(a, b)
    times = student.ppf(0.975, 1)  # of two tasks; 2.8 would tell 22 % of equal SAEs apart
    assert found.value == pytest.approx(0.2) and found.least == pytest.approx(times * np.sqrt(variance))
    assert compare(b, a).value == pytest.approx(-0.2) and Difference(-0.2, 0.1).distinguishable
    seeded = entry_of([[0.79, 0.81], [0.89, 0.91]], [{"d": 2 * size, "e": -3 * size}, {"d": size}])
    told = compare(seeded, entry_of([[0.7, 0.7], [0.6, 0.6]], [{"d": -size}, {}]))  # an sd of 0.02 / sqrt 2 over seeds
    assert told.least == pytest.approx(times * np.sqrt(variance + 0.0002 / 2))


@pytest.mark.parametrize(("n", "most"), [(2, 0.08), (3, 0.08), (12, 0.03)])
def test_equal_saes_are_seldom_told_apart_whatever_the_number_of_tasks(n, most):
    gaps = np.random.default_rng(0).normal(0, 0.05, (200, n))
    pairs = ((entry_of([[0.8 + gap] for gap in own], [{}] * n), entry_of([[0.8]] * n, [{}] * n)) for own in gaps)
    assert np.mean([compare(*pair).distinguishable for pair in pairs]) <= most


def test_a_rank_is_shared_with_its_first_not_with_whoever_stands_before(monkeypatch):
    def told(a, b):
        return SimpleNamespace(distinguishable=b - a > 1)

    monkeypatch.setattr("sae_italian.benchmark.board.compare", told)
    assert ranks([0, 1, 2, 3]) == [1, 1, 3, 3]  # pyright: ignore[reportArgumentType]


def test_a_mean_leaves_out_tasks_of_form_and_selectivity_takes_the_better_control():
    entry = entry_of([[0.8], [1.0]], [{}, {}], form=0.6, tokens=0.7, form_task=1)
    assert entry.estimate("auc_16").value == pytest.approx(0.8) and entry.estimate("auc_16", "f").value == 0.9
    assert entry.estimate("selectivity").value == pytest.approx(0.1)


def test_what_is_done_is_not_done_again_and_a_further_sae_costs_its_own(
    scored, mini, identity_sae, topk_sae, some, tasks, tmp_path, monkeypatch
):
    out = shutil.copytree(scored[0], tmp_path / "out")
    results = sorted((out / "blocks.2.hook_resid_post" / "saes").glob("neurons*/results.*.json"))
    kept, gone = results[0].read_bytes(), results[1].read_bytes()
    results[1].unlink()  # as if it had been killed there
    before = {file: file.stat().st_mtime_ns for file in out.rglob("part-*.npy")}
    benchmark({"neurons": identity_sae, "also": topk_sae}, mini, some, tasks, out, quick=True, n_seeds=2, resume=True)
    assert results[0].read_bytes() == kept and results[1].read_bytes() == gone
    assert {file: file.stat().st_mtime_ns for file in out.rglob("part-*.npy")} == before
    assert [entry.name for entry in read_entries(out)] != [] and {e.name for e in read_entries(out)} == {
        "neurons",
        "random",
        "also",
    }
    # the whole again by one process: what several have written before is the same to the byte
    monkeypatch.setattr(run, "PROCESSORS", 1)
    alone = tmp_path / "alone"
    benchmark({"neurons": identity_sae}, mini, some, tasks, alone, quick=True, n_seeds=2)
    for file in (*alone.rglob("neurons*/results.*.json"), *alone.rglob("controls/results.*.json")):
        assert file.read_bytes() == (out / file.relative_to(alone)).read_bytes(), file.name
    with pytest.raises(UsageError, match="--resume"):
        benchmark({"neurons": identity_sae}, mini, some, tasks, out, quick=True, n_seeds=2)
    with pytest.raises(UsageError, match="another benchmark run"):
        benchmark({"neurons": identity_sae}, mini, some, tasks, out, quick=True, n_seeds=3, resume=True)


def test_activations_of_another_revision_are_refused(scored, mini, identity_sae, some, tasks, tmp_path, monkeypatch):
    out = shutil.copytree(scored[0], tmp_path / "out")
    file = out / "blocks.2.hook_resid_post" / "activations" / "manifest.json"
    held = json.loads(file.read_text())
    file.write_text(json.dumps(held | {"revision": "abc"}))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match="revision was 'abc', is now None"):
        benchmark({"neurons": identity_sae}, mini, some, tasks, "~/out", quick=True, n_seeds=2, resume=True)


def test_saes_that_do_not_belong_are_refused(mini, identity_sae, some, tasks, tmp_path):
    other, transcoder = copy.deepcopy(identity_sae), copy.deepcopy(identity_sae)
    other.cfg.metadata.model_name = "minerva-350m"
    transcoder.cfg.metadata.hook_name_out = "blocks.2.hook_mlp_out"
    for sae, message in ((other, "trained on 'minerva-350m'"), (transcoder, "is a transcoder")):
        with pytest.raises(UsageError, match=message):
            benchmark({"x": sae}, mini, some, tasks, tmp_path / "out")
    for unnamed in (identity_sae, [identity_sae]):
        with pytest.raises(UsageError, match="no SAE was given by name"):
            benchmark(unnamed, mini, some, tasks, tmp_path / "out")
    with pytest.raises(UsageError, match="no task can be run: too few balanced examples a class; W2"):
        benchmark(
            {"x": identity_sae},
            mini,
            some._replace(passages={"ud": []}),
            chosen(all_tasks(), "full", "W2"),
            tmp_path / "o",
        )


def test_texts_of_the_saes_training_are_named(identity_sae, some):
    assert contamination(identity_sae, some) == ["micro"]
    assert contamination(identity_sae, some._replace(corpora={"micro": ["/data/notizie.jsonl"]})) == []
    mixed = copy.deepcopy(identity_sae)
    mixed.cfg.metadata.dataset_path = "0.7*/data/leggi,0.3*/data/notizie.jsonl"
    assert contamination(mixed, some._replace(corpora={"micro": ["/data/leggi/codici.jsonl"]})) == ["micro"]
    assert contamination(mixed, some._replace(corpora={"micro": ["/data/altro.jsonl,/data/notizie.jsonl"]})) == [
        "micro"
    ]
    assert contamination(mixed, some) == []


def test_the_report_says_what_it_can_tell_apart_and_saebench_reads_it(scored):
    out, told = scored
    entries = read_entries(out)
    board = write(out, entries, told)
    assert [row[1] for row in board.rows] == [entry.name for entry in entries]
    assert any("distinguishable" in note or "could be told apart" in note for note in board.notes)
    page = (out / "benchmark.html").read_text(encoding="utf-8")
    assert "http" not in page and "Selettività" in page
    for entry in entries:
        jsonschema.validate(saebench(entry), SCHEMA)
        marked = [row[1].endswith(" *") for row in problems(entry).rows]  # that few examples say little
        assert marked == [control["n_test"] < 80 for control in entry.problems.control]
    (file, *_) = (out / "saebench").iterdir()
    written = json.loads(file.read_text())
    assert written["eval_type_id"] not in ("sparse_probing", "sparse_probing_sae_probes")
    assert all(name.startswith("it_") for name in written["eval_config"]["dataset_names"])
    assert written["sae_metrics_by_k"]["16"]["test_auc"] == pytest.approx(
        np.mean([d["sae_metrics_by_k"]["16"]["test_auc"] for d in written["eval_result_details"]])
    )


def test_wandb_gets_two_tables(scored, tmp_path, monkeypatch):
    """Offline, without a login, as everywhere."""
    logged = {}

    class Run:
        offline = True

        def log(self, tables):
            logged.update(tables)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("wandb.login", lambda **_: False)
    monkeypatch.setattr("wandb.init", lambda **given: logged.update(given) or Run())
    assert send_to_wandb(read_entries(scored[0]), "gruppo/prova", tmp_path) == "W&B project gruppo/prova"
    assert (logged["mode"], logged["entity"], logged["project"]) == ("offline", "gruppo", "prova")
    assert len(logged["benchmark/saes"].data) == 2
    assert len(logged["benchmark/problems"].data) == 8 and "selectivity" in logged["benchmark/saes"].columns


def test_match_and_majority_are_of_the_frequency_among_all_examples(mini, topk_sae, some, monkeypatch, tmp_path):
    """Not of that among the texts that are read, which hold more of what is rare."""
    asked, matched = set(), run.probes.matched
    monkeypatch.setattr(run, "PROCESSORS", 1)  # in this process, where it is heard what is asked
    monkeypatch.setattr(
        run.probes, "matched", lambda drawn, frequency: asked.add(frequency) or matched(drawn, frequency)
    )
    wanted = chosen(all_tasks(), "full", "M1-negation")
    benchmark({"random": topk_sae}, mini, some, wanted, tmp_path / "out", quick=True, n_seeds=1)
    problem = plan(some, wanted, run.QUICK).problems[0]
    assert asked == {problem.frequency} and problem.frequency != problem.answer.mean()
    (entry,) = read_entries(tmp_path / "out")
    for control in entry.problems.control:
        assert control["majority"] == pytest.approx(max(problem.frequency, 1 - problem.frequency))


def test_a_leaderboard_of_a_folder_keeps_other_examples_apart(scored, tmp_path, monkeypatch):
    for name in ("a", "b"):
        shutil.copytree(scored[0], tmp_path / "all" / name)
    file = tmp_path / "all" / "b" / "run_settings.json"
    settings = json.loads(file.read_text())
    other_tasks = {**settings["tasks"], "W1": {}}  # more tasks read more texts, of which the same task draws others
    for other in ({"seeds": 9}, {"tasks": other_tasks}):
        file.write_text(json.dumps(settings | other))
        boards = leaderboard(tmp_path / "all")
        assert [len(board.rows) for board in boards] == [2, 2]
    assert (tmp_path / "all" / "leaderboard.html").is_file()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert leaderboard("~/all") == boards
    with pytest.raises(UsageError, match="holds no results"):
        leaderboard(tmp_path)


def test_training_noise_is_that_of_seeds(scored):
    a, b = read_entries(scored[0])
    named = [copy.copy(entry) for entry in (a, b)]
    for i, entry in enumerate(named):
        object.__setattr__(entry, "name", f"topk-seed{i}")
    values = [entry.estimate("auc_16").value for entry in (a, b)]
    for first in ("topk-seed0", "topk"):  # as `seeds: 3` names them: the first by the folder, the others behind it
        object.__setattr__(named[0], "name", first)
        ((name, (sd, n)),) = training_noise([*named, named[0]]).items()
        assert name == "topk" and n == 2 and sd == pytest.approx(np.std(values, ddof=1))
    assert not training_noise([a, b]) and not training_noise([named[0], named[0]])
    for names in (("features4096", "features8192"), ("topk-s16", "topk-s32")):  # not seeds
        for entry, name in zip(named, names, strict=True):
            object.__setattr__(entry, "name", name)
        assert not training_noise(named)


def test_the_noise_of_seeds_is_that_of_the_mean_that_is_shown(scored):
    """Of the mean over tasks, whose poolings are averaged first; not of the mean over problems."""
    entry = read_entries(scored[0])[0]
    tasks = [np.mean([own["auc"]["16"] for own in some.own], axis=0) for _, some in entry.tasks().groupby("task")]
    assert len(tasks) == 3 < len(entry.problems)
    assert np.mean(tasks) == pytest.approx(entry.estimate("auc_16").value)
    assert entry.reseed == pytest.approx(np.std(np.mean(tasks, axis=0), ddof=1))


def test_what_one_draw_and_one_task_cannot_tell_is_a_dash_and_null_and_never_nan(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(Entry, "reseed", np.nan)  # of `seeds=1`
    entries = [
        replace(one, problems=one.problems.iloc[:1].assign(lo=np.nan, match=np.nan)) for one in read_entries(scored[0])
    ]
    board = write(tmp_path, entries, scored[1])
    place = board.head.index("Reseed noise (sd)")
    assert [row[place] for row in board.rows] == ["-", "-"]
    for file in tmp_path.rglob("*.*"):
        assert not re.search(r"\bNaN|\bnan\b|\+nan", file.read_text(encoding="utf-8")), file
    rows = json.loads((tmp_path / "benchmark.json").read_text())["saes"]
    assert rows[0]["reseed"] is None and rows[0]["match"] == {"value": None, "lo": None, "hi": None}


@pytest.mark.skipif(not shutil.which("node"), reason="node is absent: apt-get install nodejs")
def test_a_column_is_sorted_by_its_numbers_0_among_them():
    """On the least of a page: a table whose rows are told apart by their only cell."""
    page = """const row = text => ({children: [{textContent: text}]});
const rows = ["-", "-0.300 (-0.400 to -0.200)", "0.000", "0.512"].map(row), told = [];
const table = {tBodies: [{rows, append: row => told.push(row.children[0].textContent)}]};
const head = {closest: () => table, setAttribute: () => 0}; head.parentNode = {children: [head]};
const document = {querySelectorAll: () => [head]};"""
    done = subprocess.run(
        ["node", "-e", f"{page}{SORT};head.onclick();console.log(told.join('|'))"], capture_output=True
    )
    assert done.stdout.decode().strip() == "0.512|0.000|-0.300 (-0.400 to -0.200)|-", done.stderr


def test_a_tokenizer_that_splits_every_word_is_read_at_the_words_end(monkeypatch):
    text = "La casa è bella."
    spans = np.array([[i, i + 1] for i in range(len(text)) if text[i] != " "])
    acts = Activations(Path(), [[0]], [np.arange(len(spans))], [spans])
    x = np.eye(len(spans), dtype=np.float32)
    monkeypatch.setattr(Activations, "parts", lambda _: iter([([0], x)]))
    pool = Pooling(acts, [text], [(0, 7), (0, MEAN_OF), (0, LAST_OF)])
    dense = pool.dense()
    assert dense[pool.rows[0, 7]].argmax() == 5 and dense[pool.rows[0, LAST_OF]].argmax() == 11  # ends of casa, bella
    assert Pooling(acts, [text], [(0, 1)]).ids.tolist() == [[0, -1]]  # nothing stands before the first token
    assert dense[pool.rows[0, MEAN_OF]].tolist() == pytest.approx([1 / 12] * 12 + [0])  # without the final mark


def test_the_command_runs_and_says_it_as_json(trained_sae, tmp_path, capsys):
    out = tmp_path / "out"
    words = [
        "benchmark",
        str(trained_sae),
        "tasks=P2-number,P1-number",
        "seeds=2",
        "baselines=pca,twin",
        "--out",
        str(out),
    ]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == 3 and (out / "benchmark.md").is_file()
    assert main(words) == 2 and "--resume" in capsys.readouterr().err
    assert main(["benchmark", "--out", str(out)]) == 0
    assert "pca-topk" in capsys.readouterr().out
    assert main(["benchmark", str(trained_sae), "tasks=P9", "--out", str(out)]) == 2
    assert "'P9' is unknown" in capsys.readouterr().err
    assert main(["benchmark", "no-such-sae", "baselines=pac", "--out", str(out)]) == 2
    assert "'pac' is unknown. Did you mean 'pca'?" in capsys.readouterr().err  # before anything is read
