"""Each paper's whole evaluation on the embedded model with tiny budgets; resuming, skipping, bad input, the report."""

import copy
import html
import json
import sys
from math import log
from types import SimpleNamespace

import pytest

from sae_italian.base.errors import UsageError
from sae_italian.base.pace import paced, time_bound
from sae_italian.cli import main
from sae_italian.papers import Settings, compare_baselines, reproduce
from sae_italian.papers.job import Reproduction, Subject, open_subject, paper, run_steps
from sae_italian.papers.reproduce import STEPS
from sae_italian.saes import load_sae

TINY = {
    "clic-it-2025": (
        "train_tokens=12288",
        "expansion=2",
        "card_tokens=1000",
        "cache_tokens=10000",
        "latents=8",
        "examples=6",
    ),
    "cunningham-2023": (
        "layers=[1]",
        "train_tokens=12288",
        "sweep_tokens=4096",
        "l1=[4.0]",
        "ratios=[]",
        "kinds=[pca]",
        "fit_tokens=4000",
        "card_tokens=1000",
        "cache_tokens=8000",
        "latents=8",
        "ioi_pairs=2",
        "ioi_thresholds=2",
    ),
    "llama-scope": (
        "sites=[R, TC]",
        "expansions=[2, 4]",
        "train_tokens=10240",
        "compare_tokens=4096",
        "card_tokens=1000",
        "loss_tokens=500",
        "cache_tokens=8000",
        "latents=8",
        "shift_tokens=2000",
    ),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Run each paper once."""
    made = {}

    def run(name):
        if name not in made:
            out = tmp_path_factory.mktemp("papers") / name
            made[name] = out, reproduce(name, out, *TINY[name])
        return made[name]

    return run


def check_report(out, report, name):
    """What every report must hold, whatever the numbers are."""
    saved = json.loads((out / "report.json").read_text())
    assert saved["paper"]["name"] == name and saved["budget"] == report["budget"]
    assert [*STEPS[name]] == list(saved["steps"])
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    for figure in paper(name).figures:
        assert figure["what"]["en"] in text and html.escape(str(figure["value"])) in page, figure
    pictures = sorted((out / "pictures").iterdir())
    assert pictures and page.count("<svg") == len(pictures)
    assert all(f"(pictures/{picture.name})" in text for picture in pictures)
    assert "svg" not in json.dumps(list(saved["steps"])) and '"svg"' not in (out / "report.json").read_text()


def ours(report):
    return {row["what"]: row["ours"] for row in report["figures"]}


def test_clic_it(done):
    out, report = done("clic-it-2025")
    check_report(out, report, "clic-it-2025")
    steps = report["steps"]
    assert steps["sae"]["layer"] == 2 and steps["sae"]["d_sae"] == 256 and steps["sae"]["architecture"] == "topk"
    assert steps["card"]["l0"]["value"] == pytest.approx(8, abs=0.2)
    assert steps["scores"]["autointerp"]["n_latents"] == 8
    assert steps["scores"]["random"]["n_latents"] == 8
    assert ours(report)["Layer"] == "2" and ours(report)["Detection"] != "-"
    shown = steps["examples"]["examples"]
    assert shown and all("«" in row["example"] and row["explanation_it"] for row in shown)
    assert (out / "cache" / "autointerp.sqlite").is_file()


def test_cunningham(done):
    out, report = done("cunningham-2023")
    check_report(out, report, "cunningham-2023")
    steps = report["steps"]
    (layer,) = steps["baselines"]["layers"]
    rows = {row["dictionary"]: row for row in layer["rows"]}
    assert list(rows) == ["sae", "pca", "pca-topk"]
    assert rows["pca"]["explained_variance"]["value"] == pytest.approx(1, abs=1e-3)
    assert rows["pca"]["perplexity"]["value"] == pytest.approx(rows["pca"]["perplexity_of_model"]["value"], rel=1e-2)
    assert rows["pca-topk"]["l0"]["value"] == pytest.approx(rows["sae"]["l0"]["value"], abs=1.5)
    assert rows["pca-topk"]["explained_variance"]["value"] < 0.99
    curve = [point["explained_variance"] for point in layer["curves"]["pca"]]
    assert curve == sorted(curve) and curve[-1] > 0.99
    points = steps["sparsity"]["points"]
    assert points[0]["l1"] < points[1]["l1"] and points[0]["l0"]["value"] > points[1]["l0"]["value"]
    assert [row["d_sae"] for row in steps["ratios"]["rows"]] == [256]
    assert -1 <= steps["moments"]["kurtosis"]["value"] <= 1
    assert [curve["name"] for curve in steps["ioi"]["curves"]] == ["SAE", "PCA", "PCA, top-k"]
    assert (steps["ioi"]["skill"]["n"], steps["ioi"]["n_pairs"]) == (30, 2)
    saved = load_sae(out / "baselines" / "L1" / "dictionaries" / "pca")
    assert saved.cfg.architecture() == "standard" and saved.cfg.metadata.hook_name == "blocks.1.hook_resid_post"


def test_llama_scope(done):
    out, report = done("llama-scope")
    check_report(out, report, "llama-scope")
    steps = report["steps"]
    assert [row["name"] for row in steps["cards"]["rows"]] == ["L1R-2x", "L1R-4x", "L1TC-2x", "L1TC-4x"]
    assert all(row["l0"]["value"] <= 8 for row in steps["cards"]["rows"])
    assert steps["jumprelu"]["l0"] == pytest.approx(8, abs=1.5)
    assert [row["name"] for row in steps["annealing"]["rows"]] == ["annealed", "not-annealed"]
    assert len(steps["vanilla"]["rows"]) == 4
    assert {(item["source"], item["target"]) for item in steps["geometry"]["between"]} == {
        ("L1R-2x", "L1R-4x"),
        ("L1R-4x", "L1R-2x"),
    }
    assert ours(report)["Threshold for neighbours"].startswith(f"L1R-2x: {(12 * log(256) / 128) ** 0.5:.3f}")


def test_a_second_run_is_refused_and_resuming_does_nothing_again(done, monkeypatch):
    out, report = done("clic-it-2025")
    sizes = TINY["clic-it-2025"]
    with pytest.raises(UsageError, match="--resume"):
        reproduce("clic-it-2025", out, *sizes)
    with pytest.raises(UsageError, match="latents was 8, is now 13"):
        reproduce("clic-it-2025", out, *sizes[:-2], "latents=13", sizes[-1], resume=True)
    for module in ("training", "papers.job"):
        monkeypatch.setattr(f"sae_italian.{module}.train", None)
    for name in ("card_of", "score_sae", "examples"):
        monkeypatch.setattr(sys.modules["sae_italian.papers.reproduce"], name, None)  # not the function of that name
    again = reproduce("clic-it-2025", out, *sizes, resume=True)
    assert again == report


def test_steps_that_cannot_be_done_are_named_and_tried_again(tmp_path):
    tries = []

    def fails(job, results):
        tries.append(1)
        if len(tries) < 2:
            raise UsageError("the model cannot")
        return {"found": results["first"]["x"]}

    steps = {"first": lambda job, results: {"x": len(tries)}, "second": fails}
    made = paper("clic-it-2025")._replace(steps={"first": {}, "second": {"optional": True}})
    job = Reproduction(made, None, {}, tmp_path)
    assert run_steps(job, steps)[0]["second"] == {"skipped": "the model cannot"}
    assert run_steps(job, steps)[0] == {"first": {"x": 0}, "second": {"found": 0}}
    assert run_steps(job, steps)[0]["second"] == {"found": 0} and len(tries) == 2
    with pytest.raises(UsageError, match="the model cannot"):
        tries.clear()
        run_steps(Reproduction(made._replace(steps={"first": {}, "second": {}}), None, {}, tmp_path / "b"), steps)
    trains = made._replace(steps={"first": {}, "second": {"optional": True, "trains": True}})
    skipped = run_steps(Reproduction(trains, None, {}, tmp_path / "c", sae="some"), steps)[0]["second"]["skipped"]
    assert skipped.startswith("an SAE was given")


def test_no_step_begins_when_the_minutes_are_over_and_resume_goes_on(tmp_path, capsys):
    from sae_italian.base.pace import cut_short

    def first(job, results):
        return {"cut": cut_short(), "x": len(list(paced(range(5), "inner", 5)))}  # a step that has begun is whole

    steps = {"first": first, "second": lambda job, of: {"y": of["first"]["x"]}, "third": lambda *_: {}}
    made = paper("clic-it-2025")._replace(steps=dict.fromkeys(steps, {}))
    job = Reproduction(made, None, {}, tmp_path)
    with time_bound(1e-6) as cut:
        results, seconds = run_steps(job, steps)
    assert results["first"] == {"cut": [], "x": 5} and seconds["second"] == seconds["third"] == 0
    assert all("--resume goes on" in results[name]["skipped"] for name in ("second", "third"))
    assert cut == ["clic-it-2025: stopped by the time bound at 1 of 3 steps"]
    assert run_steps(job, steps)[0] == {"first": {"cut": [], "x": 5}, "second": {"y": 5}, "third": {}}


@pytest.mark.parametrize("name, first", [("clic-it-2025", "sae"), ("cunningham-2023", "saes")])
def test_a_report_is_written_of_what_there_is_when_the_minutes_are_over(name, first, tmp_path, capsys):
    given = ["reproduce", name, *TINY[name], "--out", str(tmp_path / "out")]
    assert main([*given, "minutes=0.0001", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert f"{name}: stopped by the time bound at 1 of" in report["cut_short"][0]
    left = [step for step, result in report["steps"].items() if "skipped" in result]
    assert first not in left and len(left) == len(STEPS[name]) - 1
    assert "not begun when the minutes were over" in (tmp_path / "out" / "report.md").read_text()
    assert main(["reproduce", "baselines", "mini/topk", "minutes=1", "--out", str(tmp_path / "b")]) == 2
    assert "minutes" in capsys.readouterr().err


def test_recipes_are_scaled_to_the_model_and_the_budget():
    def scaled(name, d_in, n_tokens):
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=d_in, num_hidden_layers=16))
        job = Reproduction(paper(name), Subject(model, "m", "text", "text", 64), {"layers": None}, None)
        return job, job.values(n_tokens)

    job, values = scaled("clic-it-2025", 2048, 800_000)
    assert values["sae"]["k"] == 32 and values["training_tokens"] == 800_000  # the paper's likely k at its width
    assert values["lr"] == pytest.approx(1e-3) and values["lr_decay_steps"] == 2 * 78
    assert values["corpus"] == "text" and values["context_size"] == 64
    assert job.layers(3) == [0, 8, 15] and job.layers(1) == [7] and job.layers(20) == list(range(16))
    assert scaled("llama-scope", 4096, 400_000)[1]["sae"]["k"] == 45
    mini = scaled("cunningham-2023", 128, 400_000)[1]
    assert mini["sae"]["l1_coefficient"] == 1.0 and mini["lr"] == 4e-3


def test_bad_input_is_named(tmp_path, trained_sae, identity_sae, jsonl):
    with pytest.raises(UsageError, match="'clic-it' is unknown. Did you mean 'clic-it-2025'"):
        reproduce("clic-it", tmp_path / "a")
    with pytest.raises(UsageError, match="'latent=.*no setting here"):
        reproduce("clic-it-2025", tmp_path / "a", "latent=3")
    other = copy.deepcopy(identity_sae)
    other.cfg.metadata.model_name = "another"
    other.save_model(tmp_path / "other")
    with pytest.raises(UsageError, match="belong to different models: another, sae-italian-mini"):
        compare_baselines([trained_sae, tmp_path / "other"], tmp_path / "a")
    with pytest.raises(UsageError, match="there is no SAE to compare"):
        compare_baselines([], tmp_path / "a")
    for wrong, said in (
        ({"fit_tokens": 0}, "fit_tokens is 0; it must be 1 or more"),
        ({"card_tokens": "5"}, "card_tokens is '5'"),
        ({"latents": -1}, "latents is -1"),
        ({"kinds": ("nix",)}, "baseline 'nix' is unknown"),
    ):
        with pytest.raises(UsageError, match=said):
            Settings(**wrong)
    other.cfg.metadata.hook_name_out = "blocks.2.hook_mlp_out"
    other.save_model(tmp_path / "transcoder")
    with pytest.raises(UsageError, match="is a transcoder"):
        reproduce("clic-it-2025", tmp_path / "a", sae=str(tmp_path / "transcoder"))
    assert not (tmp_path / "a").exists()


def test_commands(tmp_path, capsys, trained_sae):
    assert main(["reproduce", "llama-scop"]) == 2
    assert "Did you mean 'llama-scope'" in capsys.readouterr().err
    assert main(["reproduce", "baselines", str(trained_sae), "sae.k=3", "--out", str(tmp_path / "b")]) == 2
    assert "SAEs were given, not a config" in capsys.readouterr().err
    assert main(["reproduce", "baselines", "mini/suite.yaml", "--out", str(tmp_path / "b")]) == 2
    assert "sites=[R]" in capsys.readouterr().err
    for word, message in (
        ("latents=0", "latents is 0"),
        ("kinds=7", "kinds is 7"),
        ("fit_tokens=x", "fit_tokens is 'x'"),
    ):
        assert main(["reproduce", "baselines", str(trained_sae), word, "--out", str(tmp_path / "b")]) == 2
        assert message in capsys.readouterr().err
    assert main(["baselines", str(trained_sae)]) == 2 and "is now `reproduce baselines" in capsys.readouterr().err
    assert main(["reproduce", "baselines"]) == 2 and "which SAEs?" in capsys.readouterr().err


def test_the_command_compares_an_sae_with_what_it_is_asked_for(tmp_path, trained_sae, capsys):
    sizes = [
        "fit_tokens=2000",
        "ica_tokens=1000",
        "card_tokens=1000",
        "cache_tokens=8000",
        "latents=6",
        "kinds=[identity]",
    ]
    out = tmp_path / "b"
    command = ["reproduce", "baselines", str(trained_sae), *sizes, "--out", str(out)]
    assert main(command) == 0
    said = capsys.readouterr().out
    written = (out / "baselines.md").read_text()
    assert "| neurons, top-k |" in written and "| SAE |" in written and "PCA" not in written
    assert "\nneurons, top-k  " in said and (out / "baselines.svg").read_text().startswith("<?xml")
    rows = json.loads((out / "baselines.json").read_text())["layers"][0]["rows"]
    assert [row["d_sae"] for row in rows] == [256, 128, 128] and all(row["n_latents"] == 6 for row in rows)
    assert main(command) == 2 and "--resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0 and capsys.readouterr().out == said


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TINY))
def test_whole_with_its_own_budget(name, tmp_path):
    report = reproduce(name, tmp_path / name)
    check_report(tmp_path / name, report, name)
    assert all("skipped" not in result for result in report["steps"].values())
    assert all(row["ours"] != "-" for row in report["figures"])


def test_where_b_dec_starts_can_be_given(tmp_path):
    """The paper's start leaves most latents of a real model dead."""
    chosen, subject = paper("llama-scope"), open_subject(None)
    starts = [
        Reproduction(chosen, subject, chosen.with_budget(*words), tmp_path).values(4096)["sae"]["start"]
        for words in ([], ["start=mean"])
    ]
    assert starts == ["zero", "mean"]
