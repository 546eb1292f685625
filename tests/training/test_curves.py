"""Reference curves: every recipe of the mini model has one and still trains along it; what is off in a run is said."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml

from sae_italian.base.errors import UsageError
from sae_italian.cli import main
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
    recorded,
    same_recipe,
    shortened,
)


def test_every_recipe_has_its_curve():
    """A recipe without a recorded curve fails here: `sae-italian curves --record mini/NAME` makes one."""
    assert "mini/topk" in recipes() and "mini/suite" not in recipes()
    for recipe in recipes():
        reference = load_reference(recipe)
        assert same_recipe(reference.spec, load_spec(recipe).model_dump(mode="json")), f"{recipe} has changed"
        assert reference.full is not None, recipe
    stray = {f"mini/{file.stem}" for file in (configs_folder() / "mini" / "curves").glob("*.json")} - set(recipes())
    assert not stray


@pytest.mark.parametrize("recipe", recipes())
def test_a_shortened_recipe_trains_along_its_curve(recipe, tmp_path):
    curve = read_curve(train(shortened(load_spec(recipe)), tmp_path / "sae"))
    reference = load_reference(recipe).short
    assert curve.share == pytest.approx(reference.share) and len(curve.share) == 4
    assert outside(curve, reference) == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recorded())
def test_a_recipe_trains_along_its_curve(recipe, tmp_path):
    folder = train(load_spec(recipe), tmp_path / "sae")
    report = compare(folder, recipe)
    assert report.same_recipe and report.findings == ()
    reference = load_reference(recipe).full
    assert reference is not None and outside(read_curve(folder), reference) == []


@pytest.mark.parametrize("recipe", recorded())
def test_the_reference_itself_is_healthy(recipe, tmp_path):
    reference = load_reference(recipe)
    assert reference.full is not None
    report = compare(written(tmp_path, reference.full, reference.spec), recipe)
    assert report.findings == () and "healthy" in report.text()
    assert reference.full.values["explained_variance"][-1] > 0.5 and reference.full.share[-1] > 0.95
    assert same_recipe(load_reference(nearest_reference(reference.spec)).spec, reference.spec)


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
def healthy(tmp_path_factory, small_spec):
    """A recipe with a curve as one would draw it: loss falls, explained variance rises to 0.9, a few latents die."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "own.yaml").write_text(yaml.safe_dump(small_spec.model_dump(mode="json", exclude_none=True)))
    share = np.linspace(0.02, 1, 50)
    values = {"loss": 100 * np.exp(-3 * share), "l0": 8 + 0 * share, "dead": 0.05 * share}
    curve = Curve(share, {**values, "explained_variance": 0.9 * (1 - np.exp(-5 * share))})
    spec = small_spec.model_dump(mode="json")
    plain = {"recipe": "r/own", "spec": spec, "short": curve.as_dict(), "full": curve.as_dict()}
    (folder / "curves").mkdir()
    (folder / "curves" / "own.json").write_text(json.dumps(plain))
    return str(folder / "own.yaml"), curve, spec


def ramp(x):
    return np.linspace(0, 1, len(x))


SICK = {
    "dead": (lambda x: x + 0.5 * ramp(x), "dead latents are .* and rising"),
    "l0": (lambda x: x * 0.7, "L0 is 5.6, off k = 8"),
    "explained_variance": (lambda x: x - 0.2, "explained variance is .*, below"),
    "loss": (lambda x: x * (1 + 40 * ramp(x) ** 4), "diverging"),
}


@pytest.mark.parametrize("name", SICK)
def test_what_is_off_is_said(name, healthy, tmp_path):
    change, words = SICK[name]
    recipe, curve, spec = healthy
    report = compare(written(tmp_path / "run", curve, spec, **{name: change}), recipe)
    assert len(report.findings) == 1 and re.search(words, report.findings[0])
    assert f"! {report.findings[0]}" in report.text()
    assert outside(report.curve, report.reference)


def test_a_loss_that_is_not_finite(healthy, tmp_path):
    recipe, curve, spec = healthy
    report = compare(written(tmp_path / "run", curve, spec, loss=lambda x: np.append(x[:-1], np.nan)), recipe)
    assert "not finite" in report.findings[0]


def test_an_l1_saes_l0_is_held_against_the_curve(healthy, tmp_path):
    recipe, curve, spec = healthy
    sae = {"architecture": "standard", "d_sae": 256, "l1_coefficient": 1.0}
    run = written(tmp_path / "run", curve, {**spec, "sae": sae}, l0=lambda x: 5 * x)
    assert compare(run, recipe).findings == ("L0 is 40 where 8 is healthy: raise sae.l1_coefficient.",)


def test_a_run_half_done_is_held_against_half_the_curve(healthy, tmp_path):
    recipe, curve, spec = healthy
    half = Curve(curve.share[:25], {name: values[:25] for name, values in curve.values.items()})
    report = compare(written(tmp_path / "run", half, spec), recipe)
    assert report.findings == () and "50 % of the training" in report.text()


def test_the_command_draws_and_says(healthy, tmp_path, capsys):
    recipe, curve, spec = healthy
    run = written(tmp_path / "run", curve, spec)
    assert main(["curves", str(run), "--reference", recipe]) == 0
    out = capsys.readouterr().out
    assert "healthy: nothing is off" in out and "explained_variance" in out
    svg = (run / "curves.svg").read_text()
    assert "<svg" in svg and "varianza spiegata" in svg and "healthy · sano" in svg
    picture = tmp_path / "x.svg"
    assert main(["curves", str(run), "--reference", recipe, "--out", str(picture), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["findings"] == [] and value["same_recipe"] and value["last"]["l0"] == 8
    assert picture.read_text() == svg  # the same numbers, the same bytes


def test_another_model_has_wider_bands(healthy, tmp_path):
    recipe, curve, spec = healthy
    run = written(tmp_path / "run", curve, {**spec, "model": "minerva-350m"}, dead=lambda x: x + 0.08)
    report = compare(run, recipe)
    assert not report.same_recipe and report.findings == () and "three times as wide" in report.text()
    assert compare(written(tmp_path / "same", curve, spec, dead=lambda x: x + 0.08), recipe).findings
    other = {**spec, "sae": {**spec["sae"], "architecture": "unheard_of"}}
    with pytest.raises(UsageError, match="--reference, one of mini/"):
        compare(written(tmp_path / "other", curve, other))


def test_recording_writes_what_is_read(tmp_path, small_spec):
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
