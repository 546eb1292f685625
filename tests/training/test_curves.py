"""Reference curves: every recipe of the mini model has one and still trains along it; what is off in a run is said."""

import json
import re
import shutil

import numpy as np
import pytest

from sae_italian.cli import main
from sae_italian.errors import UsageError
from sae_italian.training import load_spec, train
from sae_italian.training.config import configs_folder
from sae_italian.training.curves import (
    METRICS,
    Curve,
    compare,
    load_reference,
    nearest_reference,
    outside,
    read_curve,
    recipes,
    record,
    same_recipe,
    shortened,
)


def test_every_recipe_has_its_curve():
    """A recipe without a recorded curve fails here: `sae-italian curves --record mini/NAME` makes one."""
    assert "mini/topk" in recipes() and "mini/suite" not in recipes()
    for recipe in recipes():
        reference = load_reference(recipe)
        assert same_recipe(reference.spec, load_spec(recipe).model_dump(mode="json")), f"{recipe} has changed"
        assert reference.full is not None, f"{recipe} has a short curve only"
    stray = {f"mini/{file.stem}" for file in (configs_folder() / "mini" / "curves").glob("*.json")} - set(recipes())
    assert not stray


@pytest.mark.parametrize("recipe", recipes())
def test_a_shortened_recipe_trains_along_its_curve(recipe, tmp_path):
    curve = read_curve(train(shortened(load_spec(recipe)), tmp_path / "sae"))
    reference = load_reference(recipe).short
    assert curve.share == pytest.approx(reference.share) and len(curve.share) == 4
    assert outside(curve, reference) == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipes())
def test_a_recipe_trains_along_its_curve(recipe, tmp_path):
    folder = train(load_spec(recipe), tmp_path / "sae")
    report = compare(folder, recipe)
    assert report.same_recipe and report.findings == ()
    reference = load_reference(recipe).full
    assert reference is not None and outside(read_curve(folder), reference) == []


@pytest.mark.parametrize("recipe", recipes())
def test_the_reference_itself_is_healthy(recipe, tmp_path):
    reference = load_reference(recipe)
    assert reference.full is not None
    report = compare(written(tmp_path, reference.full, reference.spec), recipe)
    assert report.findings == () and "healthy" in report.text()
    assert reference.full.values["explained_variance"][-1] > 0.5 and reference.full.share[-1] > 0.95


def written(folder, curve: Curve, spec: dict, **changes):
    """A training's folder with these curves; `changes` replace metrics by functions of the recorded one."""
    values = {name: changes.get(name, lambda x: x)(curve.values[name]) for name in METRICS}
    rows = [
        {
            "step": 10 * i,
            "details/n_training_samples": share * spec["training_tokens"],
            "losses/overall_loss": values["loss"][i],
            "metrics/l0": values["l0"][i],
            "metrics/explained_variance": values["explained_variance"][i],
            "sparsity/dead_features": values["dead"][i] * spec["sae"]["d_sae"],
        }
        for i, share in enumerate(curve.share.tolist())
    ]
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    (folder / "run.json").write_text(json.dumps({"kind": "train", "spec": spec}))
    return folder


@pytest.fixture(scope="module")
def topk():
    reference = load_reference("mini/topk")
    return Curve(reference.short.share, reference.short.values) if reference.full is None else reference.full


def ramp(x):
    return np.linspace(0, 1, len(x))


SICK = {
    "dead": (lambda x: x + 0.5 * ramp(x), "dead latents are .* and rising"),
    "l0": (lambda x: x * 0.7, "L0 is 5.6, off k = 8"),
    "explained_variance": (lambda x: x - 0.2, "explained variance is .*, below"),
    "loss": (lambda x: x * (1 + 9 * ramp(x) ** 4), "diverging"),
}


@pytest.mark.parametrize("name", SICK)
def test_what_is_off_is_said(name, topk, tmp_path):
    change, words = SICK[name]
    report = compare(written(tmp_path / "run", topk, load_reference("mini/topk").spec, **{name: change}), "mini/topk")
    assert len(report.findings) == 1 and re.search(words, report.findings[0])
    assert f"! {report.findings[0]}" in report.text()


def test_a_loss_that_is_not_finite(topk, tmp_path):
    def broken(x):
        return np.append(x[:-1], np.nan)

    report = compare(written(tmp_path / "run", topk, load_reference("mini/topk").spec, loss=broken), "mini/topk")
    assert "not finite" in report.findings[0]


def test_the_command_draws_and_says(topk, tmp_path, capsys):
    run = written(tmp_path / "run", topk, load_reference("mini/topk").spec)
    assert main(["curves", str(run), "--reference", "mini/topk"]) == 0
    out = capsys.readouterr().out
    assert "healthy: nothing is off" in out and "explained_variance" in out
    svg = (run / "curves.svg").read_text()
    assert "<svg" in svg and "varianza spiegata" in svg and "healthy · sano (mini/topk)" in svg
    assert main(["curves", str(run), "--out", str(tmp_path / "x.svg"), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["findings"] == [] and value["recipe"] == "mini/topk" and value["same_recipe"]
    assert (tmp_path / "x.svg").read_text() == svg  # the same numbers, the same bytes


def test_another_model_is_held_against_the_same_architecture(topk, tmp_path):
    spec = {**load_reference("mini/topk").spec, "model": "minerva-350m"}
    spec["sae"] = {**spec["sae"], "architecture": "sparse_topk", "k": 9}
    assert load_reference(nearest_reference(spec)).spec["sae"]["architecture"] in ("topk", "sparse_topk")
    report = compare(written(tmp_path / "run", topk, spec), "mini/topk")
    assert not report.same_recipe and "three times as wide" in report.text()
    spec["sae"]["architecture"] = "unheard_of"
    with pytest.raises(UsageError, match="--reference, one of mini/"):
        compare(written(tmp_path / "other", topk, spec))


def test_recording_writes_what_is_read(tmp_path, small_spec):
    import yaml

    (tmp_path / "r").mkdir()
    recipe = tmp_path / "r" / "own.yaml"
    recipe.write_text(yaml.safe_dump(small_spec.model_dump(mode="json", exclude_none=True)))
    file = record(str(recipe))
    assert file == tmp_path / "r" / "curves" / "own.json"
    reference = load_reference(str(recipe))
    assert reference.full is not None and reference.recipe == "r/own"
    short = reference.short.as_dict()
    assert record(str(recipe), full=False) == file
    again = load_reference(str(recipe))
    assert again.full is not None and again.short.as_dict() == short  # the seed decides
    shutil.rmtree(tmp_path / "r" / "curves")
    with pytest.raises(UsageError, match="no recorded curve"):
        load_reference(str(recipe))


def test_a_folder_without_a_training(tmp_path, capsys):
    assert main(["curves", str(tmp_path)]) == 2
    assert "metrics.jsonl and run.json" in capsys.readouterr().err
    assert main(["curves"]) == 2
